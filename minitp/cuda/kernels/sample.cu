// sample: the counterpart of sampling.Sampler.choose and of token_probabilities, which it calls.
//
// A block handles one row of logits; each thread has 4 loads of 16 bytes in flight.
//   logits float [B, size], rows `stride` apart, a multiple of 4 (up to 3 after a row are read but not used)
//   temperature double [B]     0 means greedy, with the lowest id among equals; below 0, the token is left unchanged
//   top_k int [B]              0 means all
//   top_p double [B]           1 or more means all
//   draw double [B]            uniform in [0, 1), from the host's generator
//   token int [B]
//
// Greedy takes one pass over the row. Sampling does not sort: it finds the key of the least probable token to keep
// four bits at a time, and narrows the ids down to the drawn token by a factor of eight at a time. top_k takes 8
// passes over the row, top_p takes 9, ties take one more for each, and the choice takes 2. Probabilities and their
// sums are doubles, as on the host; only the order of summation differs. There are no atomics, so every run gives
// the same sums: each thread adds to its own column of the histogram, which takes 32 KiB. A row with NaN or +inf,
// or with only -inf, gets the greedy choice, for which NaN is the largest value.

#include "common.h"

constexpr int THREADS = 256, WARPS = THREADS / WARP, DIGIT_BITS = 4, DIGITS = 1 << DIGIT_BITS, IN_FLIGHT = 4;

struct Row {
    const float *logits;
    int size;
};

struct Scratch {  // shared memory of a block
    double histogram[DIGITS][THREADS];
    double sums[WARP];  // one per digit, or one per warp
};

// Returns an unsigned number; keys have the order of the logits and are equal for equal logits.
__device__ inline unsigned key_of(float logit) {
    if (logit != logit) return 0xffffffffu;
    const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float logit_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The tokens that are kept: those above `key`, and those equal to it with ids up to `last`.
struct Kept {
    unsigned key;
    int last;
    __device__ bool has(int id, unsigned id_key) const {
        return id_key > key || (id_key == key && id <= last);
    }
};

// Calls use(id, logit) for this thread's part of the ids from start (a multiple of 4) to stop - 1. The ids are in
// groups of four; this thread has the groups first, first + stride, first + 2 stride, ..
template <class Use>
__device__ inline void visit(Row row, int start, int stop, int first, int stride, Use use) {
    const float4 *const fours = reinterpret_cast<const float4 *>(row.logits);
    const int end = (stop + 3) / 4;
    for (int i = start / 4 + first; i < end; i += IN_FLIGHT * stride) {
        float4 loaded[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) loaded[j] = __ldg(fours + min(i + j * stride, end - 1));
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) {
            const float four[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int id = 4 * (i + j * stride) + k;
                if (id < stop) use(id, four[k]);
            }
        }
    }
}

// Returns the id of the largest logit.
__device__ inline int best_of(Row row, unsigned long long *scratch) {
    unsigned long long best = 0;  // the key, then the inverted id in the low bits, so that the lowest id wins
    visit(row, 0, row.size, threadIdx.x, THREADS, [&](int id, float logit) {
        best = max(best, static_cast<unsigned long long>(key_of(logit)) << 32 | (0xffffffffu - id));
    });
    for (int offset = WARP / 2; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, offset));
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = best;
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) best = max(best, scratch[warp]);
    return 0xffffffffu - static_cast<unsigned>(best);
}

template <class Weigh>
__device__ inline double weight_of_all(Row row, Weigh weigh, Scratch &scratch) {
    double sum = 0;
    visit(row, 0, row.size, threadIdx.x, THREADS, [&](int id, float logit) { sum += weigh(id, logit); });
    return block_sum(sum, scratch.sums);
}

struct Boundary {
    unsigned key;
    double above;  // total weight of the tokens above the key
};

