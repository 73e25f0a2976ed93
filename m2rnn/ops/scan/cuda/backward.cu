// The backward pass: from the last chunk to the first, a chunk's states are computed again from the saved one, then
// the steps run backwards. With c the gradient that reaches the state from later steps:
//
//     G = q dyᵀ + clamp(c)      dX = (1 - f) G ⊙ (1 - Z²)      c ← f G + dX Wᵀ
//     dq = H dy    dk = dX v    dv = dXᵀ k    df = Σ G ⊙ (H_prev - Z)    dW += H_prevᵀ dX
//
// Only every second state of a chunk is kept in shared memory: Z has to be computed again from it anyway, and the next
// state comes with it.

#include "common.cuh"
#include "backward_tasks.cuh"
#include "clamp_bound.cuh"
#include "backward_step.cuh"

// Steps of the recomputation: at V = 32 all 8 and those of the walk back exceed the instruction cache
constexpr int RECOMPUTED = V == 32 && UNROLLED > 4 ? 4 : UNROLLED;

// States after chunks: of the one that walks back, of the one before it and, working ahead, of the one before that
#define ENDS (2 + AHEAD)
#define BUFFERS (AHEAD ? 3 : 1)  // of inputs: on their way, computing states, walking back

struct Inputs {  // of a chunk
    char q[tile_bytes<ROWS + PAD>()];
    char k[tile_bytes<ROWS + PAD>()];
    char v[SLOTS][tile_bytes<V + PAD>()];
    char dy[SLOTS][tile_bytes<V + PAD>()];
    float f[SLOTS][CHUNK];
    alignas(16) saved_t state[SLOTS][WARPS][16][V];  // before it
};

// Where a head's tensors begin in a sequence. In shared memory, since registers are scarce.
struct Place {
    const input_t *q, *k, *v, *dy;
    const float* f;
    const saved_t* saved;
    i64 dq, dk, head;  // elements
    float sigma;       // see unclamped_limit()
};

// Where a thread's share of the chunk staged last is, if that is one piece of each tensor: the next one's is found by a
// subtraction.
#define MOVES (PARTS == 1 && !AHEAD && CHUNK * ROWS / 8 == THREADS && 2 * CHUNK * V / 8 == SLOT_THREADS && 16 * V / 8 == 32)
struct Share {
    const input_t *q, *k, *v_dy;
    const float* f;
    const saved_t* state;
};

struct BackwardShared {
    Kept kept[1 + AHEAD][CHUNK / 8][SLOTS][WARPS];
    Registers end[ENDS][SLOTS][WARPS][PARTS * KS][32];  // the state after a chunk
    Inputs inputs[BUFFERS];
    alignas(16) float dweight[SLOTS][WARPS][V * V];  // dWᵀ of the chunks done, each warp's rows' share
    alignas(16) float zeros[4];
    Place place[SLOTS];
#if MOVES
    Share share[THREADS];
#endif
};
static_assert(sizeof(BackwardShared) == SHARED_BYTES, "the launcher counts otherwise");

