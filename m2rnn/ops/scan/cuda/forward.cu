// The forward pass: y, the final state and a state every CHUNK steps. A block is one head (SLOTS is 1).

#include "common.cuh"

// k and v of a step side by side, then zeros: see load_outer(). An odd number of 16 bytes, so that ldmatrix meets no bank
// conflict.
#define KV_ROW (ROWS + V + (V == 8 ? 16 : 8))
#define Y_ROW (V + 4)  // padded, so that the lanes of a warp meet different banks

struct Forward {
    Strided q, k, v, f;
    const float* weight;   // [heads / weight_repeat, V, V]
    const float* initial;  // [sequences, heads, key_dim, V] or null
    float* final;          // likewise
    saved_t* saved;        // [B, (steps - 1) / CHUNK, heads, key_dim, V] or null
    void* y;               // [B, steps, heads, V]
    const i64* offsets;    // [sequences + 1] of packed sequences, or null
    u32* finished;         // [sequences · heads], slices done; null if there is one slice
    i64 steps, slice;      // the slice's length is a multiple of CHUNK
    int heads, key_dim, weight_repeat, sequences;
};

struct ForwardShared {  // two chunks: while one is worked on, the next is on its way
    char q[2][tile_bytes<ROWS + PAD>()];
    char kv[2][tile_bytes<KV_ROW>()];
    float gate[2][CHUNK];
    float y[2][WARPS][CHUNK][Y_ROW];
};
static_assert(sizeof(ForwardShared) == SHARED_BYTES, "the launcher counts otherwise");

// A thread's share of the copies of one tensor, a chunk after the other. Its pieces of a tile lie below one another.
template <int COLUMNS, int STRIDE>
struct Copies {
    static constexpr u32 width = PARTS == 1 ? 8 : 2, across = COLUMNS / width, down = THREADS / across;
    const input_t* data;  // the tensor
    const input_t* from;  // this thread's first piece of the next chunk
    i64 stride;           // from step to step
    bool inside;          // whether the tensor has these columns

    __device__ __forceinline__ Copies(const Strided& x, i64 batch, int head, int columns, i64 first) {
        const u32 row = threadIdx.x / across, column = threadIdx.x % across * width;
        data = (const input_t*)x.data;
        stride = x.time;
        inside = column < columns;
        from = data + batch * x.batch + head / x.repeat * x.head + (first + row) * stride;
        if (inside) from += column;
    }
    // Of the chunk's steps those in [low, high), all of them if it is WHOLE; the rest is zero.
    template <bool WHOLE>
    __device__ __forceinline__ void chunk(char* tile, int low, int high) {
        const u32 row = threadIdx.x / across, column = threadIdx.x % across * width;
#pragma unroll
        for (int j = 0; j < (CHUNK + down - 1) / down; j++) {
            const int step = row + j * down;
            if (CHUNK % down != 0 && step >= CHUNK) break;
            const bool valid = inside && (WHOLE || (step >= low && step < high));
            stage_piece<STRIDE>(tile, WHOLE || valid ? from + j * (down * stride) : data, valid, step, column);
        }
        from += CHUNK * stride;
    }
};

// One step's k and v, as operands.
__device__ __forceinline__ void load_key_value(Outer& x, u32 tile, int octet, int step, int row, int lane) {
    const u32 own = 2 * (lane % 8 * KV_ROW), part = 2 * CHUNK * KV_ROW, first = tile + 2 * octet * KV_ROW;
    load_outer(
        x, step, lane,
        [&](int p, int matrix) {
            return first + p * part + (own + 2 * (matrix < 2 ? row + 8 * matrix : ROWS + 8 * ((matrix - 2) % NT)));
        },
        [&](int p) { return first + p * part + (own + 2 * (ROWS + V)); });
}

