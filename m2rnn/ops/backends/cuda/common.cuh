// What both passes share: types, fragments of the tensor cores' operands, and the staging of inputs in shared memory.
//
// The macros V (value channels), WARPS (a head, 16 state rows each), SLOTS (heads a block), CHUNK (steps
// between saved states), INPUT (0 bfloat16, 1 float16, 2 float32) and PARTS are the launcher's; f, W and states are float32.
// Only files of this folder are included, by compiler.py, so that NVRTC needs no headers.
//
// A number that goes through the tensor cores is the sum of PARTS bfloat16 numbers: 1 for bfloat16 inputs, 2 for
// float16 (16 bits) and for few steps, 3 for float32 (24 bits). Products of parts are exact and summed in float32, but
// rounded towards zero: what is summed over many steps is added elsewhere.
//
// A tile is 16 rows of one head's state, and one warp owns it. A lane holds, of each 8 columns, two neighbours in row
// `lane / 4` and two in the row 8 below: the layout of a tensor-core accumulator, which packed to bfloat16 is the layout
// of the operand A of the next step. So the state never leaves the registers.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define NT (V / 8)            // accumulator tiles of 8 columns across the state
#define KS ((V + 15) / 16)    // operand tiles of 16 columns across the state
#define WREGS (V == 8 ? 1 : 2)
#define AREGS (V == 8 ? 2 : 4)
#define ROWS (16 * WARPS)  // rows of the state, padded to whole tiles
#define THREADS (32 * WARPS * SLOTS)
#define PAD 8                 // after each row of a staged tile, so that ldmatrix meets no bank conflict

#if INPUT == 0
typedef u16 input_t;
#elif INPUT == 1
typedef u16 input_t;
#else
typedef float input_t;
#endif

constexpr int UNROLLED = PARTS == 1 && V <= 32 ? 8 : 1;  // steps, where it pays for the time to compile

struct Strided {
    const void* data;
    i64 batch, time, head;  // strides in elements; the channels' is 1
    int repeat;             // heads of the state that read the same head of this tensor
};

// ------------------------------------------------------------------------------------------------ conversions

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ float low_bf16(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_bf16(u32 x) { return __uint_as_float(x & 0xffff0000u); }

__device__ __forceinline__ float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float load_as_float(const input_t* data, i64 index) {
#if INPUT == 0
    return __uint_as_float((u32)data[index] << 16);
#elif INPUT == 1
    return half_to_float(data[index]);
#else
    return data[index];
#endif
}
// Two neighbours in the inputs' dtype; the index is even.
__device__ __forceinline__ void store_pair(void* data, i64 index, float a, float b) {
#if INPUT == 0
    *(u32*)((u16*)data + index) = pack_bf16(a, b);
#elif INPUT == 1
    *(u32*)((u16*)data + index) = (u32)float_to_half(a) | (u32)float_to_half(b) << 16;
#else
    *(float2*)((float*)data + index) = make_float2(a, b);
#endif
}

// parts[i] holds the i-th bfloat16 part of both numbers.
__device__ __forceinline__ void split(float low, float high, u32 (&parts)[PARTS]) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        parts[i] = pack_bf16(low, high);
        low -= low_bf16(parts[i]);
        high -= high_bf16(parts[i]);
    }
}

__device__ __forceinline__ float tanh_of(float x) {
#if PARTS == 1
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return tanhf(x);
#endif
}

// Clamps to [-limit, limit]; a NaN stays a NaN. Gradients rarely reach the limit, and to test for that is cheaper.
__device__ __forceinline__ void clamp(float (&x)[NT][4], float limit) {
    float sum[2];  // two chains of additions are quicker than one
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] = fabsf(x[0][2 * i]) + fabsf(x[0][2 * i + 1]);
#pragma unroll
        for (int n = 1; n < NT; n++) sum[i] += fabsf(x[n][2 * i]) + fabsf(x[n][2 * i + 1]);
    }
    if (__any_sync(0xffffffffu, !(sum[0] + sum[1] <= limit)))
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                asm("max.NaN.f32 %0, %0, %1;" : "+f"(x[n][i]) : "f"(-limit));
                asm("min.NaN.f32 %0, %0, %1;" : "+f"(x[n][i]) : "f"(limit));
            }
}

// ---------------------------------------------------------------------------------------------- tensor cores

