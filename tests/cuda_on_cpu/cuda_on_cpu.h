// Runs a CUDA kernel's source on the CPU: one fiber per thread of a block, one block after the other.
//
// This finds wrong indices, reductions, masks and shapes, and barriers that not all threads reach. It does not find
// missing fences: fibers switch only where they wait, so memory accesses are always in order. It finds some races: the
// threads take turns, each until it waits, in ascending order in every second block and in descending order in the others.
//
// The blocks of a cluster take turns: each runs until all of its threads wait at the cluster's barrier or have ended.
// Other blocks can read its dynamic shared memory. Its `__shared__` variables exist once, so after the cluster's
// barrier they have the contents of another block.
//
// A kernel that is launched as a dependent must wait for the previous kernel on every thread, before it lets the next
// kernel start. If there is a `previous`, a function that runs the previous kernel, it is called once the threads of the
// first cluster wait. No GPU runs the previous kernel later than that, so a kernel that reads its results too early, or
// writes before it waits, computes something wrong.

#pragma once

#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <tuple>
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

enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_PREVIOUS, DONE };

struct Fiber {
    jmp_buf here;
    ucontext_t start;
    State state;
    dim3 index;
    bool begun, has_waited;
};

struct Warp {
    unsigned words[LANES][8];  // values that the lanes exchange
    int waiting;
};

struct Block {
    dim3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char> shared;
    int alive, at_block;
};

static std::vector<Block> blocks;  // those of the cluster that runs
static Block *block;               // the block that runs
static std::vector<char> stacks;
static jmp_buf scheduler;
static int current;
static bool dependent;
static void (*previous)();  // null once it has run
static std::function<void()> body;

inline void fail(const char *what) {
    fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %d)\n", what, blockIdx.x, current);
    abort();
}

inline void *dynamic_shared() { return block->shared.data(); }

inline void wait_as(State state) {
    Fiber &fiber = block->fibers[current];
    fiber.state = state;
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
}

inline void warp_barrier() {
    Warp &warp = block->warps[current / LANES];
    if (++warp.waiting < LANES) return wait_as(AT_WARP);
    warp.waiting = 0;
    for (int i = current / LANES * LANES, last = i + LANES; i < last; i++) block->fibers[i].state = READY;
}

inline void block_barrier() {
    if (++block->at_block < static_cast<int>(block->fibers.size())) return wait_as(AT_BLOCK);
    block->at_block = 0;
    for (Fiber &fiber : block->fibers) fiber.state = READY;
}

inline int cluster_rank() { return block - blocks.data(); }

// Returns where block `rank` of the cluster has what this block has at `own`, in dynamic shared memory.
inline const void *in_block(const void *own, int rank) {
    const long offset = static_cast<const char *>(own) - block->shared.data();
    if (offset < 0 || offset >= static_cast<long>(block->shared.size())) fail("not in dynamic shared memory");
    if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("a block outside the cluster");
    if (blocks[rank].alive == 0) fail("a read of the shared memory of a block that has ended");
    return blocks[rank].shared.data() + offset;
}

inline void wait_for_previous() {
    if (previous != nullptr && !block->fibers[current].has_waited) wait_as(AT_PREVIOUS);
    block->fibers[current].has_waited = true;
}

inline void let_next_start() {
    if (dependent && !block->fibers[current].has_waited) fail("let_next_start before wait_for_previous");
}

inline void enter() {
    body();
    if (dependent && !block->fibers[current].has_waited) fail("a thread of a dependent kernel that never waits");
    block->fibers[current].state = DONE;
    block->alive--;
    _longjmp(scheduler, 1);
}

inline void begin_block(int rank) {
    const int threads = block->fibers.size();
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = block->fibers[i];
        fiber.state = READY;
        fiber.begun = fiber.has_waited = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks.data() + (rank * threads + i) * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    memset(block->shared.data(), 0xff, block->shared.size());  // NaN, so that reading unwritten memory shows
    for (Warp &warp : block->warps) warp.waiting = 0;
    block->alive = threads;
    block->at_block = 0;
}

// Runs the current block until all of its threads wait at the cluster's barrier or have ended.
inline void run_block() {
    const int threads = block->fibers.size();
    const bool backward = (block->index.x + block->index.y + block->index.z) % 2 == 0;
    static bool moved;
    static int turn;
    do {
        moved = false;
        for (turn = 0; turn < threads; turn++) {
            current = backward ? threads - 1 - turn : turn;
            Fiber &fiber = block->fibers[current];
            if (fiber.state != READY) continue;
            moved = true;
            threadIdx = fiber.index;
            blockIdx = block->index;
            if (_setjmp(scheduler) != 0) continue;  // the fiber waits, or is done
            if (fiber.begun) _longjmp(fiber.here, 1);
            fiber.begun = true;
            setcontext(&fiber.start);
        }
    } while (moved);
    for (const Fiber &fiber : block->fibers) {
        if (fiber.state == AT_WARP || fiber.state == AT_BLOCK) fail("a barrier that not all threads reach");
    }
}

// Runs the previous kernel, which may be one of this library too.
inline void run_previous() {
    const auto saved = std::make_tuple(blockIdx, blockDim, gridDim, dependent, body);
    std::vector<Block> own_blocks;
    std::vector<char> own_stacks;
    own_blocks.swap(blocks);
    own_stacks.swap(stacks);
    previous();
    own_blocks.swap(blocks);
    own_stacks.swap(stacks);
    std::tie(blockIdx, blockDim, gridDim, dependent, body) = saved;
    previous = nullptr;
}

inline void run_cluster() {
    int alive = 0;
    for (Block &one : blocks) {
        block = &one;
        begin_block(block - blocks.data());
        alive += block->alive;
    }
    while (alive > 0) {
        alive = 0;
        for (int rank = blocks.size() - 1; rank >= 0; rank--) {  // the first block usually reads from the others
            block = &blocks[rank];
            run_block();
            alive += block->alive;
        }
        if (previous != nullptr) run_previous();
        for (Block &one : blocks) {
            for (Fiber &fiber : one.fibers) {
                if (fiber.state != DONE) fiber.state = READY;
            }
        }
    }
}

template <class... Parameters, size_t... Numbers>
void call(void (*kernel)(Parameters...), void **values, std::index_sequence<Numbers...>) {
    kernel(*static_cast<std::remove_const_t<Parameters> *>(values[Numbers])...);
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, int cluster, bool as_dependent,
            void (*before)(), void **values) {
    const int threads = size.x * size.y * size.z;
    if (threads % LANES != 0 || threads > 1024) fail("a block must have a multiple of 32 threads, at most 1024");
    if (grid.x % cluster != 0) fail("the grid is not a whole number of clusters");
    gridDim = grid;
    blockDim = size;
    dependent = as_dependent;
    previous = before;
    blocks.resize(cluster);
    stacks.resize(std::max(stacks.size(), cluster * threads * STACK));
    for (Block &one : blocks) {
        one.fibers.resize(threads);
        one.warps.resize(threads / LANES);
        one.shared.resize(shared_bytes + 16);
        for (int i = 0; i < threads; i++) {
            one.fibers[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        }
    }
    body = [=] { call(kernel, values, std::index_sequence_for<Parameters...>()); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x += cluster) {
                for (int rank = 0; rank < cluster; rank++) blocks[rank].index = {x + rank, y, z};
                run_cluster();
            }
}

}  // namespace cuda_on_cpu

#include "intrinsics.h"