// x, but the compiler does not know: what follows from it is computed where it is needed, not kept in scarce registers.
__device__ __forceinline__ u32 forgotten(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The vectors of one step of two tiles as operands of their outer product.
__device__ __forceinline__ void load_vectors(
    Outer& x, u32 row_tile, u32 column_tile, int octet, int step, int row, u32 zeros, int lane
) {
    load_outer(
        x, step, lane,
        [&](int p, int matrix) {
            return matrix < 2
                ? tile_row(row_tile, p, ROWS + PAD, octet + lane % 8, row + 8 * matrix)
                : tile_row(column_tile, p, V + PAD, octet + lane % 8, 8 * ((matrix - 2) % NT));
        },
        [&](int) { return zeros; });
}

// Of steps [first, first + CHUNK) of a tensor those in [begin, end) to a tile, by COUNT threads; the rest is zero. `data`
// points at channel 0 of step `first`.
template <int COLUMNS>
__device__ __forceinline__ void stage_some(
    char* tile, const input_t* data, i64 stride, i64 first, i64 begin, i64 end, int columns, u32 i
) {
    constexpr int width = PARTS == 1 ? 8 : 2, pieces = COLUMNS / width;
    const int low = (int)(begin > first ? begin - first : 0);
    const int high = (int)(end - first < CHUNK ? end - first : CHUNK);
    const int step = i / pieces, column = i % pieces * width;  // i is unsigned: shifts, not divisions
    const bool valid = step >= low && step < high && column < columns;
    stage_piece<COLUMNS + PAD>(tile, valid ? data + (step * stride + column) : data, valid, step, column);
}
template <int COLUMNS, int COUNT>
__device__ __forceinline__ void stage(
    char* tile, const input_t* data, i64 stride, i64 first, i64 begin, i64 end, int columns, u32 thread
) {
    constexpr int total = CHUNK * COLUMNS / (PARTS == 1 ? 8 : 2);
#pragma unroll
    for (int j = 0; j < (total + COUNT - 1) / COUNT; j++) {
        const u32 i = thread + j * COUNT;
        if (total % COUNT != 0 && i >= total) break;
        stage_some<COLUMNS>(tile, data, stride, first, begin, end, columns, i);
    }
}
// Of two tensors, which the threads share if one does not keep all busy.
template <int COLUMNS, int COUNT>
__device__ __forceinline__ void stage_two(
    char* tile, char* other_tile, const input_t* data, const input_t* other_data, i64 stride, i64 other_stride,
    i64 first, i64 begin, i64 end, int columns, u32 thread
) {
    constexpr int total = CHUNK * COLUMNS / (PARTS == 1 ? 8 : 2);
    if constexpr (total % COUNT == 0) {
        stage<COLUMNS, COUNT>(tile, data, stride, first, begin, end, columns, thread);
        stage<COLUMNS, COUNT>(other_tile, other_data, other_stride, first, begin, end, columns, thread);
        return;
    }
#pragma unroll
    for (int j = 0; j < (2 * total + COUNT - 1) / COUNT; j++) {
        const u32 i = thread + j * COUNT;
        if (2 * total % COUNT != 0 && i >= 2 * total) break;
        const bool other = i >= total;
        stage_some<COLUMNS>(
            other ? other_tile : tile, other ? other_data : data, other ? other_stride : stride, first, begin, end,
            columns, other ? i - total : i);
    }
}

__device__ __forceinline__ void load_staged(float (&h)[NT][4], const saved_t (&state)[16][V], int lane) {
    for_pairs(lane, [&](int n, int i, int row, int column) {
#if PARTS == 1
        const u32 pair = *(const u32*)&state[row][column];
        h[n][i] = low_bf16(pair);
        h[n][i + 1] = high_bf16(pair);
#else
        const float2 pair = *(const float2*)&state[row][column];
        h[n][i] = pair.x;
        h[n][i + 1] = pair.y;
#endif
    });
}

// Two neighbours, as float32 or in the inputs' dtype; the index is even.
__device__ __forceinline__ void store_pair(void* data, i64 index, float a, float b, bool as_float) {
    if (as_float || INPUT == 2)
        *(float2*)((float*)data + index) = make_float2(a, b);
    else
        store_pair(data, index, a, b);
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, TOGETHER) m2rnn_backward(const Backward p) {
    extern __shared__ __align__(64) char memory[];
    BackwardShared& shared = *(BackwardShared*)memory;
    const int thread = threadIdx.x, lane = thread % 32;
    // From lane 0, so that the compiler knows what is the same in all lanes, and keeps it in uniform registers
    const int all_warps = __shfl_sync(0xffffffffu, thread / 32, 0);
    const int warp = all_warps % WARPS, slot = all_warps / WARPS % SLOTS, half = all_warps / (WARPS * SLOTS);
    const bool recomputes = !AHEAD || half == 1, walks = half == 0;
    const int own_slot_thread = 32 * (all_warps % WARPS + WARPS * half) + lane, row = 16 * warp;
    const i64 batches = p.offsets ? 1 : p.sequences;
    const int q_row = p.heads / p.q.repeat * p.key_stride, k_row = p.heads / p.k.repeat * p.key_stride;
    const Parts dq{p.dq_parts, p.dq, batches, p.steps, p.window, p.q.repeat / SLOTS, q_row};
    const Parts dk{p.dk_parts, p.dk, batches, p.steps, p.window, p.k.repeat / SLOTS, k_row};

    const Task task(p, blockIdx.x);
    if (task.sums) {
        if (task.window < 0) return;
        wait_until(task.blocks_done(p), task.units * task.slices);
        const i64 begin = task.window_begin(p), end = begin + p.window < p.steps ? begin + p.window : p.steps;
        if (dq.parts) dq.sum(task.window, begin, end, task.index, p.sum_blocks);
        if (dk.parts) dk.sum(task.window, begin, end, task.index, p.sum_blocks);
        __syncthreads();
        if (thread == 0) count_up(task.sums_done(p));
        return;
    }
    const int groups = p.heads / SLOTS, unit_lane = task.unit() / groups;
    const int first_head = task.unit() % groups * SLOTS, head = first_head + slot;
    const i64 window_begin = task.window_begin(p);
    if (p.windows == 1) {  // a sequence's slices are the first of a unit, so no block waits for one without steps
        bool idle = true;
        for (int sequence = unit_lane; sequence < p.sequences; sequence += p.lanes) idle &= Span(p, task, sequence).empty();
        if (idle) {
            if (thread == 0 && p.sum_blocks) count_up(task.blocks_done(p));
            return;
        }
    }
    if (p.counters) {
        wait_until(task.slices_done(p), task.window * task.slices + task.slice());
        if (p.sum_blocks && task.window >= 2) wait_until(task.sums_done(p) - 2, p.sum_blocks);
    }

    Matrix weight, transposed_weight;
    load_matrix(weight, p.weight + head / p.weight_repeat * V * V, false, lane);
    load_matrix(transposed_weight, p.weight + head / p.weight_repeat * V * V, true, lane);
#if BOUNDED
    const float sigma = largest_singular_value(transposed_weight);
    if (own_slot_thread == 0) shared.place[slot].sigma = sigma >= 1.f || sigma != sigma ? sigma : 1.f;
#endif
    Gradients d;
    if (walks)
        for (int i = lane; i < V * V; i += 32) shared.dweight[slot][warp][i] = 0.f;
    __syncwarp();
    const u32 zeros = shared_address(shared.zeros);
    if (thread < 4) shared.zeros[thread] = 0.f;

    const int q_head = first_head / p.q.repeat, q_group = first_head % p.q.repeat / SLOTS;
    const int k_head = first_head / p.k.repeat, k_group = first_head % p.k.repeat / SLOTS;

    for (int sequence = unit_lane; sequence < p.sequences; sequence += p.lanes) {
        const i64 batch = p.offsets ? 0 : sequence;
        const Span span(p, task, sequence);
        const i64 begin = span.begin, end = span.end, first_step = span.first, last_step = span.last;
        if (span.empty()) continue;

        const i64 state_offset = ((i64)sequence * p.heads + head) * p.key_dim * V;
        load_state(d.carry, p.carry + state_offset, row, p.key_dim, lane);
        __syncthreads();  // the sequence before this one is done with the shared memory
        volatile Place& place = shared.place[slot];
        if (own_slot_thread == 0) {
            place.q = (const input_t*)p.q.data + batch * p.q.batch + q_head * p.q.head;
            place.k = (const input_t*)p.k.data + batch * p.k.batch + k_head * p.k.head;
            place.v = (const input_t*)p.v.data + batch * p.v.batch + head / p.v.repeat * p.v.head;
            place.dy = (const input_t*)p.dy.data + batch * p.dy.batch + head * p.dy.head;
            place.f = (const float*)p.f.data + batch * p.f.batch + head / p.f.repeat * p.f.head;
            place.saved = p.saved + ((batch * ((p.steps - 1) / CHUNK) - 1) * p.heads + head) * p.key_dim * V;
            place.dq = dq.step_zero(task.window, q_group, batch, window_begin) + q_head * p.key_stride;
            place.dk = dk.step_zero(task.window, k_group, batch, window_begin) + k_head * p.key_stride;
            place.head = batch * p.steps * p.heads + head;
        }
        __syncthreads();

        auto stage_chunk = [&](i64 first, int buffer) {
            Inputs& in = shared.inputs[buffer];
            const u32 thread = forgotten(threadIdx.x), slot_thread = forgotten(own_slot_thread), lane = thread % 32;
            stage_two<ROWS, ALL_THREADS>(
                in.q, in.k, place.q + first * p.q.time, place.k + first * p.k.time, p.q.time, p.k.time,
                first, begin, end, p.key_dim, thread);
            stage_two<V, SLOT_THREADS>(
                in.v[slot], in.dy[slot], place.v + first * p.v.time, place.dy + first * p.dy.time, p.v.time, p.dy.time,
                first, begin, end, V, slot_thread);
            if (slot_thread < CHUNK) {
                const bool valid = first + slot_thread >= begin && first + slot_thread < end;
                copy<4>(&in.f[slot][slot_thread], valid ? place.f + (first + slot_thread) * p.f.time : &one, true);
            }
            if (recomputes && first > begin) {
                // Rows of a head are neighbours, so its tiles are too
                constexpr int piece = 16 / sizeof(saved_t), pieces = 16 * V / piece;
                const saved_t* state = place.saved + (first / CHUNK * p.heads * p.key_dim + row) * V;
#pragma unroll
                for (int j = 0; j < (pieces + 31) / 32; j++) {
                    const u32 i = lane + 32 * j;
                    if (pieces % 32 != 0 && i >= pieces) break;
                    const bool valid = row + i * piece / V < p.key_dim;
                    copy<16>((saved_t*)in.state[slot][warp] + i * piece, valid ? state + i * piece : p.saved, valid);
                }
            }
            copies_issued();
#if MOVES
            Share& share = shared.share[thread];
            const u32 step = thread / (ROWS / 8), column = thread % (ROWS / 8) * 8;
            const u32 v_step = slot_thread / (V / 8) % CHUNK, v_column = slot_thread % (V / 8) * 8;
            share.q = place.q + ((first + step) * p.q.time + column);
            share.k = place.k + ((first + step) * p.k.time + column);
            share.v_dy = slot_thread < CHUNK * V / 8 ? place.v + ((first + v_step) * p.v.time + v_column)
                                                     : place.dy + ((first + v_step) * p.dy.time + v_column);
            share.f = place.f + (first + slot_thread) * p.f.time;
            share.state = place.saved + ((first / CHUNK * p.heads * p.key_dim + row) * V + 8 * lane);
#endif
        };
#if MOVES
        // The chunk before the one staged last, of a sequence that has all its steps
        auto stage_next = [&](i64 first) {
            Inputs& in = shared.inputs[0];
            const u32 thread = forgotten(threadIdx.x), slot_thread = thread % SLOT_THREADS, lane = thread % 32;
            const u32 step = thread / (ROWS / 8), column = thread % (ROWS / 8) * 8;
            const u32 v_step = slot_thread / (V / 8) % CHUNK, v_column = slot_thread % (V / 8) * 8;
            const bool is_v = slot_thread < CHUNK * V / 8;
            Share share = shared.share[thread];
            share.q -= CHUNK * p.q.time;
            share.k -= CHUNK * p.k.time;
            share.v_dy -= CHUNK * (is_v ? p.v.time : p.dy.time);
            share.f -= CHUNK * p.f.time;
            share.state -= p.heads * p.key_dim * V;
            const bool inside = (int)column < p.key_dim;
            const u32 to = 2 * (step * (ROWS + PAD) + column);
            copy<16>(in.q + to, inside ? share.q : (const input_t*)p.q.data, inside);
            copy<16>(in.k + to, inside ? share.k : (const input_t*)p.k.data, inside);
            copy<16>((is_v ? in.v[slot] : in.dy[slot]) + 2 * (v_step * (V + PAD) + v_column), share.v_dy, true);
            if (slot_thread < CHUNK) copy<4>(&in.f[slot][slot_thread], share.f, true);
            if (first > begin) {
                const bool valid = row + lane * 8 / V < (u32)p.key_dim;
                copy<16>((saved_t*)in.state[slot][warp] + 8 * lane, valid ? share.state : p.saved, valid);
            }
            copies_issued();
            shared.share[thread] = share;
        };
#endif
        auto chunk_arrived = [&] {
            copies_done();
            __syncthreads();
        };
        // The chunk's steps in the sequence: [low, high)
        auto low = [&](i64 first) { return (int)(begin > first ? begin - first : 0); };
        auto high = [&](i64 first) { return (int)(end - first < CHUNK ? end - first : CHUNK); };

        // The saved state before a chunk is that after the one before it, whose last two steps need not be computed again.
        auto end_of = [&](i64 first) -> Registers(&)[PARTS * KS][32] {
            return shared.end[(u32)(first / CHUNK + ENDS) % ENDS][slot][warp];
        };
        auto recompute = [&](i64 first, int buffer, int keep, bool is_last) {
            Inputs& in = shared.inputs[buffer];
            Kept* kept = &shared.kept[keep][0][slot][warp];
            float h[NT][4];
            Packed packed;
            if (first > begin)
                load_staged(h, in.state[slot][warp], lane);
            else
                load_state(h, p.initial ? p.initial + state_offset : nullptr, row, p.key_dim, lane);
            pack(packed, h);
            if (first > begin) store_packed(end_of(first - CHUNK), packed, lane);
            const u32 k_tile = shared_address(in.k), v_tile = shared_address(in.v[slot]);
#pragma unroll 1
            for (int octet = 0; octet < CHUNK; octet += 8) {
                if (octet + 8 <= low(first) || octet >= high(first)) continue;
                alignas(16) float f[8];  // in registers, if the loop is unrolled whole
                if (RECOMPUTED == 8) {
                    *(float4*)f = *(const float4*)&in.f[slot][octet];
                    *(float4*)(f + 4) = *(const float4*)&in.f[slot][octet + 4];
                }
#pragma unroll RECOMPUTED
                for (int step = 0; step < 8; step++) {
                    Outer key_value;
                    load_vectors(key_value, k_tile, v_tile, octet, step, row, zeros, lane);
                    if (step % 2 == 0)
                        store_packed(kept[octet / 8 * SLOTS * WARPS].pairs[step / 2].states, packed, lane);
                    if (step == 6 && octet == CHUNK - 8 && !is_last) break;
                    float z[NT][4];
                    clear(z);
                    add_outer(z, key_value, octet + step, row, in.k, in.v[slot], lane);
                    update(z, packed, weight);
                    blend(h, h, z, gate(RECOMPUTED == 8 ? f[step] : in.f[slot][octet + step]));
                    pack(packed, h);
                }
            }
            if (is_last) store_packed(end_of(first), packed, lane);
        };

        auto walk_back = [&](i64 first, int buffer, int keep) {
            Inputs& in = shared.inputs[buffer];
            Kept* kept = &shared.kept[keep][0][slot][warp];
            const u32 q_tile = shared_address(in.q), k_tile = shared_address(in.k);
            const u32 v_tile = shared_address(in.v[slot]), dy_tile = shared_address(in.dy[slot]);
#pragma unroll
            for (int k = 0; k < KS; k++) clear(d.weight[k]);
#if BOUNDED
            const float unclamped = unclamped_limit(in.q, in.dy[slot], in.f[slot], place.sigma, p.clip, row, lane);
#endif
            Packed next;
            load_packed(next, end_of(first), lane);
#pragma unroll 1
            for (int octet = CHUNK - 8; octet >= 0; octet -= 8) {
                if (octet + 8 <= low(first) || octet >= high(first)) continue;
                Kept& octet_kept = kept[octet / 8 * SLOTS * WARPS];
                Octet operands;
                load_rows(operands.keys, k_tile, octet, row, lane);
                load_columns(operands.values, v_tile, octet, lane);
                load_columns(operands.dys, dy_tile, octet, lane);
                auto clamp_carry = [&](int step) {  // steps before the sequence leave it as it is, unclamped too
                    clamp(d.carry, octet + step >= low(first) ? p.clip : __uint_as_float(0x7f800000u));
                };
                auto walk_octet = [&](bool clamps) __attribute__((always_inline)) {
#pragma unroll UNROLLED
                    for (int step = 6; step >= 0; step -= 2) {
                        Pair& pair = octet_kept.pairs[step / 2];
                        Packed before;
                        load_packed(before, pair.states, lane);
                        Outer key_value[2], query_dy[2];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            load_vectors(key_value[i], k_tile, v_tile, octet, step + i, row, zeros, lane);
                            load_vectors(query_dy[i], q_tile, dy_tile, octet, step + i, row, zeros, lane);
                        }
                        const float2 f = *(const float2*)&in.f[slot][octet + step];
                        __syncwarp();  // every lane has read its states, the gradients can take their place
                        float dv[2][KS][4] = {};
                        Packed between;
                        float h0[NT][4], h1[NT][4], z0[NT][4], z1[NT][4];
                        unpack(h0, before);
                        clear(z0);
                        add_outer(z0, key_value[0], octet + step, row, in.k, in.v[slot], lane);
                        update(z0, before, weight);
                        blend(h1, h0, z0, gate(f.x));
                        pack(between, h1);
                        clear(z1);
                        add_outer(z1, key_value[1], octet + step + 1, row, in.k, in.v[slot], lane);
                        update(z1, between, weight);
                        if (clamps) clamp_carry(step + 1);
                        add_outer(d.carry, query_dy[1], octet + step + 1, row, in.q, in.dy[slot], lane);
                        step_back(d, dv[1], pair, operands, f.y, step + 1, h1, between, z1, next, transposed_weight, lane);
                        if (clamps) clamp_carry(step);
                        add_outer(d.carry, query_dy[0], octet + step, row, in.q, in.dy[slot], lane);
                        step_back(d, dv[0], pair, operands, f.x, step, h0, before, z0, between, transposed_weight, lane);
                        next = before;
#pragma unroll
                        for (int i = 0; i < 2; i++)
#pragma unroll
                            for (int k = 0; k < KS; k++) store_column(pair.gradients.dv[i][k], dv[i][k], step + i, lane);
                    }
                };
#if BOUNDED
                if (within(d.carry, __shfl_sync(0xffffffffu, unclamped, octet)))
                    walk_octet(false);
                else
                    walk_octet(true);
#else
                walk_octet(CLIP);
#endif
                const float df = sum_lanes(d.f, lane);
                if (lane < 8) octet_kept.df[lane] = df;
            }
            float* dweight = shared.dweight[slot][warp];
#pragma unroll
            for (int k = 0; k < KS; k++)
                for_pairs(forgotten(lane), [&](int n, int i, int matrix_row, int column) {
                    if (V == 8 && matrix_row >= V) return;
                    float2& sum = *(float2*)&dweight[(16 * k + matrix_row) * V + column];
                    sum = make_float2(sum.x + d.weight[k][n][i], sum.y + d.weight[k][n][i + 1]);
                });
        };

        auto write_gradients = [&](i64 first, int keep) {
            const u32 thread = forgotten(threadIdx.x), slot_thread = forgotten(own_slot_thread);
            const i64 q_first = place.dq + first * q_row, k_first = place.dk + first * k_row;
            const i64 head_first = place.head + first * p.heads;
#pragma unroll
            for (int j = 0; j < (CHUNK * ROWS / 4 + ALL_THREADS - 1) / ALL_THREADS; j++) {
                const u32 step = thread / (ROWS / 4) + j * (ALL_THREADS / (ROWS / 4));
                const u32 tile = thread / 4 % (ROWS / 16), r = thread % 4 * 2;
                const int channel = 16 * tile + r;  // and the next, and those 8 further
                if (step < low(first) || step >= high(first) || channel >= p.key_dim) continue;
                float4 q_sum, k_sum;
#pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    const auto& part = shared.kept[keep][step / 8][s][tile].pairs[step % 8 / 2].gradients;
                    add(q_sum, *(const float4*)&part.dq[step % 2][r], s == 0);
                    add(k_sum, *(const float4*)&part.dk[step % 2][r], s == 0);
                }
                const i64 q_at = q_first + (step * q_row + channel), k_at = k_first + (step * k_row + channel);
                const bool q_as_float = PARTS > 1 && dq.parts, k_as_float = PARTS > 1 && dk.parts;
                void *q_out = dq.parts ? p.dq_parts : p.dq, *k_out = dk.parts ? p.dk_parts : p.dk;
                store_pair(q_out, q_at, q_sum.x, q_sum.z, q_as_float);
                store_pair(k_out, k_at, k_sum.x, k_sum.z, k_as_float);
                if (channel + 8 >= p.key_dim) continue;
                store_pair(q_out, q_at + 8, q_sum.y, q_sum.w, q_as_float);
                store_pair(k_out, k_at + 8, k_sum.y, k_sum.w, k_as_float);
            }
#pragma unroll
            for (int j = 0; j < (CHUNK * KS * 4 + SLOT_THREADS - 1) / SLOT_THREADS; j++) {
                const u32 i = slot_thread + j * SLOT_THREADS;
                const u32 step = i / (KS * 4), tile = i / 4 % KS, r = i % 4 * 2;
                if (step < low(first) || step >= high(first)) continue;
                float4 dv;
                float df;
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    const Kept& part = shared.kept[keep][step / 8][slot][w];
                    add(dv, *(const float4*)&part.pairs[step % 8 / 2].gradients.dv[step % 2][tile][r], w == 0);
                    df = w == 0 ? part.df[step % 8] : df + part.df[step % 8];
                }
                const i64 at = head_first + step * p.heads;
                store_pair(p.dv, at * V + 16 * tile + r, dv.x, dv.z, p.dv_float);
                if (V > 8) store_pair(p.dv, at * V + 16 * tile + r + 8, dv.y, dv.w, p.dv_float);
                if (i % (KS * 4) == 0) p.df[at] = df;
            }
        };

        const i64 last_chunk = last_step / CHUNK * CHUNK;
        stage_chunk(last_chunk, 0);