__device__ __forceinline__ void mma16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma8(float (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// The products of parts i and j with i + j < PARTS, smallest first.
#define FOR_PARTS(i, j)                                   \
    _Pragma("unroll") for (int sum_ = PARTS - 1; sum_ >= 0; sum_--) \
        _Pragma("unroll") for (int i = 0, j = sum_; i <= sum_; i++, j--)

struct Packed {
    u32 part[PARTS][KS][AREGS];  // 16 × V, as the operand A
};
struct Matrix {
    u32 part[PARTS][KS][NT][WREGS];  // V × V, as the operand B
};

__device__ __forceinline__ void pack(Packed& packed, const float (&x)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 parts[PARTS];
            split(x[n][2 * half], x[n][2 * half + 1], parts);
#pragma unroll
            for (int p = 0; p < PARTS; p++) packed.part[p][n / 2][2 * (n % 2) + half] = parts[p];
        }
}

// x += A M for a 16 × V tile A and a V × V matrix M.
__device__ __forceinline__ void multiply(float (&x)[NT][4], const Packed& a, const Matrix& m) {
#pragma unroll
    for (int n = 0; n < NT; n++)
        FOR_PARTS(i, j)
#pragma unroll
            for (int k = 0; k < KS; k++) {
#if V == 8
                mma8(x[n], a.part[i][k][0], a.part[i][k][1], m.part[j][k][n][0]);
#else
                mma16(x[n], a.part[i][k], m.part[j][k][n][0], m.part[j][k][n][1]);
#endif
            }
}

__device__ __forceinline__ void load_matrix(Matrix& m, const float* weight, bool transposed, int lane) {
#pragma unroll
    for (int k = 0; k < KS; k++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < WREGS; r++) {
                const int row = 16 * k + 8 * r + 2 * (lane % 4), column = 8 * n + lane / 4;
                const float low = transposed ? weight[column * V + row] : weight[row * V + column];
                const float high = transposed ? weight[column * V + row + 1] : weight[(row + 1) * V + column];
                u32 parts[PARTS];
                split(low, high, parts);
#pragma unroll
                for (int p = 0; p < PARTS; p++) m.part[p][k][n][r] = parts[p];
            }
}

// The transpose of a 16 × V tile, as operands A of 16 columns' (here rows') tiles: V × 16.
struct Transposed {
    u32 part[PARTS][KS][4];
};
__device__ __forceinline__ u32 transpose8(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ void transpose(Transposed& t, const Packed& a) {
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int k = 0; k < KS; k++) {
            t.part[p][k][0] = transpose8(a.part[p][k][0]);
            t.part[p][k][2] = transpose8(a.part[p][k][1]);
#if V == 8
            t.part[p][k][1] = t.part[p][k][3] = 0;
#else
            t.part[p][k][1] = transpose8(a.part[p][k][2]);
            t.part[p][k][3] = transpose8(a.part[p][k][3]);
#endif
        }
}

// ------------------------------------------------------------------------------------- operands over 8 time steps
//
// An outer product of one step's vectors is a product over 8 steps of which all but one are zero; of the product of one
// step's matrix with the vectors of all 8, one column is kept. So vectors come straight in the operands' layouts.

__device__ __forceinline__ void ldmatrix2(u32& a, u32& b, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(address));
}
__device__ __forceinline__ void ldmatrix1(u32& a, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(a) : "r"(address));
}
__device__ __forceinline__ void ldmatrix2_transposed(u32* x, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address));
}
__device__ __forceinline__ void ldmatrix4_transposed(u32* x, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

// 16 state rows × 8 steps, of a staged tile [steps][ROWS]: the operand B of a product over the rows.
struct RowSteps {
    u32 part[PARTS][2];
};
// V columns × 8 steps, of a staged tile [steps][V]: the operand B of a product over the columns.
struct ColumnSteps {
    u32 part[PARTS][NT];
};
// One step's vectors, 16 rows and V columns: operands A and B of a product over 8 steps.
struct Outer {
    u32 part[PARTS][(2 + NT + 3) / 4 * 4];
};

// The address of a number of a tile [PARTS][CHUNK][stride].
__device__ __forceinline__ u32 tile_row(u32 tile, int part, int stride, int step, int column) {
    return tile + 2 * ((part * CHUNK + step) * stride + column);
}
__device__ __forceinline__ void load_rows(RowSteps& x, u32 tile, int step, int row, int lane) {
#pragma unroll
    for (int p = 0; p < PARTS; p++)
        ldmatrix2(x.part[p][0], x.part[p][1], tile_row(tile, p, ROWS + PAD, step + lane % 8, row + lane / 8 % 2 * 8));
}
__device__ __forceinline__ void load_columns(ColumnSteps& x, u32 tile, int step, int lane) {
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            const u32 address =
                tile_row(tile, p, V + PAD, step + lane % 8, 8 * n + (V == 8 ? 0 : lane / 8 % 2 * 8));
#if V == 8
            ldmatrix1(x.part[p][n], address);
#else
            ldmatrix2(x.part[p][n], x.part[p][n + 1], address);
#endif
        }
}

