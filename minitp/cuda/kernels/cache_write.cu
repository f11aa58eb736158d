// cache_write: the work of prefill between the joined projection and attention; the counterpart of ops.apply_rope
// and PagedCache.append.
//
//   qkv      [n, (H + 2K) d]     all q heads, rotated in place, then k, then v; d = HEAD_DIM, a multiple of 8
//   cos      [n, d / 2]          cosines of each token's angles; sin has the sines
//   slots    [n]                 the cache slot for each token's k and v; -1 for none
//   k_cache  [K, capacity, d]    the rotated keys of one layer, an output; v_cache has the values, unchanged
//
// A block handles one token. A thread handles 4 elements of the first half of a head, and the 4 elements that they
// are rotated with. Loads are 8 bytes wide, because half a head need not be a multiple of 8 elements.

#include "common.h"

extern "C" __global__ void cache_write(Half *qkv, const float *cos, const float *sin, const int *slots,
                                       Half *k_cache, Half *v_cache, int heads, int kv_heads, int capacity) {
    constexpr int HALF = HEAD_DIM / 2;
    const long long token = blockIdx.x;
    const int all_heads = heads + 2 * kv_heads, slot = slots[token];
    for (int i = threadIdx.x; i < all_heads * (HALF / 4); i += blockDim.x) {
        const int head = i / (HALF / 4), column = i % (HALF / 4) * 4;
        Half *const from = qkv + (token * all_heads + head) * HEAD_DIM + column;
        Half4 low = *reinterpret_cast<Half4 *>(from), high = *reinterpret_cast<Half4 *>(from + HALF);
        if (head < heads + kv_heads) {
            for (int j = 0; j < 4; j++) {
                const float c = cos[token * HALF + column + j], s = sin[token * HALF + column + j];
                float x = to_float(low.at[j]), y = to_float(high.at[j]);
                turn(x, y, c, s);
                low.at[j] = to_half(x);
                high.at[j] = to_half(y);
            }
        }
        Half *to = from;
        if (head >= heads) {
            if (slot < 0) continue;
            const int kv_head = (head - heads) % kv_heads;
            const long long row = static_cast<long long>(kv_head) * capacity + slot;
            to = (head < heads + kv_heads ? k_cache : v_cache) + row * HEAD_DIM + column;
        }
        *reinterpret_cast<Half4 *>(to) = low;
        *reinterpret_cast<Half4 *>(to + HALF) = high;
    }
}
