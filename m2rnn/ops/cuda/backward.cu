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
    void *dq, *dk;         // [B, steps, source heads, key_stride]; if groups of heads share them, float32 partial sums
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

// What one warp keeps of 8 steps: the state before every second step and, once the steps are done, their gradients.
union Kept {
    Registers states[4][TILES][PARTS * KS][32];
    struct {  // rows are padded, so that the lanes of a warp meet different banks
        float dq[8][16 * TILES + 4];
        float dk[8][16 * TILES + 4];
        float dv[8][V + 4];  // the warp's rows' share
        float df[8];
    } gradients;
};

struct BackwardShared {
    Kept kept[CHUNK / 8][SLOTS][WARPS];
    char q[tile_bytes<CHUNK, ROWS>()];
    char k[tile_bytes<CHUNK, ROWS>()];
    char v[SLOTS][tile_bytes<CHUNK, V>()];
    char dy[SLOTS][tile_bytes<CHUNK, V>()];
    float f[SLOTS][CHUNK];
    float dweight[SLOTS][WARPS][V * V];  // dW of the chunks done, each warp's rows' share
};
static_assert(sizeof(BackwardShared) == SHARED_BYTES, "the launcher counts otherwise");

struct Gradients {
    float carry[TILES][NT][4];       // c
    float weight[KS][NT][4];         // dW of this chunk, this warp's rows' share
    float q[TILES][4], k[TILES][4];  // 16 rows × 8 steps
    float v[KS][4];                  // V × 8 steps, this warp's rows' share
    float f[8];                      // this lane's share
};