// TOGETHER blocks run on a multiprocessor at a time; 0: as many as the compiler guesses.
extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER) m2rnn_forward(const Forward p) {
    extern __shared__ __align__(16) char memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 unit = blockIdx.x % (p.heads * p.sequences), slice = blockIdx.x / (p.heads * p.sequences);
    const int head = unit % p.heads, row = 16 * warp;
    const i64 sequence = unit / p.heads, batch = p.offsets ? 0 : sequence;
    const i64 begin = p.offsets ? p.offsets[sequence] : 0, end = p.offsets ? p.offsets[sequence + 1] : p.steps;
    // The slice's part of the sequence. Slices count from its begin, so that all sequences of a pack are worked on at once
    const i64 slice_begin = begin / CHUNK * CHUNK + slice * p.slice, slice_end = slice_begin + p.slice;
    const i64 from = slice_begin > begin ? slice_begin : begin, to = slice_end < end ? slice_end : end;
    if (from >= to && slice > 0) return;
    for (int i = thread; i < 2 * PARTS * CHUNK * 4; i += THREADS)  // both buffers follow one another
        *(u32*)(shared.kv[0] + 2 * (i / 4 * KV_ROW + ROWS + V + i % 4 * 2)) = 0;

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

    // The slice's chunks, and which steps of the first and of the last one are in the sequence
    const i64 first_chunk = from / CHUNK * CHUNK;
    const u32 chunks = from < to ? (to - first_chunk + CHUNK - 1) / CHUNK : 0;
    const int first_low = (int)(from - first_chunk), last_high = (int)(to - first_chunk - (chunks - 1) * (i64)CHUNK);
    auto low = [&](u32 chunk) { return chunk == 0 ? first_low : 0; };
    auto high = [&](u32 chunk) { return chunk + 1 == chunks ? last_high : CHUNK; };

    // Places in tensors move from chunk to chunk: an addition is less than to compute them again
    Copies<ROWS, ROWS + PAD> q(p.q, batch, head, p.key_dim, first_chunk);
    Copies<ROWS, KV_ROW> k(p.k, batch, head, p.key_dim, first_chunk);
    Copies<V, KV_ROW> v(p.v, batch, head, V, first_chunk);
    const float* f = (const float*)p.f.data + batch * p.f.batch + head / p.f.repeat * p.f.head;
    f += (first_chunk + thread) * p.f.time;
    float next_f;
    auto stage_inputs = [&](u32 chunk, int buffer) {
        const int valid_from = low(chunk), valid_to = high(chunk);
        if (valid_from == 0 && valid_to == CHUNK) {
            q.template chunk<true>(shared.q[buffer], 0, CHUNK);
            k.template chunk<true>(shared.kv[buffer], 0, CHUNK);
            v.template chunk<true>(shared.kv[buffer] + 2 * ROWS, 0, CHUNK);
        } else {
            q.template chunk<false>(shared.q[buffer], valid_from, valid_to);
            k.template chunk<false>(shared.kv[buffer], valid_from, valid_to);
            v.template chunk<false>(shared.kv[buffer] + 2 * ROWS, valid_from, valid_to);
        }
        if (thread < CHUNK)  // f = 1 outside of the sequence leaves the state as it is
            next_f = thread >= valid_from && thread < valid_to ? *f : 1.f;
        f += CHUNK * p.f.time;
        copies_issued();
    };
    auto inputs_arrived = [&](int buffer) {
        if (thread < CHUNK) shared.gate[buffer][thread] = gate(next_f);
        copies_done();
        __syncthreads();
    };

    const u32 chunk_states = p.heads * p.key_dim * V;
    saved_t* saved = p.saved;  // where this chunk's first state goes
    if (saved) {
        const i64 index = batch * ((p.steps - 1) / CHUNK) + first_chunk / CHUNK - 1;
        saved += index * chunk_states + (i64)head * p.key_dim * V;
    }
    constexpr int y_down = THREADS / (V / 2);  // steps from one pair of y that a thread writes to its next
    const int y_step = thread / (V / 2), y_column = thread % (V / 2) * 2, y_stride = p.heads * V;
    input_t* y_out = (input_t*)p.y + ((batch * p.steps + first_chunk + y_step) * y_stride + head * V + y_column);

    if (chunks) {
        stage_inputs(0, 0);
        inputs_arrived(0);
    }
    int buffer = 0;
    for (u32 chunk = 0; chunk < chunks; chunk++, buffer ^= 1) {
        if (chunk + 1 < chunks) stage_inputs(chunk + 1, buffer ^ 1);
        if (saved) {
            if (chunk > 0 || from > begin) save_state(h, saved, row, p.key_dim, lane);
            saved += chunk_states;
        }
        const char* kv = shared.kv[buffer];
#pragma unroll 1
        for (int octet = 0; octet < CHUNK; octet += 8) {
            if (octet + 8 <= low(chunk) || octet >= high(chunk)) continue;
            RowSteps queries;
            load_rows(queries, shared_address(shared.q[buffer]), octet, row, lane);
            alignas(16) float gates[8];
            *(float4*)gates = *(const float4*)&shared.gate[buffer][octet];
            *(float4*)(gates + 4) = *(const float4*)&shared.gate[buffer][octet + 4];

            float y[KS][4];
            float z[NT][4];  // k vᵀ of the next step, computed ahead, then Z
            Outer outer;
            auto multiply_key_value = [&](float(&x)[NT][4], int step) {
                load_key_value(outer, shared_address(kv), octet, step, row, lane);
                clear(x);
                add_outer<KV_ROW, KV_ROW>(x, outer, octet + step, row, kv, kv + 2 * ROWS, lane);
            };
            multiply_key_value(z, 0);
#pragma unroll UNROLLED
            for (int step = 0; step < 8; step++) {
                float ahead[NT][4];
                if (step < 7) multiply_key_value(ahead, step + 1);
                update(z, packed, weight);
                blend(h, h, z, gates[step]);
                pack(packed, h);
                float columns[KS][4] = {};  // of 8 steps, one of which is this
                Transposed transposed;
                transpose(transposed, packed);
                add_transposed_product(columns, transposed, queries);
#pragma unroll
                for (int k = 0; k < KS; k++)
                    if (step < 2 || lane % 4 == step / 2) {
                        y[k][step % 2] = columns[k][step % 2];
                        y[k][step % 2 + 2] = columns[k][step % 2 + 2];
                    }
                if (step < 7)
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) z[n][i] = ahead[n][i];
            }
#pragma unroll
            for (int tile = 0; tile < KS; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = 16 * tile + lane / 4 + i / 2 * 8, step = octet + 2 * (lane % 4) + i % 2;
                    if (column < V) shared.y[buffer][warp][step][column] = y[tile][i];
                }
        }
        inputs_arrived(buffer ^ 1);
#pragma unroll
        for (int j = 0; j < (CHUNK + y_down - 1) / y_down; j++) {
            const int step = y_step + j * y_down;
            if (step < low(chunk) || step >= high(chunk)) continue;
            float2 sum = *(const float2*)&shared.y[buffer][0][step][y_column];
#pragma unroll
            for (int w = 1; w < WARPS; w++) {
                const float2 part = *(const float2*)&shared.y[buffer][w][step][y_column];
                sum.x += part.x;
                sum.y += part.y;
            }
            store_pair(y_out + j * (i64)(y_down * y_stride), 0, sum.x, sum.y);
        }
        y_out += CHUNK * (i64)y_stride;
    }
    store_state(h, p.final + state_offset, row, p.key_dim, lane);  // an empty sequence ends as it starts
    if (finished) {
        __syncthreads();
        if (thread == 0) count_up(finished);
    }
}
