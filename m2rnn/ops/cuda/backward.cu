// The backward pass: from the last chunk to the first, a chunk's states are computed again from the saved one, then
// the steps run backwards. With c the gradient that reaches the state from later steps:
//
//     G = q dyᵀ + clamp(c)      dX = (1 - f) G ⊙ (1 - Z²)      c ← f G + dX Wᵀ
//     dq = H dy    dk = dX v    dv = dXᵀ k    df = Σ G ⊙ (H_prev - Z)    dW += H_prevᵀ dX
//
// Only every second state of a chunk is kept in shared memory: Z has to be computed again from it anyway, and the next
// state comes with it.

struct Backward {
    Strided q, k, v, f, dy;
    const float* weight;   // [heads / weight_repeat, V, V]
    const float* initial;  // [sequences, heads, key_dim, V] or null
    const saved_t* saved;  // [B, (steps - 1) / CHUNK, heads, key_dim, V]
    const i64* offsets;    // [sequences + 1] of packed sequences, or null
    float* carry;          // [sequences, heads, key_dim, V]: c after the window's last step, then before its first
    void *dq, *dk;         // [B, steps, source heads, key_stride]; if groups of heads share them, partial sums
                           // [groups, B, window, source heads, key_stride]
    void* dv;              // [B, steps, heads, V], float32 if dv_float
    float* df;             // [B, steps, heads]
    float* dweight;        // [lanes, heads, V, V], added to
    u32* finished;         // [lanes · groups of heads], slices done; null if there is one slice
    i64 steps, window_begin, window_end, slice;  // the slice's length is a multiple of CHUNK
    int heads, key_dim, key_stride, weight_repeat, sequences, lanes, dv_float;
    float clip;
};

struct alignas(4 * AREGS) Registers {
    u32 value[AREGS];
};

// What one warp keeps of two steps: the state before them and, once they are done, their gradients.
union Pair {
    Registers states[PARTS * KS][32];
    struct {  // of rows r and r + 8 of a tile of 16, r < 8
        float2 dq[2][8];
        float2 dk[2][8];
        float2 dv[2][KS][8];  // the warp's rows' share
    } gradients;
};

struct alignas(64) Kept {  // of 8 steps; warps a multiple of 64 bytes apart meet different banks
    Pair pairs[4];
    float df[8];
};

// With few heads, latency is what counts: then one half of the block (AHEAD) computes the states of the next chunk while
// the other walks back through this one.
#define ALL_THREADS (THREADS * (1 + AHEAD))
#define SLOT_THREADS (32 * WARPS * (1 + AHEAD))
#define BUFFERS (AHEAD ? 3 : 1)  // of inputs: on their way, computing states, walking back

struct Inputs {  // of a chunk
    char q[tile_bytes<CHUNK, ROWS>()];
    char k[tile_bytes<CHUNK, ROWS>()];
    char v[SLOTS][tile_bytes<CHUNK, V>()];
    char dy[SLOTS][tile_bytes<CHUNK, V>()];
    float f[SLOTS][CHUNK];
};

struct BackwardShared {
    Kept kept[1 + AHEAD][CHUNK / 8][SLOTS][WARPS];
    Registers end[1 + AHEAD][SLOTS][WARPS][PARTS * KS][32];  // the state after a chunk
    Inputs inputs[BUFFERS];
    float dweight[SLOTS][WARPS][V * V];  // dW of the chunks done, each warp's rows' share
    float zeros[4];
};
static_assert(sizeof(BackwardShared) == SHARED_BYTES, "the launcher counts otherwise");

struct Gradients {
    float carry[NT][4];       // c
    float weight[KS][NT][4];         // dWᵀ of this chunk, this warp's rows' share
    float f[8];                      // of 8 steps, this lane's share
};

struct Octet {  // 8 steps of the inputs, as operands for products with the matrix of one of them
    RowSteps keys;
    ColumnSteps values, dys;
};

