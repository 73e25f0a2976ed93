// One token of an M2RNN layer between its two projections, in one launch: convolution, forget gate, recurrence, D, output
// gate and RMSNorm.
//
// A cluster of blocks takes one sequence, each block a run of its heads: many blocks for a few sequences, which wait for
// one another only for the norm's sum of squares, and one block for each of many sequences. Every block convolves the
// channels that its heads read; the convolution's state is written once all blocks of the cluster have read theirs.
//
// The macros besides common.cuh's: WARPS is warps a block, TILES tiles of 16 rows that a warp takes at a time (a unit),
// GROUPS units a head, WIDTH the convolution's taps (0: none).

#include "common.cuh"

struct Step {
    const input_t* row;         // [B, row_stride]: q, k, v, forget logits, g
    const float* state;         // [B, heads, key_dim, V]
    float* new_state;           // may be the same, like new_conv
    const input_t* conv;        // [B, WIDTH - 1, channels of q, k, v]
    input_t* new_conv;
    const input_t* conv_weight;  // [channels, WIDTH]
    const input_t* conv_bias;    // [channels] or null
    const input_t* weight;       // [weight_heads, V, V]
    const float* A_log;          // [f_heads]
    const float* dt_bias;        // [f_heads]
    const input_t* D;            // [heads, V] or null
    const input_t* norm;         // [heads, V] or null
    input_t* y;                  // [B, heads, V]
    i64 row_stride;
    float eps;
    int heads, key_dim, block_heads, silu, prefetch;
    int q_heads, k_heads, v_heads, f_heads, g_heads, weight_heads;  // g_heads is 0 without an output gate
    float q_ratio, k_ratio, v_ratio, f_ratio, g_ratio, weight_ratio;  // heads of each / heads
};

// The head that one of the state's heads reads: head * count / heads, without the slow division.
__device__ __forceinline__ int source(int head, float ratio) { return (int)((head + 0.5f) * ratio); }

// ------------------------------------------------------------------------------- blocks of a cluster, and kernels

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_size() {
    int x;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
    return x;
}
// Orders no memory accesses: what is read before has arrived, since it was used.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Floats that the blocks of a cluster send one another, one each.
struct alignas(8) Mailbox {
    unsigned long long barrier;
    float values[16];
};
__device__ __forceinline__ u32 shared_address_of(const void* x) { return (u32)__cvta_generic_to_shared(x); }
__device__ __forceinline__ void open(Mailbox& box, int senders) {
    const u32 barrier = shared_address_of(&box.barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(senders * 4) : "memory");
}
__device__ __forceinline__ void send(Mailbox& box, int sender, int receiver, float x) {
    u32 value, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(value) : "r"(shared_address_of(&box.values[sender])), "r"(receiver));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address_of(&box.barrier)), "r"(receiver));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(value), "f"(x), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void wait_for_all(Mailbox& box) {
    u32 arrived;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
            : "=r"(arrived) : "r"(shared_address_of(&box.barrier)) : "memory");
    } while (!arrived);
}

// Programmatic dependent launch: the next kernel may begin, up to where it waits for all that came before it to end.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
struct Mailbox {
    float values[16];
};
__device__ __forceinline__ void open(Mailbox&, int) {}
__device__ __forceinline__ void send(Mailbox&, int, int, float) {}
__device__ __forceinline__ void wait_for_all(Mailbox&) {}
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void wait_for_previous() {}
#endif

// Into L2, which is coherent, so that it may be done before the previous kernels have ended.
__device__ __forceinline__ void prefetch(const void* data, i64 bytes, int thread, int threads) {
    if (!data) return;
    for (i64 i = (i64)thread * 128; i < bytes; i += (i64)threads * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)data + i));
}

__device__ __forceinline__ float as_float(const input_t* x, i64 index) {
#if INPUT == 0
    return low_bf16(x[index]);
#elif INPUT == 1
    return half_to_float(x[index]);
#else
    return x[index];
#endif
}
__device__ __forceinline__ void store(input_t* x, i64 index, float value) {
#if INPUT == 0
    x[index] = (u16)pack_bf16(value, 0.f);
#elif INPUT == 1
    x[index] = float_to_half(value);
#else
    x[index] = value;
#endif
}
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// ---------------------------------------------------------------------------------------------- units of a state

