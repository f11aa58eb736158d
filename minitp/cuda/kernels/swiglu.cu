// swiglu: the counterpart of ops.swiglu, for the many rows of a prefill; with -DGELU that of ops.geglu.
//
// gate_up is [rows, 2 columns], the gate columns first; out is [rows, stride] with stride >= columns, and its extra
// columns become zero. There is one thread per element of out.

#include "common.h"

extern "C" __global__ void swiglu(const Half *gate_up, Half *out, int columns, int stride) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= stride) return;
    const long long row = blockIdx.x;
    float result = 0;
    if (column < columns) {
        const Half *const gates = gate_up + row * 2 * columns;
        const float gate = to_float(gates[column]), up = to_float(gates[columns + column]);
        result = activated(gate) * up;
    }
    out[row * stride + column] = to_half(result);
}
