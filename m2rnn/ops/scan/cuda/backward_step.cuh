// One step back of a tile of 16 rows: the equations of backward.cu, and what a warp keeps of a step in shared memory.

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

struct Gradients {
    float carry[NT][4];       // c
    float weight[KS][NT][4];  // dWᵀ of this chunk, this warp's rows' share
    float f[8];               // of 8 steps, this lane's share
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
            const float grad = carry[n][i];
            df[i % 2] = fmaf(grad, h[n][i] - z[n][i], df[i % 2]);
            dx[n][i] = grad * fmaf(-g * z[n][i], z[n][i], g);
        }
    d.f[step] = df[0] + df[1];
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