// The column that is column c of accumulator tile n. Two tiles share 16 columns so that a lane's four are neighbours: one
// access of 16 bytes. The rows of W, the contracted dimension, are permuted in the same way.
__device__ __forceinline__ constexpr int column(int n, int c) {
    return V == 8 ? c : 16 * (n / 2) + c / 2 * 4 + n % 2 * 2 + c % 2;
}

#define HELD (V <= 16 ? NT : 1)  // tiles of W that are loaded ahead, with the state

struct Columns {
    input_t element[KS][2 * WREGS];  // a lane's part of one column tile of W, as the operand B
};
struct Unit {
    float h[TILES][NT][4];
    Columns w[HELD];
};

__device__ __forceinline__ void load_columns(Columns& w, const input_t* weight, int n, int lane) {
#pragma unroll
    for (int k = 0; k < KS; k++)
#pragma unroll
        for (int r = 0; r < 2 * WREGS; r++)
            w.element[k][r] = weight[column(2 * k + r / 2, 2 * (lane % 4) + r % 2) * V + column(n, lane / 4)];
}

// Calls what(offset, h of the first tile, h of the second, i) for each access to a unit's state: h[i] and h[i + 1] of both.
template <typename F>
__device__ __forceinline__ void for_accesses(Unit& unit, int first_row, int rows, int lane, F what) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            if (row < rows)
#pragma unroll
                for (int n = 0; n < NT; n += 2)
                    what(row * V + column(n, 2 * (lane % 4)), unit.h[m][n], unit.h[m][V == 8 ? 0 : n + 1], 2 * half);
        }
}

__device__ __forceinline__ void load_unit(Unit& unit, const float* state, int first_row, int rows, int lane) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) unit.h[m][n][i] = 0.f;
    for_accesses(unit, first_row, rows, lane, [&](int offset, float* a, float* b, int i) {
#if V == 8
        const float2 x = *(const float2*)(state + offset);
        a[i] = x.x, a[i + 1] = x.y;
#else
        const float4 x = *(const float4*)(state + offset);
        a[i] = x.x, a[i + 1] = x.y, b[i] = x.z, b[i + 1] = x.w;
#endif
    });
}
__device__ __forceinline__ void store_unit(Unit& unit, float* state, int first_row, int rows, int lane) {
    for_accesses(unit, first_row, rows, lane, [&](int offset, float* a, float* b, int i) {
#if V == 8
        *(float2*)(state + offset) = make_float2(a[i], a[i + 1]);
#else
        *(float4*)(state + offset) = make_float4(a[i], a[i + 1], b[i], b[i + 1]);
#endif
    });
}

// The step itself. The unit's share of Hᵀ q goes to y [V].
__device__ __forceinline__ void advance(
    Unit& unit, const float* q, const float* k, const float* v, float f, const input_t* weight, int first_row, int rows,
    float* y, int lane
) {
    Packed packed[TILES];
    float queries[TILES][2], keys[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        pack(packed[m], unit.h[m]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            queries[m][half] = row < rows ? q[row] : 0.f;
            keys[m][half] = row < rows ? k[row] : 0.f;
        }
    }
    const float g = 1.f - f;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#if V > 16
        __syncwarp();  // or the compiler loads all of W at once and runs out of registers
        load_columns(unit.w[0], weight, n, lane);
#endif
        const Columns& held = unit.w[HELD < NT ? 0 : n];
        u32 w[KS][WREGS][PARTS];
#pragma unroll
        for (int j = 0; j < KS; j++)
#pragma unroll
            for (int r = 0; r < WREGS; r++)
                split(as_float(&held.element[j][2 * r], 0), as_float(&held.element[j][2 * r + 1], 0), w[j][r]);

        const int to = column(n, 2 * (lane % 4));
        const float value[2] = {v[to], v[to + 1]};
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float z[4];
#pragma unroll
            for (int i = 0; i < 4; i++) z[i] = keys[m][i / 2] * value[i % 2];
            FOR_PARTS(a, b)
#pragma unroll
                for (int j = 0; j < KS; j++) {
#if V == 8
                    mma8(z, packed[m].part[a][j][0], packed[m].part[a][j][1], w[j][0][b]);
#else
                    mma16(z, packed[m].part[a][j], w[j][0][b], w[j][1][b]);
#endif
                }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& h = unit.h[m][n][i];
                h = fmaf(f, h, g * tanh_of(z[i]));
                // Rows beyond K may hold anything, such as the NaN of an infinite v
                if (first_row + 16 * m + 8 * (i / 2) + lane / 4 < rows) sum[i % 2] = fmaf(queries[m][i / 2], h, sum[i % 2]);
            }
        }
