// expert_sum: the weighted sum of the outputs of each token's experts; the counterpart of the sum in
// moe.experts_partial. It also adds the sum to the residual stream if there is only one rank.
//
//   y         [rows, y_stride]      float: the outputs of expert_linear.cu, sorted by expert
//   position  [tokens, per_token]   the row of each of a token's experts in ascending order; -1 for padding
//   weights   [tokens, per_token]   float
//   out       [tokens, stride]      16-bit: the sum, or, with `adds`, out + the sum; the first `columns` are written
//
// The sum is in float32 and in the order of the experts, and rounded once, before the addition. Each product is
// rounded before it is added, as in separate operations.

#include "common.h"

extern "C" __global__ void expert_sum(const float *y, const int *position, const float *weights, int per_token,
                                      int y_stride, Half *out, int columns, int stride, int adds) {
    wait_for_previous();
    let_next_start();
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const long long token = blockIdx.x;
    float total = 0;
    for (int n = 0; n < per_token; n++) {
        const long long row = position[token * per_token + n];
        if (row < 0) continue;
        total = __fadd_rn(total, __fmul_rn(weights[token * per_token + n], y[row * y_stride + column]));
    }
    Half *const value = out + token * stride + column;
    *value = to_half(adds ? to_float(*value) + rounded(total) : total);
}
