// A GPU for one block at a time: the threads are fibers, which take turns wherever they wait for one another, and the PTX
// instructions of the kernels are functions with their names. For tests of what kernels compute, not of races: a thread
// runs until it waits. Copies to shared memory are made as late as they may be, so that a missing wait shows.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

alignas(128) char memory[1 << 18];  // the shared memory of a block, by the kernels' name for it

namespace emulated {

struct Dim { unsigned x; };
struct Copy { void* to; const void* from; int bytes, size; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 18);
    std::vector<Copy> copies;  // issued, not waited for
    Dim index;
    unsigned long waits_for = 0;  // rounds of its warp or its block that must be over
    unsigned long* rounds = nullptr;
    bool done = false;
};
struct Meeting {  // of the threads of a warp or of a block
    unsigned size, arrived = 0;
    unsigned long rounds = 0;
};
struct Lane { uint32_t in[8], out[8]; };
struct Warp {
    Meeting meeting{32};
    Lane lanes[32];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Meeting block;
inline Thread* current;
inline Dim block_index;
inline ucontext_t scheduler;
inline void (*kernel)();

inline void fail(const char* what) {
    std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", what, block_index.x, current->index.x);
    std::abort();
}
inline unsigned lane() { return current->index.x % 32; }
inline Warp& warp() { return warps[current->index.x / 32]; }

template <typename F>
void meet(Meeting& meeting, F last) {
    if (++meeting.arrived == meeting.size) {
        last();
        meeting.arrived = 0;
        meeting.rounds++;
        return;
    }
    current->rounds = &meeting.rounds;
    current->waits_for = meeting.rounds + 1;
    swapcontext(&current->context, &scheduler);
}

// What all lanes of a warp do together, from everyone's inputs to everyone's outputs.
template <typename F>
void together(std::initializer_list<uint32_t> inputs, F what) {
    int i = 0;
    for (uint32_t x : inputs) warp().lanes[lane()].in[i++] = x;
    meet(warp().meeting, [&] { what(warp().lanes); });
}
inline uint32_t out(int i) { return warp().lanes[lane()].out[i]; }

inline void thread_begins() {
    kernel();
    if (!current->copies.empty()) fail("copies that nobody waited for");
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// Backwards, the threads and the warps take turns in the other order, which must not change anything.
inline void run_block(unsigned index, unsigned count, bool backwards, void (*what)()) {
    kernel = what;
    block_index = {index};
    block = {count};
    threads.resize(count);
    warps.assign(count / 32, Warp());
    std::memset(memory, 0xff, sizeof memory);  // NaN
    for (unsigned i = 0; i < count; i++) {
        Thread& t = threads[i];
        t.index = {i};
        t.done = false;
        t.rounds = nullptr;
        getcontext(&t.context);
        t.context.uc_stack = {t.stack.data(), 0, t.stack.size()};
        t.context.uc_link = nullptr;
        makecontext(&t.context, thread_begins, 0);
    }
    for (unsigned done = 0; done < count;) {
        bool moved = false;
        for (unsigned w = 0; w < count / 32; w++)
            for (bool again = true; again;) {  // a warp goes as far as it can
                again = false;
                for (unsigned i = 32 * w; i < 32 * w + 32; i++) {
                    Thread& t = threads[backwards ? count - 1 - i : i];
                    if (t.done || (t.rounds && *t.rounds < t.waits_for)) continue;
                    current = &t;
                    swapcontext(&scheduler, &t.context);
                    done += t.done;
                    again = moved = true;
                }
            }
        if (!moved && done < count) fail("threads wait for one another for ever");
    }
}

inline float number(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t bits(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
inline float bf16(uint32_t x) { return number(x << 16); }
inline uint32_t to_bf16(float x) {
    if (x != x) return 0x7fff;
    const uint32_t b = bits(x);
    return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline uint32_t half_of(const uint32_t* registers, int k) { return registers[k / 2] >> 16 * (k % 2) & 0xffff; }

// D = A B + D with a row of A and a column of B at a time; A is 16 × K, of which a lane has pairs in rows g and g + 8.
template <int K>
void multiply(Lane* lanes) {
    float a[16][K], b[K][8];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < K / 2; i++) {
            const int row = l / 4 + i / 2 % 2 * 8, k = 2 * (l % 4) + i % 2 + i / 4 * 8;
            a[row][k] = bf16(half_of(lanes[l].in, i));
            if (i < K / 4) b[2 * (l % 4) + i % 2 + i / 2 * 8][l / 4] = bf16(half_of(lanes[l].in + K / 4, i));
        }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
            double sum = 0;
            for (int k = 0; k < K; k++) sum += (double)a[row][k] * b[k][column];
            lanes[l].out[i] = bits((float)sum);
        }
}

// Lanes 8 i to 8 i + 7 say where the rows of matrix i begin.
inline void load_matrices(Lane* lanes, int count, bool transposed) {
    uint16_t x[8][8];
    for (int i = 0; i < count; i++) {
        for (int row = 0; row < 8; row++) std::memcpy(x[row], memory + lanes[8 * i + row].in[0], 16);
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, c = 2 * (l % 4);
            lanes[l].out[i] = transposed ? x[c][g] | x[c + 1][g] << 16 : x[g][c] | x[g][c + 1] << 16;
        }
    }
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx emulated::block_index

inline float __uint_as_float(uint32_t x) { return emulated::number(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __cvta_generic_to_shared(const void* p) { return (const char*)p - memory; }
inline void __nanosleep(unsigned) { emulated::fail("waits for a block that comes later"); }
inline void __threadfence() {}
inline void __syncthreads() { emulated::meet(emulated::block, [] {}); }
inline void __syncwarp() { emulated::meet(emulated::warp().meeting, [] {}); }

template <typename T>
T __shfl_sync(unsigned, T x, int from) {
    uint32_t raw;
    std::memcpy(&raw, &x, 4);
    emulated::together({raw, (uint32_t)from}, [](emulated::Lane* lanes) {
        for (int l = 0; l < 32; l++) lanes[l].out[0] = lanes[lanes[l].in[1] % 32].in[0];
    });
    raw = emulated::out(0);
    std::memcpy(&x, &raw, 4);
    return x;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bit) { return __shfl_sync(mask, x, emulated::lane() ^ bit); }
inline bool __any_sync(unsigned, bool x) {
    emulated::together({x}, [](emulated::Lane* lanes) {
        uint32_t any = 0;
        for (int l = 0; l < 32; l++) any |= lanes[l].in[0];
        for (int l = 0; l < 32; l++) lanes[l].out[0] = any;
    });
    return emulated::out(0);
}
inline bool __all_sync(unsigned mask, bool x) { return !__any_sync(mask, !x); }

// ------------------------------------------------------------------------------- PTX, by the names of its instructions

inline void cvt_rn_bf16x2_f32(uint32_t& d, float high, float low) {
    d = emulated::to_bf16(high) << 16 | emulated::to_bf16(low);
}
inline void cvt_f32_f16(float& d, uint16_t x) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    d = y;
}
inline void cvt_rn_f16_f32(uint16_t& d, float x) {
    const _Float16 y = x;
    std::memcpy(&d, &y, 2);
}
inline void tanh_approx_f32(float& d, float x) { d = std::tanh(x); }
inline void max_NaN_f32(float& d, float x) { d = d != d || x != x ? NAN : std::fmax(d, x); }
inline void min_NaN_f32(float& d, float x) { d = d != d || x != x ? NAN : std::fmin(d, x); }
inline void max_NaN_bf16x2(uint32_t& d, uint32_t x) {
    uint32_t both = 0;
    for (int i = 0; i < 32; i += 16) {
        float a = emulated::bf16(d >> i & 0xffff);
        max_NaN_f32(a, emulated::bf16(x >> i & 0xffff));
        both |= emulated::to_bf16(a) << i;
    }
    d = both;
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1
) {
    emulated::together({a0, a1, a2, a3, b0, b1}, emulated::multiply<16>);
    float* c[] = {&c0, &c1, &c2, &c3};
    for (int i = 0; i < 4; i++) *c[i] += emulated::number(emulated::out(i));
}
inline void mma_sync_aligned_m16n8k8_row_col_f32_bf16_bf16_f32(
    float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b
) {
    emulated::together({a0, a1, b}, emulated::multiply<8>);
    float* c[] = {&c0, &c1, &c2, &c3};
    for (int i = 0; i < 4; i++) *c[i] += emulated::number(emulated::out(i));
}
inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& d, uint32_t x) {
    emulated::together({x}, [](emulated::Lane* lanes) {
        auto at = [&](int row, int column) { return emulated::half_of(lanes[4 * row + column / 2].in, column % 2); };
        for (int l = 0; l < 32; l++) lanes[l].out[0] = at(2 * (l % 4), l / 4) | at(2 * (l % 4) + 1, l / 4) << 16;
    });
    d = emulated::out(0);
}
template <typename... D>
void load_matrices(bool transposed, uint32_t address, D&... d) {
    emulated::together({address, transposed}, [](emulated::Lane* lanes) {
        emulated::load_matrices(lanes, sizeof...(D), lanes[0].in[1]);
    });
    int i = 0;
    ((d = emulated::out(i++)), ...);
}
inline void ldmatrix_sync_aligned_m8n8_x1_shared_b16(uint32_t& a, uint32_t from) { load_matrices(false, from, a); }
inline void ldmatrix_sync_aligned_m8n8_x2_shared_b16(uint32_t& a, uint32_t& b, uint32_t from) {
    load_matrices(false, from, a, b);
}
inline void ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t from) {
    load_matrices(true, from, a, b);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
    load_matrices(true, from, a, b, c, d);
}
inline void cp_async(uint32_t to, const void* from, int size, int bytes) {
    if ((uintptr_t)from % size || to % size) emulated::fail("a copy that is not aligned");
    emulated::current->copies.push_back({memory + to, from, bytes, size});
}
inline void cp_async_cg_shared_global(uint32_t to, const void* from, int bytes) { cp_async(to, from, 16, bytes); }
inline void cp_async_ca_shared_global(uint32_t to, const void* from, int size, int bytes) { cp_async(to, from, size, bytes); }
inline void cp_async_commit_group() {}
inline void cp_async_wait_group() {
    for (const emulated::Copy& copy : emulated::current->copies) {
        std::memset(copy.to, 0, copy.size);
        if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    emulated::current->copies.clear();
}
inline void ld_acquire_gpu_global_u32(uint32_t& d, const uint32_t* from) { d = *from; }
inline void red_release_gpu_global_add_u32(uint32_t* to, uint32_t x) { *to += x; }