struct Octet {  // 8 steps of the inputs, as operands
    RowSteps keys_outer[TILES], queries_outer[TILES], keys[TILES];
    ColumnSteps values_outer, dys_outer, values, dys;
    alignas(16) float f[8];
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

// Four neighbours, as float32 or in the inputs' dtype; the index is a multiple of 4.
__device__ __forceinline__ void store_quad(void* data, i64 index, const float4 x, bool as_float) {
    if (as_float || INPUT == 2) {
        *(float4*)((float*)data + index) = x;
    } else {
        store_pair(data, index, x.x, x.y);
        store_pair(data, index + 2, x.z, x.w);
    }
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
    Gradients& d, const Octet& in, int step, int m, const float (&h)[NT][4], const Packed& packed,
    const float (&z)[NT][4], const Packed& next, const Matrix& transposed_weight, int lane
) {
    const float f = in.f[step], g = 1.f - f;
    float(&carry)[NT][4] = d.carry[m];  // here it is G
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

    float dq[4] = {}, dk[4] = {}, dv[KS][4] = {};
    add_product(dk, dx_packed, in.values);
    add_column(d.k[m], dk, step, lane);
    add_product(dq, next, in.dys);
    add_column(d.q[m], dq, step, lane);
    Transposed dx_transposed, state_transposed;
    transpose(dx_transposed, dx_packed);
    add_transposed_product(dv, dx_transposed, in.keys[m]);
    transpose(state_transposed, packed);
#pragma unroll
    for (int k = 0; k < KS; k++) {
        add_column(d.v[k], dv[k], step, lane);
        float dweight[NT][4];
        start_sum(dweight, d.weight[k], 1.f);
#pragma unroll
        for (int n = 0; n < NT; n++)
            FOR_PARTS(i, j)
                mma16(dweight[n], state_transposed.part[i][k], dx_transposed.part[j][n / 2][n % 2],
                      dx_transposed.part[j][n / 2][n % 2 + 2]);
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

extern "C" __global__ void __launch_bounds__(THREADS) m2rnn_backward(const Backward p) {
    extern __shared__ __align__(16) char memory[];
    BackwardShared& shared = *(BackwardShared*)memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % WARPS, slot = thread / 32 / WARPS;
    const int slot_thread = thread % (32 * WARPS), row = 16 * TILES * warp;
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
    for (int i = lane; i < V * V; i += 32) dweight[i] = 0.f;
    __syncwarp();

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
#pragma unroll
        for (int m = 0; m < TILES; m++) load_state(d.carry[m], p.carry + state_offset, row + 16 * m, p.key_dim, lane);

        Start start[TILES];  // the states before the chunk whose inputs are on their way
        float next_f = 1.f;
        auto stage_chunk = [&](i64 first) {
            stage<CHUNK, ROWS, THREADS>(shared.q, q + first * p.q.time, p.q.time, first, begin, end, p.key_dim, thread);
            stage<CHUNK, ROWS, THREADS>(shared.k, k + first * p.k.time, p.k.time, first, begin, end, p.key_dim, thread);
            stage<CHUNK, V, 32 * WARPS>(shared.v[slot], v + first * p.v.time, p.v.time, first, begin, end, V, slot_thread);
            stage<CHUNK, V, 32 * WARPS>(shared.dy[slot], dy + first * p.dy.time, p.dy.time, first, begin, end, V, slot_thread);
            copies_issued();
            const i64 index = batch * ((p.steps - 1) / CHUNK) + first / CHUNK - 1;
#pragma unroll
            for (int m = 0; m < TILES; m++)
                if (first > begin)
                    start[m].load(p.saved + (index * p.heads + head) * p.key_dim * V, row + 16 * m, p.key_dim, lane);
            // f = 1 outside of the sequence leaves the carry as it is
            next_f = 1.f;
            if (slot_thread < CHUNK && first + slot_thread >= begin && first + slot_thread < end)
                next_f = ((const float*)p.f.data)[f_offset + (first + slot_thread) * p.f.time];
        };

        const i64 last_chunk = last_step / CHUNK * CHUNK;
        __syncthreads();  // the sequence before this one is done with the shared memory
        stage_chunk(last_chunk);
        for (i64 first = last_chunk; first + CHUNK > first_step; first -= CHUNK) {
            const int low = (int)(begin > first ? begin - first : 0);  // the chunk's steps in the sequence: [low, high)
            const int high = (int)(end - first < CHUNK ? end - first : CHUNK);
            if (slot_thread < CHUNK) shared.f[slot][slot_thread] = next_f;
            copies_done();
            __syncthreads();
            float h[TILES][NT][4];
            Packed packed[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                if (first > begin)
                    start[m].unpack(h[m]);
                else
                    load_state(h[m], p.initial ? p.initial + state_offset : nullptr, row + 16 * m, p.key_dim, lane);
                pack(packed[m], h[m]);
            }

            const u32 q_tile = shared_address(shared.q), k_tile = shared_address(shared.k);
            const u32 v_tile = shared_address(shared.v[slot]), dy_tile = shared_address(shared.dy[slot]);
#pragma unroll 1
            for (int octet = 0; octet < CHUNK; octet += 8) {
                if (octet + 8 <= low || octet >= high) continue;
                RowSteps keys[TILES];
                ColumnSteps values;
#pragma unroll
                for (int m = 0; m < TILES; m++) load_rows<CHUNK>(keys[m], k_tile, octet, row + 16 * m, true, lane);
                load_columns<CHUNK>(values, v_tile, octet, true, lane);
#pragma unroll UNROLLED
                for (int step = 0; step < 8; step++)
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        if (step % 2 == 0)
#pragma unroll
                            for (int i = 0; i < PARTS * KS; i++) {
                                Registers registers;
#pragma unroll
                                for (int r = 0; r < AREGS; r++) registers.value[r] = packed[m].part[i / KS][i % KS][r];
                                shared.kept[octet / 8][slot][warp].states[step / 2][m][i][lane] = registers;
                            }
                        float z[NT][4];
                        clear(z);
                        add_outer<CHUNK>(z, keys[m], values, octet, step, row + 16 * m, shared.k, shared.v[slot], lane);
                        update(z, packed[m], weight);
                        blend(h[m], z, shared.f[slot][octet + step]);
                        pack(packed[m], h[m]);
                    }
            }

#pragma unroll
            for (int k = 0; k < KS; k++) clear(d.weight[k]);
            Packed next[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++) next[m] = packed[m];
#pragma unroll 1
            for (int octet = CHUNK - 8; octet >= 0; octet -= 8) {
                if (octet + 8 <= low || octet >= high) continue;
                Octet in;
#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    load_rows<CHUNK>(in.keys_outer[m], k_tile, octet, row + 16 * m, true, lane);
                    load_rows<CHUNK>(in.queries_outer[m], q_tile, octet, row + 16 * m, true, lane);
                    load_rows<CHUNK>(in.keys[m], k_tile, octet, row + 16 * m, false, lane);
                }
                load_columns<CHUNK>(in.values_outer, v_tile, octet, true, lane);
                load_columns<CHUNK>(in.dys_outer, dy_tile, octet, true, lane);
                load_columns<CHUNK>(in.values, v_tile, octet, false, lane);
                load_columns<CHUNK>(in.dys, dy_tile, octet, false, lane);
                *(float4*)in.f = *(const float4*)&shared.f[slot][octet];
                *(float4*)(in.f + 4) = *(const float4*)&shared.f[slot][octet + 4];
#pragma unroll
                for (int i = 0; i < 8; i++) d.f[i] = 0.f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int m = 0; m < TILES; m++) d.q[m][i] = d.k[m][i] = 0.f;
#pragma unroll
                    for (int k = 0; k < KS; k++) d.v[k][i] = 0.f;
                }

                auto add_output_gradient = [&](int step, int m) {  // G = q dyᵀ + clamp(c)
#if CLIP
                    // Steps before the sequence leave the carry as it is: not clamped either
                    clamp(d.carry[m], octet + step >= low ? p.clip : __uint_as_float(0x7f800000u));
#endif
                    add_outer<CHUNK>(d.carry[m], in.queries_outer[m], in.dys_outer, octet, step, row + 16 * m, shared.q, shared.dy[slot], lane);
                };
#pragma unroll UNROLLED
                for (int step = 6; step >= 0; step -= 2)
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        Packed before, between;
#pragma unroll
                        for (int i = 0; i < PARTS * KS; i++) {
                            const Registers registers = shared.kept[octet / 8][slot][warp].states[step / 2][m][i][lane];
#pragma unroll
                            for (int r = 0; r < AREGS; r++) before.part[i / KS][i % KS][r] = registers.value[r];
                        }
                        float h0[NT][4], h1[NT][4], z0[NT][4], z1[NT][4];
                        unpack(h0, before);
                        clear(z0);
                        add_outer<CHUNK>(z0, in.keys_outer[m], in.values_outer, octet, step, row + 16 * m, shared.k, shared.v[slot], lane);
                        update(z0, before, weight);
#pragma unroll
                        for (int n = 0; n < NT; n++)
#pragma unroll
                            for (int i = 0; i < 4; i++) h1[n][i] = h0[n][i];
                        blend(h1, z0, in.f[step]);
                        pack(between, h1);
                        clear(z1);
                        add_outer<CHUNK>(z1, in.keys_outer[m], in.values_outer, octet, step + 1, row + 16 * m, shared.k, shared.v[slot], lane);
                        update(z1, between, weight);
                        add_output_gradient(step + 1, m);
                        step_back(d, in, step + 1, m, h1, between, z1, next[m], transposed_weight, lane);
                        add_output_gradient(step, m);
                        step_back(d, in, step, m, h0, before, z0, between, transposed_weight, lane);
                        next[m] = before;
                    }