#if AHEAD
        chunk_arrived();
        int buffer = 2, ahead = 0, keep = 0;  // of this chunk, and of the one before it in time
        for (i64 first = last_chunk + CHUNK; first + CHUNK > first_step; first -= CHUNK) {
            const int arriving = ahead == 2 ? 0 : ahead + 1;
            const bool has_states = first <= last_chunk;
            if (recomputes && first > first_step) recompute(first - CHUNK, ahead, keep ^ 1, !has_states);
            if (first - CHUNK > first_step) stage_chunk(first - 2 * CHUNK, arriving);
            if (walks && has_states) walk_back(first, buffer, keep);
            chunk_arrived();
            if (has_states) {
                write_gradients(first, keep);
                __syncthreads();
            }
            buffer = ahead, ahead = arriving, keep ^= 1;
        }
#else
        for (i64 first = last_chunk; first + CHUNK > first_step; first -= CHUNK) {
            chunk_arrived();
            recompute(first, 0, 0, first == last_chunk);
            __syncwarp();
            walk_back(first, 0, 0);
            __syncthreads();
            if (first > first_step) {
#if MOVES
                if (first - CHUNK >= begin)
                    stage_next(first - CHUNK);
                else
#endif
                    stage_chunk(first - CHUNK, 0);
            }
            write_gradients(first, 0);
        }
#endif
        if (walks)
            store_state(d.carry, p.carry + state_offset, row, p.key_dim, lane);
    }

    __syncthreads();
    float* total = p.dweight + ((i64)unit_lane * p.heads + head) * V * V;
    for (int i = own_slot_thread; i < V * V; i += SLOT_THREADS) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += shared.dweight[slot][w][i % V * V + i / V];
        total[i] += sum;
    }
    if (p.counters) {
        __syncthreads();
        if (thread == 0) {
            const Task done(p, forgotten(blockIdx.x));
            count_up(done.slices_done(p));
            if (p.sum_blocks) count_up(done.blocks_done(p));
        }
    }
}
