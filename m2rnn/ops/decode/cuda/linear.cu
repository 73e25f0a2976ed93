// y = x Wᵀ for a few rows x, bound by the reading of W: a warp computes one output channel of all BATCH rows. A lane reads
// PIECES pieces of 16 bytes of a row of W at once.

#include "common.cuh"

struct Linear {
    const input_t* x;       // [BATCH, columns]
    const input_t* weight;  // [channels, columns]
    input_t* y;             // [BATCH, channels]
    int channels, columns;  // columns fill pieces of 16 bytes
};

#define WIDTH (16 / (int)sizeof(input_t))  // numbers in a piece

__device__ __forceinline__ void unpack(float (&x)[WIDTH], uint4 piece) {
    const u32 word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if INPUT == 0
        x[2 * i] = low_bf16(word[i]);
        x[2 * i + 1] = high_bf16(word[i]);
#elif INPUT == 1
        x[2 * i] = half_to_float((u16)word[i]);
        x[2 * i + 1] = half_to_float((u16)(word[i] >> 16));
#else
        x[i] = __uint_as_float(word[i]);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) m2rnn_linear(const Linear p) {
    const int lane = threadIdx.x % 32, channel = blockIdx.x * WARPS + threadIdx.x / 32;
    const int pieces = p.columns / WIDTH;
    const uint4* weight = (const uint4*)p.weight + (i64)channel * pieces;
    const uint4* x = (const uint4*)p.x;
#if __CUDA_ARCH__ >= 900
    // Programmatic dependent launch: the next kernel may begin, and this one fetches its weights before the kernels that
    // made x have ended; into L2, which is coherent
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (channel < p.channels)
        for (int i = 8 * lane; i < pieces; i += 8 * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + i));
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (channel >= p.channels) return;
    float sum[BATCH] = {};
    for (int first = lane; first - lane < pieces; first += 32 * PIECES) {
        uint4 w[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            w[i] = first + 32 * i < pieces ? weight[first + 32 * i] : make_uint4(0, 0, 0, 0);
        __syncwarp();  // so that the compiler issues all loads before their use
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            uint4 other[PIECES];
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                other[i] = first + 32 * i < pieces ? x[b * pieces + first + 32 * i] : make_uint4(0, 0, 0, 0);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                float left[WIDTH], right[WIDTH];
                unpack(left, w[i]);
                unpack(right, other[i]);
#pragma unroll
                for (int j = 0; j < WIDTH; j++) sum[b] = fmaf(left[j], right[j], sum[b]);
            }
        }
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
#pragma unroll
        for (int other = 16; other > 0; other /= 2) sum[b] += __shfl_xor_sync(0xffffffffu, sum[b], other);
        if (lane == 0) {
            const i64 to = (i64)b * p.channels + channel;
#if INPUT == 0
            p.y[to] = (u16)pack_bf16(sum[b], 0.f);
#elif INPUT == 1
            p.y[to] = float_to_half(sum[b]);
#else
            p.y[to] = sum[b];
#endif
        }
    }
}
