// rms_norm: the counterpart of ops.rms_norm, with the residual addition before it.
//
// A block computes one row. x and out are [rows, width], weight is [width]; width is a multiple of 8. If there is an
// `addend`, the kernel first computes x += addend (the residual stream, rounded like `x + addend`) and writes x back.
// With a `bias` [width] too, it computes x += addend + bias, rounded after each addition.

#include "common.h"

extern "C" __global__ void rms_norm(Half *x, const Half *addend, const Half *bias, const Half *weight,
                                    Half *out, int width, float eps) {
    __shared__ float scratch[WARP];
    wait_for_previous();
    let_next_start();
    const long long row = static_cast<long long>(blockIdx.x) * width;
    Half8 *const x8 = reinterpret_cast<Half8 *>(x + row);
    const Half8 *const addend8 = addend == nullptr ? nullptr : reinterpret_cast<const Half8 *>(addend + row);
    const Half8 *const bias8 = reinterpret_cast<const Half8 *>(bias);
    const Half8 *const weight8 = reinterpret_cast<const Half8 *>(weight);
    Half8 *const out8 = reinterpret_cast<Half8 *>(out + row);

    float squares = 0;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        Half8 values = x8[i];
        if (addend8 != nullptr) {
            Half8 addends = addend8[i];
            if (bias8 != nullptr) {
                const Half8 biases = bias8[i];
                for (int j = 0; j < 8; j++) addends.at[j] = to_half(to_float(addends.at[j]) + to_float(biases.at[j]));
            }
            for (int j = 0; j < 8; j++) values.at[j] = to_half(to_float(values.at[j]) + to_float(addends.at[j]));
            x8[i] = values;
        }
        for (int j = 0; j < 8; j++) squares += to_float(values.at[j]) * to_float(values.at[j]);
    }
    const float rms = sqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        const Half8 values = x8[i], weights = weight8[i];
        Half8 result;
        for (int j = 0; j < 8; j++) {
            result.at[j] = to_half(rounded(to_float(values.at[j]) / rms) * to_float(weights.at[j]));
        }
        out8[i] = result;
    }
}