// One step's vectors. Each lane says with here(part, matrix) where its row of an 8 × 8 matrix begins, the k of 8 steps in
// the first two matrices and v in the others, and with zeros(part) where 16 bytes of zeros are. That is what the other steps
// read, in both operands, since 0 · NaN is not 0.
template <typename Here, typename Zeros>
__device__ __forceinline__ void load_outer(Outer& x, int step, int lane, Here here, Zeros zeros) {
#if PARTS < 3
    constexpr int matrices = 2 + NT;  // of 8 × 8, four at a time
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < matrices; i += 4) {
            const u32 address = lane % 8 == step ? here(p, i + lane / 8) : zeros(p);
            if (matrices - i > 2)
                ldmatrix4_transposed(x.part[p] + i, address);
            else
                ldmatrix2_transposed(x.part[p] + i, address);
        }
#endif
}

// A number of a staged tile.
__device__ __forceinline__ float tile_value(const char* tile, int stride, int step, int column) {
    float sum = 0.f;
#pragma unroll
    for (int p = PARTS - 1; p >= 0; p--)
        sum += __uint_as_float((u32)((const u16*)tile)[(p * CHUNK + step) * stride + column] << 16);
    return sum;
}

// x += r cᵀ. In three parts a product that overflows would be inf - inf, so float32 takes the
// numbers themselves, of step `time` of the staged tiles.
template <int ROW_STRIDE = ROWS + PAD, int COLUMN_STRIDE = V + PAD>
__device__ __forceinline__ void add_outer(
    float (&x)[NT][4], const Outer& outer, int time, int row, const char* row_tile, const char* column_tile, int lane
) {
#if PARTS == 3
    const float upper = tile_value(row_tile, ROW_STRIDE, time, row + lane / 4);
    const float lower = tile_value(row_tile, ROW_STRIDE, time, row + lane / 4 + 8);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float column = tile_value(column_tile, COLUMN_STRIDE, time, 8 * n + 2 * (lane % 4) + i);
            x[n][i] = fmaf(upper, column, x[n][i]);
            x[n][i + 2] = fmaf(lower, column, x[n][i + 2]);
        }
#else
#pragma unroll
    for (int n = 0; n < NT; n++)
        FOR_PARTS(i, j)
            mma8(x[n], outer.part[i][0], outer.part[i][1], outer.part[j][2 + n]);
#endif
}

// y (V × 8 steps) += Aᵀ r for the r of all 8 steps, of which one belongs to A.
__device__ __forceinline__ void add_transposed_product(float (&y)[KS][4], const Transposed& a, const RowSteps& rows) {
#pragma unroll
    for (int k = 0; k < KS; k++)
        FOR_PARTS(i, j)
            mma16(y[k], a.part[i][k], rows.part[j][0], rows.part[j][1]);
}

// y (16 rows × 8 steps) += A c for the c of all 8 steps, of which one belongs to A.
__device__ __forceinline__ void add_product(float (&y)[4], const Packed& a, const ColumnSteps& columns) {
    FOR_PARTS(i, j)
#pragma unroll
        for (int k = 0; k < KS; k++) {
#if V == 8
            mma8(y, a.part[i][k][0], a.part[i][k][1], columns.part[j][0]);
#else
            mma16(y, a.part[i][k], columns.part[j][2 * k], columns.part[j][2 * k + 1]);
#endif
        }
}

// -------------------------------------------------------------------------------------------------- staging

__device__ const float one = 1.f;  // f outside of a sequence

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

