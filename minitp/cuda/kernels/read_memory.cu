// read_memory: measures how fast a GPU's memory can be read, by the same loads as in linear.cu and nothing else.
//
//   data  unsigned [gridDim.x * THREADS * LOADS * 4]
//   out   unsigned [gridDim.x]     for each block, the sum over its 16-byte loads of the xor of their four words,
//                                  so that the compiler cannot remove a load
//
// A block reads a single piece, LOADS times 16 bytes per thread. On an H100 this is about 3% faster than blocks that
// read several pieces each.

#include "common.h"

constexpr int THREADS = 256, LOADS = 2;

extern "C" __global__ void __launch_bounds__(THREADS) read_memory(const unsigned *data, unsigned *out) {
    __shared__ unsigned scratch[WARP];
    const long long piece = static_cast<long long>(blockIdx.x) * THREADS * LOADS;
    const uint4 *const from = reinterpret_cast<const uint4 *>(data) + piece + threadIdx.x;
    uint4 words[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) words[i] = load_once(from + i * THREADS, true);
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < LOADS; i++) sum += words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
