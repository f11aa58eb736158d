// route: chooses the experts of each token, and sorts the pairs of a token and an expert by expert; the counterpart of
// moe.route.
//
//   router    [tokens, experts]     the router's logits
//   seen      [tokens] or null      0 for a row that only pads the batch, which gets no expert
//   chosen    [tokens, per_token]   the experts of each token in ascending order; -1 for padding
//   weights   [tokens, per_token]   float: a softmax over the chosen logits if `normalized`, else over all
//   position  [tokens, per_token]   the place of each pair among the sorted ones, its row; -1 for padding
//   token_of  [tokens * per_token]  the token of each row
//   slots     [slot_count, 4]       an expert, its first row, its number of rows, 0: one or more per chosen expert, with
//                                   at most slot_rows rows each; the remaining slots have 0 rows
//   counter   [1]                   zero before a launch, and zero again after it
//
// A warp chooses the experts of a token: the largest logits, and of equal ones the first. The block that finishes last
// sorts the pairs, in a fixed order: by expert, then by token. Its warps take turns at the experts.

#include "common.h"

constexpr int THREADS = 1024, WARPS = THREADS / WARP;

// Returns a number that is unique to each logit of a token: it is larger for a larger logit, and of equal logits for
// the one of the lower expert. NaN counts as the largest, as in argmax.
__device__ inline unsigned key_of(const Half *router, int expert) {
    const float logit = to_float(router[expert]);
    unsigned bits = router[expert].bits;
    if (logit == 0) bits = 0;  // -0 equals 0
    const unsigned order = logit != logit ? 0xffff : bits & 0x8000 ? ~bits & 0xffff : bits | 0x8000;
    return order << 16 | (0xffff - expert);
}

__device__ inline unsigned warp_max(unsigned x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

__device__ inline unsigned lanes_below(int lane) { return (1u << lane) - 1; }

// Chooses the experts of one token; all lanes of a warp call this.
__device__ inline void choose(const Half *router, int experts, int per_token, bool normalized, int *chosen,
                              float *weights) {
    const int lane = threadIdx.x % WARP;
    unsigned lowest = 0xffffffffu, highest = 0;  // keys of the chosen experts
    for (int n = 0; n < per_token; n++) {
        unsigned next = 0;
        for (int expert = lane; expert < experts; expert += WARP) {
            const unsigned key = key_of(router, expert);
            if (key < lowest) next = max(next, key);
        }
        lowest = warp_max(next);
        if (n == 0) highest = lowest;
    }

    const float largest = to_float(router[0xffff - (highest & 0xffff)]);
    float sum = 0;
    for (int expert = lane; expert < experts; expert += WARP) {
        if (!normalized || key_of(router, expert) >= lowest) sum += expf(to_float(router[expert]) - largest);
    }
    sum = warp_sum(sum);
    int found = 0;
    for (int first = 0; first < experts; first += WARP) {
        const int expert = first + lane;
        const bool is_chosen = expert < experts && key_of(router, expert) >= lowest;
        const unsigned lanes = __ballot_sync(ALL_LANES, is_chosen);
        if (is_chosen) {
            const int nth = found + __popc(lanes & lanes_below(lane));
            chosen[nth] = expert;
            weights[nth] = expf(to_float(router[expert]) - largest) / sum;
        }
        found += __popc(lanes);
    }
}

// Sorts the pairs; all threads of a block call this. `counts` is shared memory for the number of rows of each expert.
__device__ inline void sort(const int *chosen, int pairs, int experts, int per_token, int *position, int *token_of,
                            int *slots, int slot_count, int slot_rows, int *counts) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const auto lanes_with = [=](int expert, int first) {
        const int pair = first + lane;
        return __ballot_sync(ALL_LANES, pair < pairs && chosen[pair] == expert);
    };
    for (int i = threadIdx.x; i < slot_count; i += THREADS) slots[4 * i + 2] = 0;
    for (int expert = warp; expert < experts; expert += WARPS) {
        int count = 0;
        for (int first = 0; first < pairs; first += WARP) count += __popc(lanes_with(expert, first));
        if (lane == 0) counts[expert] = count;
    }
    __syncthreads();
    for (int expert = warp; expert < experts; expert += WARPS) {
        int row = 0, slot = 0;  // the first of this expert
        for (int other = lane; other < expert; other += WARP) {
            row += counts[other];
            slot += (counts[other] + slot_rows - 1) / slot_rows;
        }
        row = warp_sum(row);
        slot = warp_sum(slot);
        for (int first = lane * slot_rows; first < counts[expert]; first += WARP * slot_rows) {
            int *const to = slots + 4 * (slot + first / slot_rows);
            to[0] = expert;
            to[1] = row + first;
            to[2] = min(slot_rows, counts[expert] - first);
        }
        for (int first = 0; first < pairs; first += WARP) {
            const unsigned lanes = lanes_with(expert, first);
            if (lanes >> lane & 1) {
                const int at = row + __popc(lanes & lanes_below(lane));
                position[first + lane] = at;
                token_of[at] = (first + lane) / per_token;
            }
            row += __popc(lanes);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    route(const Half *router, const int *seen, int *chosen, float *weights, int *position, int *token_of, int *slots,
          unsigned *counter, int tokens, int experts, int per_token, int normalized, int slot_count, int slot_rows) {
    __shared__ bool last;
    DYNAMIC_SHARED(int, counts);
    wait_for_previous();
    let_next_start();
    const int lane = threadIdx.x % WARP, token = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token < tokens) {
        const long long row = token;
        if (seen == nullptr || seen[token] > 0) {
            choose(router + row * experts, experts, per_token, normalized, chosen + row * per_token,
                   weights + row * per_token);
        } else {
            for (int n = lane; n < per_token; n += WARP) {
                chosen[row * per_token + n] = position[row * per_token + n] = -1;
            }
        }
    }
    __threadfence();  // write the choices before the count
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();  // read the count before the other blocks' choices
    sort(chosen, tokens * per_token, experts, per_token, position, token_of, slots, slot_count, slot_rows, counts);
    if (threadIdx.x == 0) *counter = 0;
}