__device__ __forceinline__ void unpack(float (&h)[NT][4], const Packed& packed) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 first = packed.part[PARTS - 1][n / 2][2 * (n % 2) + half];
            float low = low_bf16(first), high = high_bf16(first);
#pragma unroll
            for (int p = PARTS - 2; p >= 0; p--) {
                const u32 x = packed.part[p][n / 2][2 * (n % 2) + half];
                low += low_bf16(x);
                high += high_bf16(x);
            }
            h[n][2 * half] = low;
            h[n][2 * half + 1] = high;
        }
}

__device__ __forceinline__ void store_packed(Registers (&to)[PARTS * KS][32], const Packed& packed, int lane) {
#pragma unroll
    for (int i = 0; i < PARTS * KS; i++) {
        Registers registers;
#pragma unroll
        for (int r = 0; r < AREGS; r++) registers.value[r] = packed.part[i / KS][i % KS][r];
        to[i][lane] = registers;
    }
}
__device__ __forceinline__ void load_packed(Packed& packed, const Registers (&from)[PARTS * KS][32], int lane) {
#pragma unroll
    for (int i = 0; i < PARTS * KS; i++) {
        const Registers registers = from[i][lane];
#pragma unroll
        for (int r = 0; r < AREGS; r++) packed.part[i / KS][i % KS][r] = registers.value[r];
    }
}

// A saved state, kept as it was read: to convert it at once would wait for it.
struct Start {
#if PARTS == 1
    typedef u32 pair_t;
#else
    typedef float2 pair_t;
#endif
    pair_t pairs[NT][2];

    __device__ __forceinline__ void load(const saved_t* state, int first_row, int rows, int lane) {
        for_pairs(lane, [&](int n, int i, int row, int column) {
            pairs[n][i / 2] = {};
            if (first_row + row < rows) pairs[n][i / 2] = *(const pair_t*)(state + (i64)(first_row + row) * V + column);
        });
    }
    __device__ __forceinline__ void unpack(float (&h)[NT][4]) const {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
#if PARTS == 1
                h[n][2 * half] = low_bf16(pairs[n][half]);
                h[n][2 * half + 1] = high_bf16(pairs[n][half]);
#else
                h[n][2 * half] = pairs[n][half].x;
                h[n][2 * half + 1] = pairs[n][half].y;
#endif
            }
    }
};

__device__ __forceinline__ void add(float4& sum, const float4 x) { sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w; }

// Two neighbours, as float32 or in the inputs' dtype; the index is even.
__device__ __forceinline__ void store_pair(void* data, i64 index, float a, float b, bool as_float) {
    if (as_float || INPUT == 2)
        *(float2*)((float*)data + index) = make_float2(a, b);
    else
        store_pair(data, index, a, b);
}

// The column of one of the 8 steps of a 16 × 8 product, as pairs of rows r and r + 8.
__device__ __forceinline__ void store_column(float2 (&to)[8], const float (&x)[4], int step, int lane) {
    if (lane % 4 == step / 2) to[lane / 4] = make_float2(x[step % 2], x[step % 2 + 2]);
}

// x ← f x + products, by the tensor cores alone in one part; in more, whose errors they would exceed in the long run,
// they sum the products only.
__device__ __forceinline__ void start_sum(float (&sum)[NT][4], const float (&x)[NT][4], float f) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n][i] = PARTS == 1 ? f * x[n][i] : 0.f;
}
__device__ __forceinline__ void finish_sum(float (&x)[NT][4], const float (&sum)[NT][4], float f) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[n][i] = PARTS == 1 ? sum[n][i] : fmaf(f, x[n][i], sum[n][i]);
}

