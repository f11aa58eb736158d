// Runs a CUDA kernel's source on the CPU: one fiber per thread of a block, one block after the other.
//
// This finds wrong indices, reductions, masks and shapes, and barriers that not all threads reach. It does not find
// races or missing fences: fibers switch only where they wait, so memory accesses are always in order.

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
    unsigned words[LANES][8];  // values that the lanes exchange
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
    memset(shared.data(), 0xff, shared.size());  // NaN, so that reading unwritten memory shows
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
            if (_setjmp(scheduler) != 0) continue;  // the fiber waits, or is done
            if (fiber.begun) _longjmp(fiber.here, 1);
            fiber.begun = true;
            setcontext(&fiber.start);
        }
        if (!moved) fail("a barrier that not all threads reach");
    }
}

template <class... Parameters, size_t... Numbers>
void call(void (*kernel)(Parameters...), void **values, std::index_sequence<Numbers...>) {
    kernel(*static_cast<std::remove_const_t<Parameters> *>(values[Numbers])...);
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void **values) {
    const int threads = block.x * block.y * block.z;
    if (threads % LANES != 0 || threads > 1024) fail("a block must have a multiple of 32 threads, at most 1024");
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

}  // namespace cuda_on_cpu

#include "intrinsics.h"