template <int BYTES>
__device__ __forceinline__ void copy(void* to, const void* from, bool valid) {
    const int bytes = valid ? BYTES : 0;  // the rest is filled with zeros
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                     "r"(bytes)
                     : "memory");
}
__device__ __forceinline__ void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// A piece of a tensor's step, 16 bytes of bfloat16 or two numbers, to its place in a tile [PARTS][CHUNK][STRIDE] of bfloat16;
// zeros if it is not valid.
template <int STRIDE>
__device__ __forceinline__ void stage_piece(char* tile, const input_t* from, bool valid, u32 step, u32 column) {
#if PARTS == 1
    copy<16>(tile + 2 * (step * STRIDE + column), from, valid);
#else
    u32 parts[PARTS];
    split(valid ? load_as_float(from, 0) : 0.f, valid ? load_as_float(from, 1) : 0.f, parts);
#pragma unroll
    for (int p = 0; p < PARTS; p++) *(u32*)(tile + 2 * ((p * CHUNK + step) * STRIDE + column)) = parts[p];
#endif
}

template <int STRIDE>
__device__ constexpr int tile_bytes() {
    return PARTS * CHUNK * STRIDE * 2;
}

// --------------------------------------------------------------------------------------------------- slices
//
// Where heads do not divide evenly among the multiprocessors, time is cut into slices, a block for each: the state goes
// from one slice's block to the next through global memory, and whichever multiprocessor is free takes the next block.
// Blocks start in the order of their index, so the one that a block waits for has started before it.

__device__ __forceinline__ void wait_until(const u32* counter, u32 count) {
    if (threadIdx.x == 0) {
        u32 now;
        while (true) {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
            if (now >= count) break;
            __nanosleep(200);
        }
    }
    __syncthreads();
}
// By one thread, after the others have arrived at a barrier.
__device__ __forceinline__ void count_up(u32* counter) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(1) : "memory");
}

// --------------------------------------------------------------------------------------------------- states

// Calls what(register, row, column) for each pair of neighbours that a lane holds of a 16 × V tile.
template <typename F>
__device__ __forceinline__ void for_pairs(int lane, F what) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) what(n, 2 * half, lane / 4 + 8 * half, 8 * n + 2 * (lane % 4));
}

__device__ __forceinline__ void load_state(float (&h)[NT][4], const float* state, int first_row, int rows, int lane) {
    for_pairs(lane, [&](int n, int i, int row, int column) {
        float2 pair = make_float2(0.f, 0.f);
        if (state && first_row + row < rows) pair = *(const float2*)(state + (i64)(first_row + row) * V + column);
        h[n][i] = pair.x;
        h[n][i + 1] = pair.y;
    });
}
__device__ __forceinline__ void store_state(const float (&h)[NT][4], float* state, int first_row, int rows, int lane) {
    for_pairs(lane, [&](int n, int i, int row, int column) {
        if (first_row + row < rows)
            *(float2*)(state + (i64)(first_row + row) * V + column) = make_float2(h[n][i], h[n][i + 1]);
    });
}

// States saved for the backward pass: bfloat16, as the tensor cores see them, for bfloat16 inputs; else float32.
#if PARTS == 1
typedef u16 saved_t;
#else
typedef float saved_t;
#endif

__device__ __forceinline__ void save_state(const float (&h)[NT][4], saved_t* state, int first_row, int rows, int lane) {
#if PARTS == 1
    for_pairs(lane, [&](int n, int i, int row, int column) {
        if (first_row + row < rows)
            *(u32*)(state + (i64)(first_row + row) * V + column) = pack_bf16(h[n][i], h[n][i + 1]);
    });
#else
    store_state(h, state, first_row, rows, lane);
#endif
}

// Z = tanh(H W + k vᵀ) of one step; x holds k vᵀ.
__device__ __forceinline__ void update(float (&z)[NT][4], const Packed& state, const Matrix& weight) {
    multiply(z, state, weight);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) z[n][i] = tanh_of(z[n][i]);
}

// next = f H + (1 - f) Z. In one part with one operation less for each number: a finite H keeps its bits where f is 1, and
// the error is an ulp of H, which is below 1 unless a larger initial state was given.
__device__ __forceinline__ float gate(float f) { return PARTS == 1 ? 1.f - f : f; }
__device__ __forceinline__ void blend(
    float (&next)[NT][4], const float (&h)[NT][4], const float (&z)[NT][4], float gate
) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            next[n][i] = PARTS == 1 ? fmaf(-gate, h[n][i] - z[n][i], h[n][i]) : fmaf(gate, h[n][i], (1.f - gate) * z[n][i]);
}

__device__ __forceinline__ void clear(float (&x)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[n][i] = 0.f;
}