                __syncwarp();  // every lane has read its states
                auto& out = shared.kept[octet / 8][slot][warp].gradients;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int step = 2 * (lane % 4) + i % 2, offset = lane / 4 + i / 2 * 8;
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        out.dq[step][16 * m + offset] = d.q[m][i];
                        out.dk[step][16 * m + offset] = d.k[m][i];
                    }
#pragma unroll
                    for (int k = 0; k < KS; k++)
                        if (16 * k + offset < V) out.dv[step][16 * k + offset] = d.v[k][i];
                }
                const float df = sum_lanes(d.f, lane);
                if (lane < 8) out.df[lane] = df;
            }
#pragma unroll
            for (int k = 0; k < KS; k++)
                for_pairs(lane, [&](int n, int i, int matrix_row, int column) {
                    if (16 * k + matrix_row >= V) return;
                    float2& sum = *(float2*)(dweight + (16 * k + matrix_row) * V + column);
                    sum = make_float2(sum.x + d.weight[k][n][i], sum.y + d.weight[k][n][i + 1]);
                });
            __syncthreads();
            if (first > first_step) stage_chunk(first - CHUNK);

#pragma unroll
            for (int j = 0; j < (CHUNK * ROWS / 4 + THREADS - 1) / THREADS; j++) {
                const int i = thread + j * THREADS, step = i / (ROWS / 4), channel = i % (ROWS / 4) * 4;
                if (step < low || step >= high || channel >= p.key_dim) continue;
                const int w = channel / (16 * TILES), column = channel % (16 * TILES);
                float4 dq = make_float4(0.f, 0.f, 0.f, 0.f), dk = dq;
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    const auto& part = shared.kept[step / 8][s][w].gradients;
                    add(dq, *(const float4*)&part.dq[step % 8][column]);
                    add(dk, *(const float4*)&part.dk[step % 8][column]);
                }
                store_quad(p.dq, q_offset + (first + step) * q_row + channel, dq, !q_final);
                store_quad(p.dk, k_offset + (first + step) * k_row + channel, dk, !k_final);
            }
