// Which block of the backward pass does what: the arguments of the kernel, its tasks, their steps, and the sums over blocks.

struct Backward {
    Strided q, k, v, f, dy;
    const float* weight;   // [heads / weight_repeat, V, V]
    const float* initial;  // [sequences, heads, key_dim, V] or null
    const saved_t* saved;  // [B, (steps - 1) / CHUNK, heads, key_dim, V]
    const i64* offsets;    // [sequences + 1] of packed sequences, or null
    float* carry;          // [sequences, heads, key_dim, V]: c after the last step, then before a slice's first
    void *dq, *dk;         // [B, steps, source heads, key_stride]
    void *dq_parts, *dk_parts;  // if several blocks share a source head: [2, groups, B, window, source heads, key_stride]
    void* dv;              // [B, steps, heads, V], float32 if dv_float
    float* df;             // [B, steps, heads]
    float* dweight;        // [lanes, heads, V, V], added to
    u32* counters;         // slices done of each unit, blocks done of each window, blocks done of each window's sums;
                           // null if there is one slice and no sum
    i64 steps, window, slice;  // lengths: a window is a multiple of a slice, a slice of CHUNK
    int heads, key_dim, key_stride, weight_repeat, sequences, lanes, windows, sum_blocks, dv_float;
    float clip;
};

// With few heads, latency is what counts: then one half of the block (AHEAD) computes the states of the next chunk while
// the other walks back through this one.
#define ALL_THREADS (THREADS * (1 + AHEAD))
#define SLOT_THREADS (32 * WARPS * (1 + AHEAD))

__device__ __forceinline__ void add(float4& sum, const float4 x, bool first) {
    sum = first ? x : make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
}

// Several blocks share a head of q or k. Each writes its sums of dq and dk over its own heads for a window of time; the
// sum of these, in the blocks' order and in float32, is a task of its own. The parts of every second window share memory.
struct Parts {
    const void* parts;  // [2, groups, batches, window, row], bfloat16 for bfloat16 in one part, else float32
    void* out;          // [batches, steps, row]
    i64 batches, steps, window;
    int groups, row;

    __device__ __forceinline__ i64 offset(int which, int group, i64 batch) const {
        return ((which % 2 * groups + group) * batches + batch) * window * row;
    }

    // Where step 0 is, or would be, in the parts or, if there are none, in the result.
    __device__ __forceinline__ i64 step_zero(int which, int group, i64 batch, i64 window_begin) const {
        return parts ? offset(which, group, batch) - window_begin * row : batch * steps * row;
    }

    // Eight channels a thread, by all blocks of the task.
    __device__ __forceinline__ void sum(int which, i64 begin, i64 end, u32 part, u32 part_count) const {
        const i64 length = (end - begin) * row / 8, total = batches * length, stride = batches * window * row;
        for (i64 i = (i64)part * ALL_THREADS + threadIdx.x; i < total; i += (i64)part_count * ALL_THREADS) {
            const i64 batch = i / length, rest = 8 * (i % length), first = offset(which, 0, batch) + rest;
            float4 sums[2] = {};
#pragma unroll 8
            for (int group = 0; group < groups; group++) {
                const i64 from = first + group * stride;
#if PARTS == 1
                const uint4 x = *(const uint4*)((const u16*)parts + from);
                add(sums[0], make_float4(low_bf16(x.x), high_bf16(x.x), low_bf16(x.y), high_bf16(x.y)), false);
                add(sums[1], make_float4(low_bf16(x.z), high_bf16(x.z), low_bf16(x.w), high_bf16(x.w)), false);
#else
                add(sums[0], *(const float4*)((const float*)parts + from), false);
                add(sums[1], *(const float4*)((const float*)parts + from + 4), false);
#endif
            }
            const i64 to = (batch * steps + begin) * row + rest;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                store_pair(out, to + 4 * half, sums[half].x, sums[half].y);
                store_pair(out, to + 4 * half + 2, sums[half].z, sums[half].w);
            }
        }
    }
};

// What a block does: a slice of a window of time for the heads of a unit, or some of a window's sums. From the last step
// to the first, in the order of the blocks' indices. A window's sums come after the next window's first slices, which keep
// the GPU busy while its last blocks end.
struct Task {
    bool sums;
    int units, slices, window, index;  // of the block among those of the slices or of the sums

    __device__ __forceinline__ Task(const Backward& p, int block) {
        units = p.heads / SLOTS * p.lanes;
        slices = (int)((p.window + p.slice - 1) / p.slice);
        const int blocks = units * slices + p.sum_blocks, i = block % blocks;
        window = block / blocks;
        sums = window == p.windows || (i >= units && i < units + p.sum_blocks);
        index = window == p.windows || i < units ? i : sums ? i - units : i - p.sum_blocks;
        window -= sums;
    }
    __device__ __forceinline__ int unit() const { return index % units; }
    __device__ __forceinline__ int slice() const { return index / units; }
    __device__ __forceinline__ i64 window_begin(const Backward& p) const { return (p.windows - 1 - window) * p.window; }
    __device__ __forceinline__ u32* slices_done(const Backward& p) const { return p.counters + unit(); }
    __device__ __forceinline__ u32* blocks_done(const Backward& p) const { return p.counters + units + window; }
    __device__ __forceinline__ u32* sums_done(const Backward& p) const { return p.counters + units + p.windows + window; }
};

// A sequence, and its steps [first, last] in a task's slice of time. In a window, slices count from the sequence's end, so
// that all sequences of a pack are worked on at once.
struct Span {
    i64 begin, end, first, last;

    __device__ __forceinline__ Span(const Backward& p, const Task& task, int sequence) {
        begin = p.offsets ? p.offsets[sequence] : 0;
        end = p.offsets ? p.offsets[sequence + 1] : p.steps;
        const i64 window_begin = task.window_begin(p), window_end = window_begin + p.window;
        const i64 low = begin > window_begin ? begin : window_begin, high = end < window_end ? end : window_end;
        const i64 slice_end = (high + CHUNK - 1) / CHUNK * CHUNK - task.slice() * p.slice;
        first = low > slice_end - p.slice ? low : slice_end - p.slice;
        last = (high < slice_end ? high : slice_end) - 1;
    }
    __device__ __forceinline__ bool empty() const { return first > last; }
};
