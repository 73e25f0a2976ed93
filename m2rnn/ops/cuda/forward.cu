// The forward pass: y, the final state and a state every CHUNK steps.

#define STAGE 32  // steps in shared memory at a time, while the next are on their way
#define Y_ROW (V + 4)  // padded, so that the lanes of a warp meet different banks

struct Forward {
    Strided q, k, v, f;
    const float* weight;   // [heads / weight_repeat, V, V]
    const float* initial;  // [sequences, heads, key_dim, V] or null
    float* final;          // likewise
    saved_t* saved;        // [B, (steps - 1) / CHUNK, heads, key_dim, V] or null
    void* y;               // [B, steps, heads, V]
    const i64* offsets;    // [sequences + 1] of packed sequences, or null
    u32* finished;         // [sequences · groups of heads], slices done; null if there is one slice
    i64 steps, slice;      // the slice's length is a multiple of CHUNK
    int heads, key_dim, weight_repeat, sequences;
};

struct ForwardShared {
    char q[2][tile_bytes<STAGE, ROWS>()];
    char k[2][tile_bytes<STAGE, ROWS>()];
    char v[2][SLOTS][tile_bytes<STAGE, V>()];
    float f[2][SLOTS][STAGE];
    float y[2][SLOTS][WARPS][STAGE][Y_ROW];
    float zeros[4];
};
static_assert(sizeof(ForwardShared) == SHARED_BYTES, "the launcher counts otherwise");

