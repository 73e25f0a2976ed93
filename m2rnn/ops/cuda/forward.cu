// The forward pass: y, the final state and a state every CHUNK steps.

#define STAGE 16  // steps in shared memory at a time, while the next are on their way
#define Y_ROW (V + 4)  // padded, so that the lanes of a warp meet different banks

struct Forward {
    Strided q, k, v, f;
    const float* weight;   // [heads / weight_repeat, V, V]
    const float* initial;  // [sequences, heads, key_dim, V] or null
    float* final;          // likewise
    saved_t* saved;        // [B, (steps - 1) / CHUNK, heads, key_dim, V] or null
    void* y;               // [B, steps, heads, V]
    const i64* offsets;    // [sequences + 1] of packed sequences, or null
    i64 steps;
    int heads, key_dim, weight_repeat;
};

struct ForwardShared {
    char q[2][tile_bytes<STAGE, ROWS>()];
    char k[2][tile_bytes<STAGE, ROWS>()];
    char v[2][SLOTS][tile_bytes<STAGE, V>()];
    float f[2][SLOTS][STAGE];
    float y[2][SLOTS][WARPS][STAGE][Y_ROW];
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) m2rnn_forward(const Forward p) {
    extern __shared__ __align__(16) char memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % WARPS, slot = thread / 32 / WARPS;
    const u32 groups = p.heads / SLOTS;
    const int first_head = blockIdx.x % groups * SLOTS, head = first_head + slot;
    const i64 sequence = blockIdx.x / groups, batch = p.offsets ? 0 : sequence;
    const i64 begin = p.offsets ? p.offsets[sequence] : 0, end = p.offsets ? p.offsets[sequence + 1] : p.steps;
    const int row = 16 * warp;

    const input_t* q = (const input_t*)p.q.data + batch * p.q.batch + first_head / p.q.repeat * p.q.head;
    const input_t* k = (const input_t*)p.k.data + batch * p.k.batch + first_head / p.k.repeat * p.k.head;
    const input_t* v = (const input_t*)p.v.data + batch * p.v.batch + head / p.v.repeat * p.v.head;
    const i64 f_offset = batch * p.f.batch + head / p.f.repeat * p.f.head;

    const i64 state_offset = (sequence * p.heads + head) * p.key_dim * V;
    float h[NT][4];
    load_state(h, p.initial ? p.initial + state_offset : nullptr, row, p.key_dim, lane);
    Matrix weight;
    load_matrix(weight, p.weight + head / p.weight_repeat * V * V, false, lane);
    Packed packed;
    pack(packed, h);

    float next_f = 1.f;
    const int slot_thread = thread % (32 * WARPS);
    auto stage_inputs = [&](i64 first, int buffer) {
        stage<STAGE, ROWS, THREADS>(shared.q[buffer], q + first * p.q.time, p.q.time, first, begin, end, p.key_dim, thread);
        stage<STAGE, ROWS, THREADS>(shared.k[buffer], k + first * p.k.time, p.k.time, first, begin, end, p.key_dim, thread);
        stage<STAGE, V, 32 * WARPS>(shared.v[buffer][slot], v + first * p.v.time, p.v.time, first, begin, end, V, slot_thread);
        copies_issued();
        // f = 1 outside of the sequence leaves the state as it is
        next_f = 1.f;
        if (slot_thread < STAGE && first + slot_thread >= begin && first + slot_thread < end)
            next_f = load_as_float(p.f.data, f_offset + (first + slot_thread) * p.f.time, GATE);
    };
    auto inputs_arrived = [&](int buffer) {
        if (slot_thread < STAGE) shared.f[buffer][slot][slot_thread] = next_f;
        copies_done();
        __syncthreads();
    };

    const i64 aligned = begin / STAGE * STAGE;
    if (begin < end) {
        stage_inputs(aligned, 0);
        inputs_arrived(0);
    }
    int buffer = 0;
    for (i64 first = begin < end ? aligned : end; first < end; first += STAGE, buffer ^= 1) {
        if (first + STAGE < end) stage_inputs(first + STAGE, buffer ^ 1);
        if (p.saved && first > begin && first % CHUNK == 0) {
            const i64 index = batch * ((p.steps - 1) / CHUNK) + first / CHUNK - 1;
            save_state(h, p.saved + (index * p.heads + head) * p.key_dim * V, row, p.key_dim, lane);
        }
#pragma unroll 1
        for (int octet = 0; octet < STAGE; octet += 8) {
            if (first + octet + 8 <= begin || first + octet >= end) continue;
            RowSteps keys, queries;
            ColumnSteps values;
            load_rows<STAGE>(keys, shared_address(shared.k[buffer]), octet, row, true, lane);
            load_rows<STAGE>(queries, shared_address(shared.q[buffer]), octet, row, false, lane);
            load_columns<STAGE>(values, shared_address(shared.v[buffer][slot]), octet, true, lane);
            float gates[8];
            *(float4*)gates = *(const float4*)&shared.f[buffer][slot][octet];
            *(float4*)(gates + 4) = *(const float4*)&shared.f[buffer][slot][octet + 4];

            float y[KS][4] = {};
            float z[NT][4], z_next[NT][4];
            clear(z);
            add_outer(z, keys, values, contracted_mask(0, lane));
#pragma unroll
            for (int step = 0; step < 8; step++) {
                clear(z_next);
                if (step < 7) add_outer(z_next, keys, values, contracted_mask(step + 1, lane));
                update(z, packed, weight);
                blend(h, z, gates[step]);
                pack(packed, h);
                Transposed transposed;
                transpose(transposed, packed);
                add_transposed_product(y, transposed, queries, column_mask(step, lane));
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) z[n][i] = z_next[n][i];
            }
#pragma unroll
            for (int tile = 0; tile < KS; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = 16 * tile + lane / 4 + i / 2 * 8, step = octet + 2 * (lane % 4) + i % 2;
                    if (column < V) shared.y[buffer][slot][warp][step][column] = y[tile][i];
                }
        }
        inputs_arrived(buffer ^ 1);
        for (int i = slot_thread; i < STAGE * V / 2; i += 32 * WARPS) {
            const int step = i / (V / 2), column = i % (V / 2) * 2;
            float2 sum = make_float2(0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float2 part = *(const float2*)&shared.y[buffer][slot][w][step][column];
                sum.x += part.x;
                sum.y += part.y;
            }
            if (first + step >= begin && first + step < end)
                store_pair(p.y, ((batch * p.steps + first + step) * p.heads + head) * V + column, sum.x, sum.y);
        }
    }
    store_state(h, p.final + state_offset, row, p.key_dim, lane);
}
