// A kernel for tests: out = a @ b.T by one chain of `mma`, which shows how a tensor core sums.
//
// a    [16 * blocks, width]    width is a multiple of 16
// b    [8, width]
// out  [16 * blocks, 8]        float32; a block of one warp computes 16 rows

#include "common.h"

extern "C" __global__ void mma_chain(const Half *a, const Half *b, int width, float *out) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    a += 16 * blockIdx.x * width;
    out += 16 * 8 * blockIdx.x;
    float c[4] = {};
    for (int column = 2 * t; column < width; column += 16) {
        const auto at = [=](const Half *matrix, int row, int to_the_right) {
            const Half *const first = matrix + row * width + column + to_the_right;
            return pair(first[0], first[1]);
        };
        mma(c, {at(a, g, 0), at(a, g + 8, 0), at(a, g, 8), at(a, g + 8, 8)}, {at(b, g, 0), at(b, g, 8)});
    }
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}