extern "C" __global__ void __launch_bounds__(THREADS) m2rnn_forward(const Forward p) {
    extern __shared__ __align__(16) char memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % WARPS, slot = thread / 32 / WARPS;
    const u32 groups = p.heads / SLOTS;
    const u32 unit = blockIdx.x % (groups * p.sequences), slice = blockIdx.x / (groups * p.sequences);
    const int first_head = unit % groups * SLOTS, head = first_head + slot;
    const i64 sequence = unit / groups, batch = p.offsets ? 0 : sequence;
    const i64 begin = p.offsets ? p.offsets[sequence] : 0, end = p.offsets ? p.offsets[sequence + 1] : p.steps;
    const i64 from = slice * p.slice > begin ? slice * p.slice : begin;  // the slice's part of the sequence
    const i64 to = (slice + 1) * p.slice < end ? (slice + 1) * p.slice : end;
    const int row = 16 * warp;
    const int slot_thread = thread % (32 * WARPS);
    const u32 zeros = shared_address(shared.zeros);
    if (thread < 4) shared.zeros[thread] = 0.f;

    const input_t* q = (const input_t*)p.q.data + batch * p.q.batch + first_head / p.q.repeat * p.q.head;
    const input_t* k = (const input_t*)p.k.data + batch * p.k.batch + first_head / p.k.repeat * p.k.head;
    const input_t* v = (const input_t*)p.v.data + batch * p.v.batch + head / p.v.repeat * p.v.head;
    const i64 f_offset = batch * p.f.batch + head / p.f.repeat * p.f.head;

    const i64 state_offset = (sequence * p.heads + head) * p.key_dim * V;
    u32* finished = p.finished ? p.finished + unit : nullptr;
    if (finished) wait_until(finished, slice);
    const float* start = from > begin ? p.final : p.initial;
    float h[NT][4];
    Packed packed;
    load_state(h, start ? start + state_offset : nullptr, row, p.key_dim, lane);
    pack(packed, h);
    Matrix weight;
    load_matrix(weight, p.weight + head / p.weight_repeat * V * V, false, lane);

    const i64 y_offset = (batch * p.steps * p.heads + head) * V;
    float next_f = 1.f;
    auto stage_inputs = [&](i64 first, int buffer) {
        stage<STAGE, ROWS, THREADS>(shared.q[buffer], q + first * p.q.time, p.q.time, first, begin, end, p.key_dim, thread);
        stage<STAGE, ROWS, THREADS>(shared.k[buffer], k + first * p.k.time, p.k.time, first, begin, end, p.key_dim, thread);
        stage<STAGE, V, 32 * WARPS>(shared.v[buffer][slot], v + first * p.v.time, p.v.time, first, begin, end, V, slot_thread);
        copies_issued();
        // f = 1 outside of the sequence leaves the state as it is
        next_f = 1.f;
        if (slot_thread < STAGE && first + slot_thread >= begin && first + slot_thread < end)
            next_f = ((const float*)p.f.data)[f_offset + (first + slot_thread) * p.f.time];
    };
    auto inputs_arrived = [&](int buffer) {
        if (slot_thread < STAGE) shared.f[buffer][slot][slot_thread] = next_f;
        copies_done();
        __syncthreads();
    };

    const i64 aligned = from / STAGE * STAGE;
    if (from < to) {
        stage_inputs(aligned, 0);
        inputs_arrived(0);
    }
    int buffer = 0;
    for (i64 first = from < to ? aligned : to; first < to; first += STAGE, buffer ^= 1) {
        if (first + STAGE < to) stage_inputs(first + STAGE, buffer ^ 1);
        if (p.saved && first > begin && first % CHUNK == 0) {
            const i64 index = batch * ((p.steps - 1) / CHUNK) + first / CHUNK - 1;
            save_state(h, p.saved + (index * p.heads + head) * p.key_dim * V, row, p.key_dim, lane);
        }
        const char *k_tile = shared.k[buffer], *v_tile = shared.v[buffer][slot];
#pragma unroll 1
        for (int octet = 0; octet < STAGE; octet += 8) {
            if (first + octet + 8 <= begin || first + octet >= end) continue;
            RowSteps queries;
            load_rows<STAGE>(queries, shared_address(shared.q[buffer]), octet, row, lane);
            alignas(16) float gates[8];
            *(float4*)gates = *(const float4*)&shared.f[buffer][slot][octet];
            *(float4*)(gates + 4) = *(const float4*)&shared.f[buffer][slot][octet + 4];

            float y[KS][4] = {};
            float z[NT][4];  // k vᵀ of the next step, computed ahead, then Z
            Outer outer;
            load_outer<STAGE>(outer, shared_address(k_tile), shared_address(v_tile), octet, 0, row, zeros, lane);
            clear(z);
            add_outer<STAGE>(z, outer, octet, row, k_tile, v_tile, lane);
#pragma unroll UNROLLED
            for (int step = 0; step < 8; step++) {
                float sums[KS][4] = {};
                if (step < 7)
                    load_outer<STAGE>(outer, shared_address(k_tile), shared_address(v_tile), octet, step + 1, row, zeros, lane);
                float ahead[NT][4];
                clear(ahead);
                if (step < 7) add_outer<STAGE>(ahead, outer, octet + step + 1, row, k_tile, v_tile, lane);
                update(z, packed, weight);
                blend(h, z, gates[step]);
                pack(packed, h);
                Transposed transposed;
                transpose(transposed, packed);
                add_transposed_product(sums, transposed, queries);
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) z[n][i] = ahead[n][i];
#pragma unroll
                for (int k = 0; k < KS; k++) add_column(y[k], sums[k], step, lane);
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
        const int low = (int)(begin - first), high = end - first < STAGE ? (int)(end - first) : STAGE;
#pragma unroll
        for (int j = 0; j < (STAGE * V / 2 + 32 * WARPS - 1) / (32 * WARPS); j++) {
            const int i = slot_thread + j * 32 * WARPS, step = i / (V / 2), column = i % (V / 2) * 2;
            if (step < low || step >= high) continue;
            float2 sum = make_float2(0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float2 part = *(const float2*)&shared.y[buffer][slot][w][step][column];
                sum.x += part.x;
                sum.y += part.y;
            }
            store_pair(p.y, y_offset + (first + step) * (p.heads * V) + column, sum.x, sum.y);
        }
    }
    if (from < to || slice == 0)  // an empty sequence ends as it starts
        store_state(h, p.final + state_offset, row, p.key_dim, lane);
    if (finished) {
        __syncthreads();
        if (thread == 0) count_up(finished);
    }
}