// One step back of tile m. h and packed are the state before the step, z its update, next the state after it.
__device__ __forceinline__ void step_back(
    Gradients& d, float (&dv)[KS][4], Pair& out, const Octet& in, float f, int step, const float (&h)[NT][4],
    const Packed& packed, const float (&z)[NT][4], const Packed& next, const Matrix& transposed_weight, int lane
) {
    const float g = 1.f - f;
    float(&carry)[NT][4] = d.carry;  // here it is G
    float dx[NT][4], df[2] = {};
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float grad = carry[n][i], gz = g * z[n][i];
            df[i % 2] = fmaf(grad, h[n][i] - z[n][i], df[i % 2]);
            dx[n][i] = grad * fmaf(-gz, z[n][i], g);
        }
    d.f[step] += df[0] + df[1];
    Packed dx_packed;
    pack(dx_packed, dx);
    float back[NT][4];
    start_sum(back, carry, f);
    multiply(back, dx_packed, transposed_weight);
    finish_sum(carry, back, f);

    float dq[4] = {}, dk[4] = {};
    add_product(dk, dx_packed, in.values);
    store_column(out.gradients.dk[step % 2], dk, step, lane);
    add_product(dq, next, in.dys);
    store_column(out.gradients.dq[step % 2], dq, step, lane);
    Transposed dx_transposed, state_transposed;
    transpose(dx_transposed, dx_packed);
    add_transposed_product(dv, dx_transposed, in.keys);
    transpose(state_transposed, packed);
#pragma unroll
    for (int k = 0; k < KS; k++) {
        float dweight[NT][4];
        start_sum(dweight, d.weight[k], 1.f);
#pragma unroll
        for (int n = 0; n < NT; n++)
            FOR_PARTS(i, j)
                mma16(dweight[n], dx_transposed.part[i][k], state_transposed.part[j][n / 2][n % 2],
                      state_transposed.part[j][n / 2][n % 2 + 2]);
        finish_sum(d.weight[k], dweight, 1.f);
    }
}

// The sums of 8 values over the lanes of a warp; lane i % 8 returns the i-th.
__device__ __forceinline__ float sum_lanes(float (&x)[8], int lane) {
#pragma unroll
    for (int width = 4; width >= 1; width /= 2)
#pragma unroll
        for (int i = 0; i < width; i++) {
            const bool upper = lane & width;
            const float keep = upper ? x[i + width] : x[i], give = upper ? x[i] : x[i + width];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, give, width);
        }
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], 8);
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], 16);
    return x[0];
}

// Blocks of other slices or heads on the same multiprocessor, where registers allow: they are at another phase.
constexpr int BLOCKS = V <= 16 && PARTS == 1 && ALL_THREADS < 512 ? 512 / ALL_THREADS : 1;

