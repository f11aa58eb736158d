// The products of linear.cu for a mixture of experts: each row of x goes through the weights of its own expert.
//
//     expert_swiglu  out = silu(gate) * up of y = [gate | up]     counterpart of moe.experts_act
//     expert_down    out = y, in float32                          the products of moe.experts_partial
//
// weights  [outputs, width]   the matrix of expert 0; all have the same shape
// offsets  [experts]          distance from there to the matrix of each expert, in elements
// slots    [slots, 4]         from route.cu: an expert, its first row, its number of rows (0: the slot is not used), 0
//
// The rows are the pairs of a token and one of its experts, sorted by expert; out has a row for each of them. A column
// of blocks (blockIdx.y) computes the rows of one slot, up to TOKENS rows of one expert, which share each load of its
// weights. So only the weights of chosen experts are read. The blocks of an unused slot leave at once.

#define EXPERTS
#include "linear.cu"

struct Slot {
    int expert, first, rows;
};

__device__ inline Slot slot_of_block(const int *slots) {
    const int *const slot = slots + 4 * blockIdx.y;
    return {slot[0], slot[1], slot[2]};
}

// x [tokens, width]; token_of [rows], the row of x for each row of out; weights [2 columns, width], the gate rows
// first; out [rows, columns], its rows `stride` apart.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    expert_swiglu(const Half *x, const Half *weights, const long long *offsets, const Half *norm, float eps,
                  int norm_size, const int *slots, const int *token_of, int width, int columns, Half *out, int stride) {
    wait_for_previous();  // before the slots are read
    const Slot slot = slot_of_block(slots);
    if (slot.rows == 0) return;
    const int *const tokens = token_of + slot.first;
    const Product p = {x, weights + offsets[slot.expert], norm, eps, norm_size,
                       slot.rows, width, 2 * columns, tokens};
    const auto rows_of = [=](int n) { return Rows{n, n + columns}; };
    Half *const first_out = out + static_cast<long long>(slot.first) * stride;
    multiply(p, columns, rows_of, [=](int token, int n, float first, float second) {
        const float gate = rounded(first), up = rounded(second);
        first_out[token * stride + n] = to_half(activated(gate) * up);
    });
}

// x [rows, width]; weights [outputs, width]; out [rows, outputs], its rows `stride` apart.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    expert_down(const Half *x, const Half *weights, const long long *offsets, const int *slots, int width,
                int outputs, float *out, int stride) {
    wait_for_previous();  // before the slots are read
    const Slot slot = slot_of_block(slots);
    if (slot.rows == 0) return;
    const Half *const first_x = x + static_cast<long long>(slot.first) * width;
    float *const first_out = out + static_cast<long long>(slot.first) * stride;
    const Product p = {first_x, weights + offsets[slot.expert], nullptr, 0, 0, slot.rows,
                       width, outputs, nullptr};
    multiply(p, [=](int token, int n, float y) { first_out[token * stride + n] = y; });
}
