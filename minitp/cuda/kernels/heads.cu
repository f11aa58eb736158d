// heads: the work between the joined projection and attention for families for which linear.cu's qkv and
// cache_write.cu do not suffice; the counterpart of ops.rms_norm of each head (of ops.rms_norm_plus_one with
// -DPLUS_ONE), ops.apply_rope and PagedCache.append.
//
//   qkv       [n, (H + 2K) d]      all q heads, then k, then v; d is even
//   q_norm    [d]                  the weight of the norm of each q head, or null; k_norm is that of each k head
//   cos       [n, rotary_dim / 2]  cosines of each token's angles; sin has the sines
//   slots     [n]                  the cache slot for each token's k and v; -1 for none
//   q         [n, H, stride]                the normed and rotated queries, an output; stride is at least d, and the
//   k_cache   [K, capacity, stride]         columns after d are not written. k_cache has the normed and rotated keys
//   v_cache   [K, capacity, stride]         of one layer, v_cache the values, unchanged
//
// The grid is (n, heads of all three kinds / WARPS). A warp handles one head of one token. RoPE rotates the first
// rotary_dim dimensions, an even number.

#include "common.h"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS * WARP) heads(
    const Half *qkv, const Half *q_norm, const Half *k_norm, float eps, const float *cos, const float *sin,
    const int *slots, Half *q, Half *k_cache, Half *v_cache, int q_heads, int kv_heads, int head_dim,
    int rotary_dim, int stride, int capacity) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y * WARPS + threadIdx.x / WARP;
    const int all_heads = q_heads + 2 * kv_heads, half = rotary_dim / 2;
    const long long token = blockIdx.x;
    if (head >= all_heads) return;
    const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
    if (!is_q && slots[token] < 0) return;

    const Half *const from = qkv + (token * all_heads + head) * head_dim;
    Half *to = q + (token * q_heads + head) * stride;
    if (!is_q) {
        const long long row = static_cast<long long>((head - q_heads) % kv_heads) * capacity + slots[token];
        to = (is_v ? v_cache : k_cache) + row * stride;
    }
    const Half *const norm = is_q ? q_norm : is_v ? nullptr : k_norm;
    float rms = 1;
    if (norm != nullptr) {
        float squares = 0;
        for (int i = lane; i < head_dim; i += WARP) squares += to_float(from[i]) * to_float(from[i]);
        rms = sqrtf(warp_sum(squares) / head_dim + eps);
    }
    const auto normed = [=](int i) {
        return norm == nullptr ? from[i] : with_gain(to_float(from[i]) / rms, norm[i]);
    };
    for (int i = lane; i < half; i += WARP) {
        float left = to_float(normed(i)), right = to_float(normed(i + half));
        if (!is_v) turn(left, right, cos[token * half + i], sin[token * half + i]);
        to[i] = to_half(left);
        to[i + half] = to_half(right);
    }
    for (int i = 2 * half + lane; i < head_dim; i += WARP) to[i] = normed(i);
}
