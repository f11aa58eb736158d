// read_memory: nothing but loads, as linear.cu makes them, for how fast a GPU's memory can be read.
//
//   data  unsigned [gridDim.x * THREADS * LOADS * 4]
//   out   unsigned [gridDim.x]     for each block the sum, over its loads of 16 bytes, of the xor of their four
//                                  words: so that no load can be left out
//
// A block reads one piece of LOADS times 16 bytes a thread, and makes room for the next: on an H100 that is some
// 3% faster than blocks that stay and go over several pieces.

#include "common.h"

constexpr int THREADS = 256, LOADS = 2;

extern "C" __global__ void __launch_bounds__(THREADS) read_memory(const unsigned *data, unsigned *out) {
    __shared__ unsigned room[WARP];
    const long long piece = static_cast<long long>(blockIdx.x) * THREADS * LOADS;
    const uint4 *const from = reinterpret_cast<const uint4 *>(data) + piece + threadIdx.x;
    uint4 words[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) words[i] = load_once(from + i * THREADS, true);
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) sum += words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
