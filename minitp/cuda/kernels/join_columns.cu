// join_columns: completes an all-gather by concatenating the ranks' columns.
//
// gathered is [ranks, rows, widest]; the first ends[r] - ends[r - 1] columns of rank r go to columns
// ends[r - 1] .. ends[r] - 1 of out [rows, stride]. ends is [ranks]. There is one thread per element of out.

#include "common.h"

extern "C" __global__ void join_columns(const float *gathered, const int *ends, float *out, int ranks,
                                        int widest, int stride) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x, row = blockIdx.x;
    if (column >= ends[ranks - 1]) return;
    int rank = 0;
    while (ends[rank] <= column) rank++;
    const int start = rank == 0 ? 0 : ends[rank - 1];
    const long long from = (static_cast<long long>(rank) * gridDim.x + row) * widest + column - start;
    out[static_cast<long long>(row) * stride + column] = gathered[from];
}