#pragma unroll
        for (int other = 4; other < 32; other *= 2)
#pragma unroll
            for (int e = 0; e < 2; e++) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], other);
        if (lane < 4) y[to] = sum[0], y[to + 1] = sum[1];
    }
}

// -------------------------------------------------------------------------------------------------- the kernel

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) m2rnn_step(const Step p) {
    extern __shared__ float memory[];
    __shared__ float warp_sums[WARPS];
    __shared__ Mailbox block_sums;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int size = cluster_size(), rank = blockIdx.x % size;
    const i64 batch = blockIdx.x / size;
    const int K = p.key_dim, first = min(p.heads, rank * p.block_heads), count = min(p.block_heads, p.heads - first);
    const int units = count * GROUPS, channels = count * V;
    const int k_begin = p.q_heads * K, v_begin = k_begin + p.k_heads * K, f_begin = v_begin + p.v_heads * V;
    const int conv_channels = f_begin, g_begin = f_begin + p.f_heads;

    // The sources of this block's heads: the first one and how many channels
    const int last = first + count - 1;
    const int q_first = source(first, p.q_ratio), q_size = count ? (source(last, p.q_ratio) + 1 - q_first) * K : 0;
    const int k_first = source(first, p.k_ratio), k_size = count ? (source(last, p.k_ratio) + 1 - k_first) * K : 0;
    const int v_first = source(first, p.v_ratio), v_size = count ? (source(last, p.v_ratio) + 1 - v_first) * V : 0;
    float* const q = memory;
    float* const k = q + q_size;
    float* const v = k + k_size;
    float* const f = v + v_size;
    float* const gate = f + count;       // [channels], so are D and norm
    float* const D = gate + channels;
    float* const norm = D + channels;
    float* const y = norm + channels;    // [GROUPS, channels]

    const input_t* row = p.row + batch * p.row_stride;
    const input_t* conv = p.conv + batch * (WIDTH - 1) * conv_channels;
    const i64 state_offset = (batch * p.heads + first) * K * V;
    const float* state = p.state + state_offset;
    float* new_state = p.new_state + state_offset;

    let_next_begin();
    if (size > 1 && thread == 0) open(block_sums, size);
    if (p.prefetch) {
        const int index = rank * THREADS + thread, total = size * THREADS;
        prefetch(p.state + batch * p.heads * K * V, (i64)p.heads * K * V * sizeof(float), index, total);
        prefetch(p.weight, (i64)p.weight_heads * V * V * sizeof(input_t), index, total);
        if (WIDTH) prefetch(p.conv_weight, (i64)conv_channels * WIDTH * sizeof(input_t), index, total);
        if (WIDTH) prefetch(conv, (i64)conv_channels * (WIDTH - 1) * sizeof(input_t), index, total);
        prefetch(p.D, p.heads * V * sizeof(input_t), index, total);
        prefetch(p.norm, p.heads * V * sizeof(input_t), index, total);
    }
    wait_for_previous();

    Unit unit;
    int u = warp;
    auto weight_of = [&](int u) { return p.weight + (i64)source(first + u / GROUPS, p.weight_ratio) * V * V; };
    auto load = [&] {
        load_unit(unit, state + (i64)(u / GROUPS) * K * V, u % GROUPS * 16 * TILES, K, lane);
        if (HELD == NT)
#pragma unroll
            for (int n = 0; n < HELD; n++) load_columns(unit.w[n], weight_of(u), n, lane);
    };
    if (u < units) load();

    // What comes of the projected row: source i, gate of channel i and forget gate i, with all loads before the first use
    const int sources = q_size + k_size + v_size;
    for (int i = thread; i < max(sources, channels); i += THREADS) {
        const int s = min(i, sources - 1), c = min(i, channels - 1), n = min(i, count - 1);
        const int channel = s < q_size            ? q_first * K + s
                            : s < q_size + k_size ? k_begin + k_first * K + s - q_size
                                                  : v_begin + v_first * V + s - q_size - k_size;
        const int f_source = source(first + n, p.f_ratio), g_source = source(first + c / V, p.g_ratio);
        input_t taps[WIDTH + 1], filter[WIDTH + 1];
        taps[WIDTH] = row[channel];
#pragma unroll
        for (int tap = 0; tap < WIDTH - 1; tap++) taps[tap] = conv[tap * conv_channels + channel];
#pragma unroll
        for (int tap = 0; tap < WIDTH; tap++) filter[tap] = p.conv_weight[(i64)channel * WIDTH + tap];
        const float bias = WIDTH && p.conv_bias ? as_float(p.conv_bias, channel) : 0.f;
        const float logit = as_float(row, f_begin + f_source) + p.dt_bias[f_source], A_log = p.A_log[f_source];
        const float g = p.g_heads ? as_float(row, g_begin + g_source * V + c % V) : 0.f;
        const float d = p.D ? as_float(p.D, first * V + c) : 0.f;
        const float scale = p.norm ? as_float(p.norm, first * V + c) : 1.f;

        if (i < sources) {
            float x = as_float(taps, WIDTH);
#if WIDTH
            x = fmaf(x, as_float(filter, WIDTH - 1), bias);
#pragma unroll
            for (int tap = WIDTH - 2; tap >= 0; tap--) x = fmaf(as_float(taps, tap), as_float(filter, tap), x);
#endif
            q[i] = p.silu ? silu(x) : x;
        }
        if (i < channels) {
            gate[i] = p.g_heads ? silu(g) : 1.f;
            D[i] = d;
            norm[i] = scale;
        }
        if (i < count) f[i] = expf(-expf(A_log) * (logit > 20.f ? logit : log1pf(expf(logit))));
    }
    __syncthreads();
    if (size > 1) cluster_arrive();

    while (u < units) {
        const int i = u / GROUPS, head = first + i, first_row = u % GROUPS * 16 * TILES;
        advance(
            unit, q + (source(head, p.q_ratio) - q_first) * K, k + (source(head, p.k_ratio) - k_first) * K,
            v + (source(head, p.v_ratio) - v_first) * V, f[i], weight_of(u), first_row, K,
            y + u % GROUPS * channels + i * V, lane
        );
        store_unit(unit, new_state + (i64)i * K * V, first_row, K, lane);
        u += WARPS;
        if (u < units) load();
    }
    __syncthreads();

    float square = 0.f;
    for (int i = thread; i < channels; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) sum += y[group * channels + i];
        if (p.D) sum = fmaf(D[i], v[(source(first + i / V, p.v_ratio) - v_first) * V + i % V], sum);
        sum *= gate[i];
        y[i] = sum;
        square = fmaf(sum, sum, square);
    }
    if (size > 1) cluster_wait();  // all blocks have begun, and have read the convolution's state
    float scale = 1.f;
    if (p.norm) {  // every sum in one order, whatever runs first
#pragma unroll
        for (int other = 16; other > 0; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
        if (lane == 0) warp_sums[warp] = square;
        __syncthreads();
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += warp_sums[w];
        if (size > 1) {
            if (thread < size) send(block_sums, rank, thread, total);
            wait_for_all(block_sums);
            total = 0.f;
            for (int block = 0; block < size; block++) total += block_sums.values[block];
        }
        scale = 1.f / sqrtf(total / (p.heads * V) + p.eps);
    }
    for (int i = thread; i < channels; i += THREADS)
        store(p.y, (batch * p.heads + first) * V + i, y[i] * scale * norm[i]);

#if WIDTH > 1
    input_t* new_conv = p.new_conv + batch * (WIDTH - 1) * conv_channels;
    for (int channel = rank * THREADS + thread; channel < conv_channels; channel += size * THREADS) {
        input_t kept[WIDTH - 1];
#pragma unroll
        for (int tap = 1; tap < WIDTH - 1; tap++) kept[tap - 1] = conv[tap * conv_channels + channel];
        kept[WIDTH - 2] = row[channel];
#pragma unroll
        for (int tap = 0; tap < WIDTH - 1; tap++) new_conv[tap * conv_channels + channel] = kept[tap];
    }
#endif
}