extern "C" __global__ void __launch_bounds__(ALL_THREADS, BLOCKS) m2rnn_backward(const Backward p) {
    extern __shared__ __align__(64) char memory[];
    BackwardShared& shared = *(BackwardShared*)memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % WARPS, slot = thread / 32 / WARPS % SLOTS;
    const bool recomputes = !AHEAD || thread >= THREADS, walks = thread < THREADS;
    const int slot_thread = thread % (32 * WARPS) + thread / THREADS * (32 * WARPS), row = 16 * warp;
    const u32 groups = p.heads / SLOTS;
    const u32 unit = blockIdx.x % (groups * p.lanes), slice = blockIdx.x / (groups * p.lanes), unit_lane = unit / groups;
    const int first_head = unit % groups * SLOTS, head = first_head + slot;
    const i64 slices = (p.window_end - p.window_begin + p.slice - 1) / p.slice;
    const i64 slice_begin = p.window_begin + (slices - 1 - slice) * p.slice;  // the last comes first
    const i64 slice_end = slice_begin + p.slice < p.window_end ? slice_begin + p.slice : p.window_end;
    u32* finished = p.finished ? p.finished + unit : nullptr;
    wait_for_slice(finished, slice);

    Matrix weight, transposed_weight;
    load_matrix(weight, p.weight + head / p.weight_repeat * V * V, false, lane);
    load_matrix(transposed_weight, p.weight + head / p.weight_repeat * V * V, true, lane);
    Gradients d;
    float* dweight = shared.dweight[slot][warp];
    if (walks)
        for (int i = lane; i < V * V; i += 32) dweight[i] = 0.f;
    __syncwarp();
    const u32 zeros = shared_address(shared.zeros);
    if (thread < 4) shared.zeros[thread] = 0.f;

    // dq and dk are final where a block has all heads of their source, else partial sums over its heads
    const i64 window = p.window_end - p.window_begin, batches = p.offsets ? 1 : p.sequences;
    const bool q_final = p.q.repeat == SLOTS, k_final = p.k.repeat == SLOTS;
    const int q_row = p.heads / p.q.repeat * p.key_stride, k_row = p.heads / p.k.repeat * p.key_stride;
    const int q_head = first_head / p.q.repeat, q_group = first_head % p.q.repeat / SLOTS;
    const int k_head = first_head / p.k.repeat, k_group = first_head % p.k.repeat / SLOTS;

    for (int sequence = unit_lane; sequence < p.sequences; sequence += p.lanes) {
        const i64 batch = p.offsets ? 0 : sequence;
        const i64 begin = p.offsets ? p.offsets[sequence] : 0, end = p.offsets ? p.offsets[sequence + 1] : p.steps;
        const i64 first_step = begin > slice_begin ? begin : slice_begin;
        const i64 last_step = (end < slice_end ? end : slice_end) - 1;
        if (first_step > last_step) continue;

        const input_t* q = (const input_t*)p.q.data + batch * p.q.batch + q_head * p.q.head;
        const input_t* k = (const input_t*)p.k.data + batch * p.k.batch + k_head * p.k.head;
        const input_t* v = (const input_t*)p.v.data + batch * p.v.batch + head / p.v.repeat * p.v.head;
        const input_t* dy = (const input_t*)p.dy.data + batch * p.dy.batch + head * p.dy.head;
        const i64 f_offset = batch * p.f.batch + head / p.f.repeat * p.f.head;
        const i64 state_offset = ((i64)sequence * p.heads + head) * p.key_dim * V;
        const i64 q_offset = (q_final ? batch * p.steps : (q_group * batches + batch) * window - p.window_begin) * q_row + q_head * p.key_stride;
        const i64 k_offset = (k_final ? batch * p.steps : (k_group * batches + batch) * window - p.window_begin) * k_row + k_head * p.key_stride;
        const i64 head_offset = batch * p.steps * p.heads + head;
        load_state(d.carry, p.carry + state_offset, row, p.key_dim, lane);

        Start start;  // the states before the chunk whose inputs are on their way
        float next_f = 1.f;
        auto stage_chunk = [&](i64 first, int buffer) {
            Inputs& in = shared.inputs[buffer];
            stage<CHUNK, ROWS, ALL_THREADS>(in.q, q + first * p.q.time, p.q.time, first, begin, end, p.key_dim, thread);
            stage<CHUNK, ROWS, ALL_THREADS>(in.k, k + first * p.k.time, p.k.time, first, begin, end, p.key_dim, thread);
            stage<CHUNK, V, SLOT_THREADS>(in.v[slot], v + first * p.v.time, p.v.time, first, begin, end, V, slot_thread);
            stage<CHUNK, V, SLOT_THREADS>(in.dy[slot], dy + first * p.dy.time, p.dy.time, first, begin, end, V, slot_thread);
            copies_issued();
            const i64 index = batch * ((p.steps - 1) / CHUNK) + first / CHUNK - 1;
            if (recomputes && first > begin)
                start.load(p.saved + (index * p.heads + head) * p.key_dim * V, row, p.key_dim, lane);
            // f = 1 outside of the sequence leaves the carry as it is
            next_f = 1.f;
            if (slot_thread < CHUNK && first + slot_thread >= begin && first + slot_thread < end)
                next_f = ((const float*)p.f.data)[f_offset + (first + slot_thread) * p.f.time];
        };
        auto chunk_arrived = [&](int buffer) {
            if (slot_thread < CHUNK) shared.inputs[buffer].f[slot][slot_thread] = next_f;
            copies_done();
            __syncthreads();
        };
        // The chunk's steps in the sequence: [low, high)
        auto low = [&](i64 first) { return (int)(begin > first ? begin - first : 0); };
        auto high = [&](i64 first) { return (int)(end - first < CHUNK ? end - first : CHUNK); };

        auto recompute = [&](i64 first, int buffer, int keep) {
            Inputs& in = shared.inputs[buffer];
            Kept* kept = &shared.kept[keep][0][slot][warp];
            float h[NT][4];
            Packed packed;
            if (first > begin)
                start.unpack(h);
            else
                load_state(h, p.initial ? p.initial + state_offset : nullptr, row, p.key_dim, lane);
            pack(packed, h);
            const u32 k_tile = shared_address(in.k), v_tile = shared_address(in.v[slot]);
#pragma unroll 1
            for (int octet = 0; octet < CHUNK; octet += 8) {
                if (octet + 8 <= low(first) || octet >= high(first)) continue;
#pragma unroll UNROLLED
                for (int step = 0; step < 8; step++) {
                    Outer key_value;
                    load_outer<CHUNK>(key_value, k_tile, v_tile, octet, step, row, zeros, lane);
                    const float f = in.f[slot][octet + step];
                    if (step % 2 == 0)
                        store_packed(kept[octet / 8 * SLOTS * WARPS].pairs[step / 2].states, packed, lane);
                    float z[NT][4];
                    clear(z);
                    add_outer<CHUNK>(z, key_value, octet + step, row, in.k, in.v[slot], lane);
                    update(z, packed, weight);
                    blend(h, z, f);
                    pack(packed, h);
                }
            }
            store_packed(shared.end[keep][slot][warp], packed, lane);
        };

        auto walk_back = [&](i64 first, int buffer, int keep) {
            Inputs& in = shared.inputs[buffer];
            Kept* kept = &shared.kept[keep][0][slot][warp];
            const u32 q_tile = shared_address(in.q), k_tile = shared_address(in.k);
            const u32 v_tile = shared_address(in.v[slot]), dy_tile = shared_address(in.dy[slot]);
#pragma unroll
            for (int k = 0; k < KS; k++) clear(d.weight[k]);
            Packed next;
            load_packed(next, shared.end[keep][slot][warp], lane);
#pragma unroll 1
            for (int octet = CHUNK - 8; octet >= 0; octet -= 8) {
                if (octet + 8 <= low(first) || octet >= high(first)) continue;
                Kept& octet_kept = kept[octet / 8 * SLOTS * WARPS];
                Octet operands;
                load_rows<CHUNK>(operands.keys, k_tile, octet, row, lane);
                load_columns<CHUNK>(operands.values, v_tile, octet, lane);
                load_columns<CHUNK>(operands.dys, dy_tile, octet, lane);
#pragma unroll
                for (int i = 0; i < 8; i++) d.f[i] = 0.f;

                auto add_output_gradient = [&](const Outer& query_dy, int step) {  // G = q dyᵀ + clamp(c)
#if CLIP
                    // Steps before the sequence leave the carry as it is: not clamped either
                    clamp(d.carry, octet + step >= low(first) ? p.clip : __uint_as_float(0x7f800000u));
#endif
                    add_outer<CHUNK>(d.carry, query_dy, octet + step, row, in.q, in.dy[slot], lane);
                };
#pragma unroll UNROLLED
                for (int step = 6; step >= 0; step -= 2) {
                    Pair& pair = octet_kept.pairs[step / 2];
                    Packed before;
                    load_packed(before, pair.states, lane);
                    Outer key_value[2], query_dy[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        load_outer<CHUNK>(key_value[i], k_tile, v_tile, octet, step + i, row, zeros, lane);
                        load_outer<CHUNK>(query_dy[i], q_tile, dy_tile, octet, step + i, row, zeros, lane);
                    }
                    const float2 f = *(const float2*)&in.f[slot][octet + step];
                    __syncwarp();  // every lane has read its states, the gradients can take their place
                    float dv[2][KS][4] = {};
                    Packed between;
                    float h0[NT][4], h1[NT][4], z0[NT][4], z1[NT][4];
                    unpack(h0, before);
                    clear(z0);
                    add_outer<CHUNK>(z0, key_value[0], octet + step, row, in.k, in.v[slot], lane);
                    update(z0, before, weight);
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) h1[n][i] = h0[n][i];
                    blend(h1, z0, f.x);
                    pack(between, h1);
                    clear(z1);
                    add_outer<CHUNK>(z1, key_value[1], octet + step + 1, row, in.k, in.v[slot], lane);
                    update(z1, between, weight);
                    add_output_gradient(query_dy[1], step + 1);
                    step_back(d, dv[1], pair, operands, f.y, step + 1, h1, between, z1, next, transposed_weight, lane);
                    add_output_gradient(query_dy[0], step);
                    step_back(d, dv[0], pair, operands, f.x, step, h0, before, z0, between, transposed_weight, lane);
                    next = before;
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int k = 0; k < KS; k++) store_column(pair.gradients.dv[i][k], dv[i][k], step + i, lane);
                }
                const float df = sum_lanes(d.f, lane);
                if (lane < 8) octet_kept.df[lane] = df;
            }
#pragma unroll
            for (int k = 0; k < KS; k++)
                for_pairs(lane, [&](int n, int i, int matrix_row, int column) {
                    if (16 * k + matrix_row >= V) return;
                    dweight[column * V + 16 * k + matrix_row] += d.weight[k][n][i];
                    dweight[(column + 1) * V + 16 * k + matrix_row] += d.weight[k][n][i + 1];
                });
        };

        auto write_gradients = [&](i64 first, int keep) {
#pragma unroll
            for (int j = 0; j < (CHUNK * ROWS / 4 + ALL_THREADS - 1) / ALL_THREADS; j++) {
                const int i = thread + j * ALL_THREADS, step = i / (ROWS / 4), tile = i / 4 % (ROWS / 16), r = i % 4 * 2;
                const int channel = 16 * tile + r;  // and the next, and those 8 further
                if (step < low(first) || step >= high(first) || channel >= p.key_dim) continue;
                float4 dq = make_float4(0.f, 0.f, 0.f, 0.f), dk = dq;
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    const auto& part = shared.kept[keep][step / 8][s][tile].pairs[step % 8 / 2].gradients;
                    add(dq, *(const float4*)&part.dq[step % 2][r]);
                    add(dk, *(const float4*)&part.dk[step % 2][r]);
                }
                const i64 q_at = q_offset + (first + step) * q_row + channel, k_at = k_offset + (first + step) * k_row + channel;
                const bool q_as_float = PARTS > 1 && !q_final, k_as_float = PARTS > 1 && !k_final;
                store_pair(p.dq, q_at, dq.x, dq.z, q_as_float);
                store_pair(p.dk, k_at, dk.x, dk.z, k_as_float);
                if (channel + 8 >= p.key_dim) continue;
                store_pair(p.dq, q_at + 8, dq.y, dq.w, q_as_float);
                store_pair(p.dk, k_at + 8, dk.y, dk.w, k_as_float);
            }
