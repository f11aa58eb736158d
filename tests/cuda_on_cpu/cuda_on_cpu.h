// Runs a CUDA kernel's source on the CPU: a fiber for each thread of a block, one block after another.
//
// Finds wrong indices, reductions, masks, shapes and barriers that not all threads come to. Does not find
// races or a missing fence: fibers change only where they wait, so memory is always in order.

#pragma once

#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int LANES = 32;
constexpr size_t STACK = 64 << 10;

enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    jmp_buf here;
    ucontext_t start;
    State state;
    dim3 index;
    bool begun;
};

struct Warp {
    unsigned words[LANES][8];  // what each lane shows the others
    int waiting;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<char> stacks, shared;
static jmp_buf scheduler;
static int current, alive, at_block;
static bool moved;
static std::function<void()> body;

inline void fail(const char *what) {
    fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %d)\n", what, blockIdx.x, current);
    abort();
}

inline void *dynamic_shared() { return shared.data(); }

inline void wait_as(State state) {
    Fiber &fiber = fibers[current];
    fiber.state = state;
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
}

inline void warp_barrier() {
    Warp &warp = warps[current / LANES];
    if (++warp.waiting < LANES) return wait_as(AT_WARP);
    warp.waiting = 0;
    for (int i = current / LANES * LANES, last = i + LANES; i < last; i++) fibers[i].state = READY;
}

inline void block_barrier() {
    if (++at_block < static_cast<int>(fibers.size())) return wait_as(AT_BLOCK);
    at_block = 0;
    for (Fiber &fiber : fibers) fiber.state = READY;
}

inline void enter() {
    body();
    fibers[current].state = DONE;
    alive--;
    _longjmp(scheduler, 1);
}

inline void run_block() {
    const int threads = fibers.size();
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.state = READY;
        fiber.begun = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks.data() + i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    memset(shared.data(), 0xff, shared.size());  // NaN: nobody may read what nobody has written
    for (Warp &warp : warps) warp.waiting = 0;
    alive = threads;
    at_block = 0;
    while (alive > 0) {
        moved = false;
        for (current = 0; current < threads; current++) {
            Fiber &fiber = fibers[current];
            if (fiber.state != READY) continue;
            moved = true;
            threadIdx = fiber.index;
            if (_setjmp(scheduler) != 0) continue;  // it waits, or is done
            if (fiber.begun) _longjmp(fiber.here, 1);
            fiber.begun = true;
            setcontext(&fiber.start);
        }
        if (!moved) fail("a barrier that not all threads come to");
    }
}

template <class... Parameters, size_t... Numbers>
void call(void (*kernel)(Parameters...), void **values, std::index_sequence<Numbers...>) {
    kernel(*static_cast<std::remove_const_t<Parameters> *>(values[Numbers])...);
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void **values) {
    const int threads = block.x * block.y * block.z;
    if (threads % LANES != 0 || threads > 1024) fail("threads of a block: a multiple of 32, at most 1024");
    gridDim = grid;
    blockDim = block;
    fibers.resize(threads);
    warps.resize(threads / LANES);
    stacks.resize(threads * STACK);
    shared.resize(shared_bytes + 16);
    for (int i = 0; i < threads; i++) {
        fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    body = [=] { call(kernel, values, std::index_sequence_for<Parameters...>()); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block();
            }
}

inline float to_float(unsigned short bits) {
#ifdef BFLOAT16
    const unsigned wide = static_cast<unsigned>(bits) << 16;
    float y;
    memcpy(&y, &wide, 4);
    return y;
#else
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
#endif
}

inline unsigned short to_half(float x) {
    unsigned short bits;
#ifdef BFLOAT16
    if (isnan(x)) return 0x7fff;
    unsigned wide;
    memcpy(&wide, &x, 4);
    bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
#else
    const _Float16 y = x;
    memcpy(&bits, &y, 2);
#endif
    return bits;
}

inline float half_of(unsigned word, int which) { return to_float(which ? word >> 16 : word & 0xffff); }

// As a tensor core: see `mma` in common.h for which lane has what.
inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    Warp &warp = warps[current / LANES];
    const int lane = current % LANES;
    for (int i = 0; i < 4; i++) warp.words[lane][i] = a[i];
    for (int i = 0; i < 2; i++) warp.words[lane][4 + i] = b[i];
    warp_barrier();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const unsigned *of_a = warp.words[row % 8 * 4 + k % 8 / 2];
            const unsigned *of_b = warp.words[column * 4 + k % 8 / 2];
            c[i] += half_of(of_a[(row >= 8) + (k >= 8 ? 2 : 0)], k % 2) * half_of(of_b[4 + (k >= 8)], k % 2);
        }
    }
    warp_barrier();
}

template <class Value>
Value of_lane(Value mine, int lane) {
    static_assert(sizeof(Value) <= sizeof(Warp::words[0]), "too wide to show");
    Warp &warp = warps[current / LANES];
    memcpy(warp.words[current % LANES], &mine, sizeof mine);
    warp_barrier();
    Value its;
    memcpy(&its, warp.words[lane], sizeof its);
    warp_barrier();
    return its;
}

inline unsigned long long load_acquire(const unsigned long long *p) {
    sched_yield();  // the process that is waited for may want this core
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

inline long long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

inline void check_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }

inline int __syncthreads_or(int predicate) {
    static int any;
    any |= predicate != 0;
    __syncthreads();
    const int result = any;
    __syncthreads();
    any = 0;
    __syncthreads();
    return result;
}

inline void __threadfence() {}
inline void __threadfence_system() { __sync_synchronize(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_on_cpu::check_mask(mask);
    cuda_on_cpu::warp_barrier();
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
    cuda_on_cpu::check_mask(mask);
    return cuda_on_cpu::of_lane(value, lane % 32);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits) {
    cuda_on_cpu::check_mask(mask);
    return cuda_on_cpu::of_lane(value, cuda_on_cpu::current % 32 ^ bits);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, int by) {
    cuda_on_cpu::check_mask(mask);
    const int lane = cuda_on_cpu::current % 32;
    return cuda_on_cpu::of_lane(value, lane + by < 32 ? lane + by : lane);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int by) {
    cuda_on_cpu::check_mask(mask);
    const int lane = cuda_on_cpu::current % 32;
    return cuda_on_cpu::of_lane(value, lane >= by ? lane - by : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (__shfl_sync(mask, predicate, lane) != 0) << lane;
    return bits;
}

template <class Value>
Value __ldg(const Value *p) {
    return *p;
}

template <class Value>
Value atomicAdd(Value *p, Value by) {
    const Value before = *p;
    *p += by;
    return before;
}

inline float __expf(float x) { return expf(x); }
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

using std::max;
using std::min;
