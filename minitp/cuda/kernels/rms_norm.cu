// rms_norm: the counterpart of ops.rms_norm (of ops.rms_norm_plus_one with -DPLUS_ONE), with the residual addition
// before it.
//
// A block computes one row. x and out are [rows, width], weight is [width]; width is a multiple of 8, and the columns
// after the first `size` are padding, which is zero. If there is an `addend`, the kernel first computes
// x += (addend + bias) * multiplier (the residual stream), rounded after each operation, and writes x back; bias
// [width] may be null. With -DPOST_NORM, the same norm with the weight post_weight [width] is applied to
// addend + bias first.

#include "common.h"

// Returns 8 columns of addend + bias.
__device__ inline Half8 sum_of(const Half8 *addend, const Half8 *bias, int i) {
    Half8 sum = addend[i];
    if (bias != nullptr) {
        const Half8 biases = bias[i];
        for (int j = 0; j < 8; j++) sum.at[j] = to_half(to_float(sum.at[j]) + to_float(biases.at[j]));
    }
    return sum;
}

extern "C" __global__ void rms_norm(Half *x, const Half *addend, const Half *bias, const Half *post_weight,
                                    const Half *weight, Half *out, int width, int size, float multiplier,
                                    float eps) {
    __shared__ float scratch[WARP];
    wait_for_previous();
    let_next_start();
    const long long row = static_cast<long long>(blockIdx.x) * width;
    Half8 *const x8 = reinterpret_cast<Half8 *>(x + row);
    const Half8 *const addend8 = addend == nullptr ? nullptr : reinterpret_cast<const Half8 *>(addend + row);
    const Half8 *const bias8 = reinterpret_cast<const Half8 *>(bias);
    const Half8 *const weight8 = reinterpret_cast<const Half8 *>(weight);
    Half8 *const out8 = reinterpret_cast<Half8 *>(out + row);

#ifdef POST_NORM
    const Half8 *const post8 = reinterpret_cast<const Half8 *>(post_weight);
    float sum_squares = 0;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        const Half8 sums = sum_of(addend8, bias8, i);
        for (int j = 0; j < 8; j++) sum_squares += to_float(sums.at[j]) * to_float(sums.at[j]);
    }
    const float sum_rms = sqrtf(block_sum(sum_squares, scratch) / size + eps);
#endif
    float squares = 0;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        Half8 values = x8[i];
        if (addend8 != nullptr) {
            Half8 added = sum_of(addend8, bias8, i);
#ifdef POST_NORM
            const Half8 gains = post8[i];
            for (int j = 0; j < 8; j++) added.at[j] = with_gain(to_float(added.at[j]) / sum_rms, gains.at[j]);
#endif
            for (int j = 0; j < 8; j++) {
                values.at[j] = to_half(to_float(values.at[j]) + rounded(to_float(added.at[j]) * multiplier));
            }
            x8[i] = values;
        }
        for (int j = 0; j < 8; j++) squares += to_float(values.at[j]) * to_float(values.at[j]);
    }
    const float rms = sqrtf(block_sum(squares, scratch) / size + eps);
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        const Half8 values = x8[i], weights = weight8[i];
        Half8 result;
        for (int j = 0; j < 8; j++) result.at[j] = with_gain(to_float(values.at[j]) / rms, weights.at[j]);
        out8[i] = result;
    }
}