#pragma unroll
            for (int j = 0; j < (CHUNK * V / 4 + 32 * WARPS - 1) / (32 * WARPS); j++) {
                const int i = slot_thread + j * 32 * WARPS, step = i / (V / 4), channel = i % (V / 4) * 4;
                if (step < low || step >= high) continue;
                float4 dv = make_float4(0.f, 0.f, 0.f, 0.f);
                float df = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    const auto& part = shared.kept[step / 8][slot][w].gradients;
                    add(dv, *(const float4*)&part.dv[step % 8][channel]);
                    df += part.df[step % 8];
                }
                const i64 at = head_offset + (first + step) * p.heads;
                store_quad(p.dv, at * V + channel, dv, p.dv_float);
                if (channel == 0) p.df[at] = df;
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++) store_state(d.carry[m], p.carry + state_offset, row + 16 * m, p.key_dim, lane);
    }

    __syncthreads();
    float* total = p.dweight + ((i64)unit_lane * p.heads + head) * V * V;
    for (int i = slot_thread; i < V * V; i += 32 * WARPS) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += shared.dweight[slot][w][i];
        total[i] += sum;
    }
    finish_slice(finished, slice);
}

// out[batch, window_begin + step] = Σ over groups of partial[group, batch, step], in the groups' order; four channels a
// thread, `row` channels in a step.
struct Sum {
    const float* partial;
    void* out;
    i64 steps, window_begin, window, batches;
    int groups, row;
};

extern "C" __global__ void m2rnn_sum(const Sum p) {
    const i64 index = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x), size = p.batches * p.window * p.row;
    if (index >= size) return;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int group = 0; group < p.groups; group++) add(sum, *(const float4*)(p.partial + group * size + index));
    const i64 batch = index / (p.window * p.row), rest = index % (p.window * p.row);
    const i64 to = (batch * p.steps + p.window_begin) * p.row + rest;
    store_quad(p.out, to, sum, false);
}