// Returns the largest key for which the tokens at or above it weigh at least `target` in total. If rounding keeps
// all tokens below `target`, the key is below every token with a weight.
template <class Weigh>
__device__ inline Boundary boundary_of(Row row, double target, Weigh weigh, Scratch &scratch) {
    Boundary found = {0, 0};
    unsigned known = 0;  // mask of the bits of found.key that are known
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        for (int digit = 0; digit < DIGITS; digit++) scratch.histogram[digit][threadIdx.x] = 0;
        visit(row, 0, row.size, threadIdx.x, THREADS, [&](int id, float logit) {
            const unsigned key = key_of(logit);
            if (((key ^ found.key) & known) != 0) return;
            scratch.histogram[key >> shift & (DIGITS - 1)][threadIdx.x] += weigh(id, logit);
        });
        __syncthreads();
        for (int digit = threadIdx.x / WARP; digit < DIGITS; digit += WARPS) {
            double sum = 0;
            for (int i = threadIdx.x % WARP; i < THREADS; i += WARP) sum += scratch.histogram[digit][i];
            sum = warp_sum(sum);
            if (threadIdx.x % WARP == 0) scratch.sums[digit] = sum;
        }
        __syncthreads();
        unsigned digit = DIGITS - 1;
        while (digit > 0 && found.above + scratch.sums[digit] < target) found.above += scratch.sums[digit--];
        found.key |= digit << shift;
        known |= (DIGITS - 1u) << shift;
    }
    return found;
}

// Returns the first part at which the running sum of the weights exceeds `target`, and reduces `target` by the sum
// before that part. If rounding keeps the sum from exceeding it, returns the last part with a weight.
__device__ inline int exceeding(double &target, int parts, const double *weights) {
    double sum = 0, before = 0;
    int part = 0;
    for (int i = 0; i < parts && sum <= target; i++) {
        if (weights[i] == 0) continue;
        part = i;
        before = sum;
        sum += weights[i];
    }
    target -= before;
    return part;
}

// Returns the first id at which the running sum of the weights exceeds `target`.
template <class Weigh>
__device__ inline int id_of(Row row, double target, Weigh weigh, Scratch &scratch) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int start = 0, stop = row.size;
    while (stop - start > 4) {  // each warp weighs an eighth of the ids, in whole groups of four
        const int part = (stop - start + 4 * WARPS - 1) / (4 * WARPS) * 4;
        const int begin = start + warp * part;
        double sum = 0;
        visit(row, begin, min(begin + part, stop), lane, WARP,
              [&](int id, float logit) { sum += weigh(id, logit); });
        sum = warp_sum(sum);
        __syncthreads();  // all threads have read the previous contents of `scratch`
        if (lane == 0) scratch.sums[warp] = sum;
        __syncthreads();
        start += exceeding(target, WARPS, scratch.sums) * part;
        stop = min(start + part, stop);
    }
    double weights[4];
    for (int i = 0; i < stop - start; i++) weights[i] = weigh(start + i, row.logits[start + i]);
    return start + exceeding(target, stop - start, weights);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const float *logits, const double *temperature,
                                                             const int *top_k, const double *top_p,
                                                             const double *draw, int *token, int size,
                                                             int stride) {
    __shared__ Scratch scratch;
    __shared__ unsigned long long bests[WARPS];
    const Row row = {logits + static_cast<long long>(blockIdx.x) * stride, size};
    const double row_temperature = temperature[blockIdx.x], p = top_p[blockIdx.x];
    const int k = top_k[blockIdx.x];
    if (row_temperature < 0) return;

    int chosen = best_of(row, bests);
    const float best = row.logits[chosen];
    const bool finite = best - best == 0;
    if (row_temperature > 0 && finite) {
        Kept kept = {0, size - 1};
        const auto probability = [&](float logit) {  // not normalized
            return exp((static_cast<double>(logit) - best) / row_temperature);
        };
        const auto weigh = [&](int id, float logit) {
            return kept.has(id, key_of(logit)) ? probability(logit) : 0.0;
        };
        // Among the tokens that tie at the boundary, those with the lowest ids are kept, as many as are needed.
        const auto cut = [&](Boundary boundary, double needed) {
            if (boundary.key < kept.key) return;  // below every token with a weight
            const auto ties = [&](int id, float logit) {
                return key_of(logit) == boundary.key && kept.has(id, boundary.key) ? 1.0 : 0.0;
            };
            kept = {boundary.key, id_of(row, needed - 1, ties, scratch)};
        };
        if (k > 0 && k < size) {
            const Boundary boundary = boundary_of(row, k, [](int, float) { return 1.0; }, scratch);
            cut(boundary, k - boundary.above);
        }
        if (p < 1) {
            const double target = p * weight_of_all(row, weigh, scratch);
            const Boundary boundary = boundary_of(row, target, weigh, scratch);
            cut(boundary, ceil((target - boundary.above) / probability(logit_of(boundary.key))));
        }
        chosen = id_of(row, draw[blockIdx.x] * weight_of_all(row, weigh, scratch), weigh, scratch);
    }
    if (threadIdx.x == 0) token[blockIdx.x] = chosen;
}
