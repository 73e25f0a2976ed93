// Whether the clamp on the state's gradient can have anything to do in 8 steps.

// Then the loop over 8 steps is there twice, with the clamp and without: a branch in each step would keep the compiler from
// interleaving them. At V = 32 the code would exceed the instruction cache.
#define BOUNDED (CLIP && PARTS == 1 && V <= 16)

#if BOUNDED
__device__ __forceinline__ float max_or_nan(float a, float b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}
__device__ __forceinline__ float largest(const uint4* x, int count) {  // of bfloat16, by magnitude; NaN if there is one
    u32 pair = 0;
#pragma unroll
    for (int i = 0; i < count; i++) {
        const u32 pairs[] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(pairs[j] & 0x7fff7fffu));
    }
    return max_or_nan(low_bf16(pair), high_bf16(pair));
}

// Not less than the largest singular value σ of W as bfloat16 has it, and hardly more than 1.02 V^(1/16) σ: ‖(W Wᵀ)⁴‖^(1/8),
// in the norm of all numbers. The roundings of two products to bfloat16 take at most 1.2 % from it.
__device__ __forceinline__ float largest_singular_value(const Matrix& transposed_weight) {
    Matrix m = transposed_weight;  // as operand A it is W, and later a symmetric matrix as either
    float x[NT][4];
#pragma unroll
    for (int power = 0; power < 3; power++) {
        Packed a = {};
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < WREGS; r++) a.part[0][0][2 * r + n] = m.part[0][0][n][r];
        clear(x);
        multiply(x, a, m);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < WREGS; r++) m.part[0][0][n][r] = pack_bf16(x[r][2 * n], x[r][2 * n + 1]);
    }
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(x[n][i], x[n][i], sum);
#pragma unroll
    for (int width = 1; width < 32; width *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
    return 1.02f * sqrtf(sqrtf(sqrtf(sqrtf(sum))));
}

// Up to which |c| the clamp has nothing to do in an octet of the staged chunk; lanes 8 i to 8 i + 7 return that of octet i.
// Where 0 ≤ f ≤ 1, a step takes the norm of a row of G = q dyᵀ + c to at most f + (1 - f) σ times as much, σ ≥ 1 not less than
// W's largest singular value; 1.02 leaves room for roundings. A row's norm is at most √V times its largest number. NaN if f
// is something else, or for NaN.
__device__ __forceinline__ float unclamped_limit(
    const char* q, const char* dy, const float* f, float sigma, float limit, int row, int lane
) {
    const bool inside = f[lane] >= 0.f && f[lane] <= 1.f;
    float growth = inside ? 1.02f * fmaf(1.f - f[lane], sigma, f[lane]) : __uint_as_float(0x7fc00000u);
    float largest_q = largest((const uint4*)(q + 2 * (lane * (ROWS + PAD) + row)), 2);
    float largest_dy = largest((const uint4*)(dy + 2 * lane * (V + PAD)), V / 8);
#pragma unroll
    for (int width = 1; width < 8; width *= 2) {
        growth *= __shfl_xor_sync(0xffffffffu, growth, width);
        largest_q = max_or_nan(largest_q, __shfl_xor_sync(0xffffffffu, largest_q, width));
        largest_dy = max_or_nan(largest_dy, __shfl_xor_sync(0xffffffffu, largest_dy, width));
    }
    constexpr float root = V == 8 ? 2.83f : 4.f;
    return __fdividef(limit, root * growth) - 8.f * largest_q * largest_dy;
}
__device__ __forceinline__ bool within(const float (&x)[NT][4], float limit) {
    float largest = 0.f;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) largest = max_or_nan(largest, fabsf(x[n][i]));
    return __all_sync(0xffffffffu, largest <= limit);
}
#endif