#pragma unroll
            for (int j = 0; j < (CHUNK * KS * 4 + SLOT_THREADS - 1) / SLOT_THREADS; j++) {
                const int i = slot_thread + j * SLOT_THREADS, step = i / (KS * 4), tile = i / 4 % KS, r = i % 4 * 2;
                if (step < low(first) || step >= high(first)) continue;
                float4 dv = make_float4(0.f, 0.f, 0.f, 0.f);
                float df = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    const Kept& part = shared.kept[keep][step / 8][slot][w];
                    add(dv, *(const float4*)&part.pairs[step % 8 / 2].gradients.dv[step % 2][tile][r]);
                    df += part.df[step % 8];
                }
                const i64 at = head_offset + (first + step) * p.heads;
                store_pair(p.dv, at * V + 16 * tile + r, dv.x, dv.z, p.dv_float);
                if (V > 8) store_pair(p.dv, at * V + 16 * tile + r + 8, dv.y, dv.w, p.dv_float);
                if (i % (KS * 4) == 0) p.df[at] = df;
            }
        };

        const i64 last_chunk = last_step / CHUNK * CHUNK;
        __syncthreads();  // the sequence before this one is done with the shared memory
        stage_chunk(last_chunk, 0);
#if AHEAD
        chunk_arrived(0);
        int buffer = 2, ahead = 0, keep = 0;  // of this chunk, and of the one before it in time
        for (i64 first = last_chunk + CHUNK; first + CHUNK > first_step; first -= CHUNK) {
            const int arriving = ahead == 2 ? 0 : ahead + 1;
            const bool has_states = first <= last_chunk;
            if (recomputes && first > first_step) recompute(first - CHUNK, ahead, keep ^ 1);
            if (first - CHUNK > first_step) stage_chunk(first - 2 * CHUNK, arriving);
            if (walks && has_states) walk_back(first, buffer, keep);
            chunk_arrived(arriving);
            if (has_states) {
                write_gradients(first, keep);
                __syncthreads();
            }
            buffer = ahead, ahead = arriving, keep ^= 1;
        }
#else
        for (i64 first = last_chunk; first + CHUNK > first_step; first -= CHUNK) {
            chunk_arrived(0);
            recompute(first, 0, 0);
            __syncwarp();
            walk_back(first, 0, 0);
            __syncthreads();
            if (first > first_step) stage_chunk(first - CHUNK, 0);
            write_gradients(first, 0);
        }
#endif
        if (walks)
            store_state(d.carry, p.carry + state_offset, row, p.key_dim, lane);
    }

    __syncthreads();
    float* total = p.dweight + ((i64)unit_lane * p.heads + head) * V * V;
    for (int i = slot_thread; i < V * V; i += SLOT_THREADS) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += shared.dweight[slot][w][i];
        total[i] += sum;
    }
    finish_slice(finished, slice);
}

// out[batch, window_begin + step] = Σ over groups of partial[group, batch, step], in the groups' order and float32; eight
// channels a thread, `row` channels in a step.
struct Sum {
    const void* partial;  // bfloat16 for bfloat16 in one part, else float32
    void* out;
    i64 steps, window_begin, window, batches;
    int groups, row;
};

extern "C" __global__ void m2rnn_sum(const Sum p) {
    const i64 index = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x), size = p.batches * p.window * p.row;
    if (index >= size) return;
    float4 sum[2] = {};
    for (int group = 0; group < p.groups; group++) {
        const i64 from = group * size + index;
#if PARTS == 1
        const uint4 x = *(const uint4*)((const u16*)p.partial + from);
        add(sum[0], make_float4(low_bf16(x.x), high_bf16(x.x), low_bf16(x.y), high_bf16(x.y)));
        add(sum[1], make_float4(low_bf16(x.z), high_bf16(x.z), low_bf16(x.w), high_bf16(x.w)));
#else
        add(sum[0], *(const float4*)((const float*)p.partial + from));
        add(sum[1], *(const float4*)((const float*)p.partial + from + 4));
#endif
    }
    const i64 batch = index / (p.window * p.row), rest = index % (p.window * p.row);
    const i64 to = (batch * p.steps + p.window_begin) * p.row + rest;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        store_pair(p.out, to + 4 * i, sum[i].x, sum[i].y);
        store_pair(p.out, to + 4 * i + 2, sum[i].z, sum[i].w);
    }
}
