// sample: the counterpart of sampling.Sampler.choose and of what it calls, and of sampling.token_logprobs.
//
// A block handles one row of logits; each thread has 4 loads of 16 bytes in flight. A row belongs to a sequence, whose
// settings and last token are kept in a lane, so that a sequence can move to another row.
//   logits float [B, size]     rows `stride` apart, a multiple of 4 (up to 3 after a row are read but not used)
//   lane int [B]               below 0, the row is skipped (padding, or the host chooses)
//   settings [lanes]           see Settings
//   draw double [B]            uniform in [0, 1), from the host's generator
//   chosen int [lanes]         the token of each lane
//   results double [2 + 2 MAX_TOP, B]
//                              a row's token; its log-probability; the id and log-probability of the most probable
//                              token, of the next one, .. (`logprobs` pairs)
//
// Log-probabilities come from the logits as they are. Then those of the tokens in the lane's history are changed by
// bias and penalties as in sampling.changed_logits, one rounding after another, the token is chosen, and the logits are
// restored. The history has an entry for each different token, not one for each token of the vocabulary: its bytes are
// read once per token, and most sequences have few different tokens. The kernel adds the chosen token by itself.
//
// Greedy takes one pass over the row. Sampling does not sort: it finds the key of the least probable token to keep
// four bits at a time, and narrows the ids down to the drawn token by a factor of eight at a time. top_k takes 8
// passes over the row, top_p takes 9, ties take one more for each, and the choice takes 2. Log-probabilities take one,
// and one for each of the most probable tokens. Probabilities and their sums are doubles, as on the host; only the
// order of summation differs. There are no atomics, so every run gives the same sums: each thread adds to its own
// column of the histogram, which takes 32 KiB. A row with NaN or +inf, or with only -inf, gets the greedy choice, for
// which NaN is the largest value.

#include "common.h"

constexpr int THREADS = 256, WARPS = THREADS / WARP, DIGIT_BITS = 4, DIGITS = 1 << DIGIT_BITS, IN_FLIGHT = 4;

struct Row {
    const float *logits;
    int size;
};

// A token whose logit the host's parameters change. The first entry of a history has the number of the others in `id`.
struct alignas(16) Change {
    int id;
    int count;       // how often the continuation has the token; 0 if only the prompt has it, -1 if none has it
    float bias;
    float original;  // the logit while the changed one is in its place
};

struct Settings {
    double temperature;  // 0 means greedy, with the lowest id among equals
    double top_p;        // 1 means all
    double min_p;
    Change *history;     // null if no logits are changed; with room for the chosen tokens
    float repetition, frequency, presence;
    int top_k;           // 0 means all
    int logprobs;        // the number of most probable tokens, up to MAX_TOP; -1 for no log-probabilities
    int unused;
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
// groups of four; this thread has the groups first, first + stride, first + 2 stride, .. The loads are not __ldg, which
// may return what was in a row before `change`.
template <class Use>
__device__ inline void visit(Row row, int start, int stop, int first, int stride, Use use) {
    const float4 *const fours = reinterpret_cast<const float4 *>(row.logits);
    const int end = (stop + 3) / 4;
    for (int i = start / 4 + first; i < end; i += IN_FLIGHT * stride) {
        float4 loaded[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) loaded[j] = fours[min(i + j * stride, end - 1)];
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

constexpr unsigned long long HIGHEST = ~0ull;

// Returns the largest logit's key and, in the low bits, its inverted id, so that the lowest id of equals wins. Only
// tokens below the result `below` of an earlier call count.
__device__ inline unsigned long long best_of(Row row, unsigned long long below, unsigned long long *scratch) {
    unsigned long long best = 0;
    visit(row, 0, row.size, threadIdx.x, THREADS, [&](int id, float logit) {
        const unsigned long long one = static_cast<unsigned long long>(key_of(logit)) << 32 | (0xfffffffeu - id);
        if (one < below) best = max(best, one);
    });
    for (int offset = WARP / 2; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, offset));
    __syncthreads();  // all threads have read the previous contents of `scratch`
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = best;
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) best = max(best, scratch[warp]);
    return best;
}

__device__ inline int id_in(unsigned long long best) { return 0xfffffffeu - static_cast<unsigned>(best); }

template <class Weigh>
__device__ inline double weight_of_all(Row row, Weigh weigh, double *sums) {
    double sum = 0;
    visit(row, 0, row.size, threadIdx.x, THREADS, [&](int id, float logit) { sum += weigh(id, logit); });
    return block_sum(sum, sums);
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

__device__ inline float changed(float logit, const Change &change, const Settings &settings) {
    logit = __fadd_rn(logit, change.bias);
    if (change.count >= 0 && settings.repetition != 1) {
        logit = logit > 0 ? __fdiv_rn(logit, settings.repetition) : __fmul_rn(logit, settings.repetition);
    }
    const float count = max(change.count, 0);
    logit = __fsub_rn(logit, __fmul_rn(settings.frequency, count));
    return __fsub_rn(logit, __fmul_rn(settings.presence, count > 0));
}

// Puts the changed logits of a history in place of the original ones.
__device__ inline void change(float *logits, const Settings &settings) {
    Change *const history = settings.history;
    __syncthreads();  // all threads have used the original logits
    for (int i = 1 + threadIdx.x; i <= history->id; i += THREADS) {
        float &logit = logits[history[i].id];
        history[i].original = logit;
        logit = changed(logit, history[i], settings);
    }
    __syncthreads();
}

// Puts the original logits back, and adds the chosen token to the history.
__device__ inline void restore(float *logits, Change *history, int chosen, int &known) {
    const int entries = history->id;
    if (threadIdx.x == 0) known = false;
    __syncthreads();  // all threads have used the changed logits
    for (int i = 1 + threadIdx.x; i <= entries; i += THREADS) {
        logits[history[i].id] = history[i].original;
        if (history[i].id != chosen) continue;
        history[i].count = max(history[i].count, 0) + 1;
        known = true;
    }
    __syncthreads();
    if (threadIdx.x == 0 && !known) {
        history[entries + 1] = {chosen, 1, 0, 0};
        history->id = entries + 1;
    }
}

// Returns the token that a row's settings choose.
__device__ inline int choice(Row row, const Settings &settings, double draw, Scratch &scratch,
                             unsigned long long *bests) {
    const int greedy = id_in(best_of(row, HIGHEST, bests));
    const float best = row.logits[greedy];
    const bool finite = best - best == 0;
    if (settings.temperature == 0 || !finite) return greedy;

    Kept kept = {0, row.size - 1};
    double least = 0;  // weights below this one do not count
    const double temperature = settings.temperature, p = settings.top_p;
    const int k = settings.top_k;
    const auto probability = [&](float logit) {  // not normalized
        return exp((static_cast<double>(logit) - best) / temperature);
    };
    const auto weigh = [&](int id, float logit) {
        if (!kept.has(id, key_of(logit))) return 0.0;
        const double weight = probability(logit);
        return weight >= least ? weight : 0.0;
    };
    // Among the tokens that tie at the boundary, those with the lowest ids are kept, as many as are needed.
    const auto cut = [&](Boundary boundary, double needed) {
        if (boundary.key < kept.key) return;  // below every token with a weight
        const auto ties = [&](int id, float logit) {
            return key_of(logit) == boundary.key && kept.has(id, boundary.key) ? 1.0 : 0.0;
        };
        kept = {boundary.key, id_of(row, needed - 1, ties, scratch)};
    };
    if (k > 0 && k < row.size) {
        const Boundary boundary = boundary_of(row, k, [](int, float) { return 1.0; }, scratch);
        cut(boundary, k - boundary.above);
    }
    if (p < 1) {
        const double target = p * weight_of_all(row, weigh, scratch.sums);
        const Boundary boundary = boundary_of(row, target, weigh, scratch);
        cut(boundary, ceil((target - boundary.above) / probability(logit_of(boundary.key))));
    }
    least = settings.min_p;  // the best token weighs 1
    return id_of(row, draw * weight_of_all(row, weigh, scratch.sums), weigh, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(float *logits, const int *lane, const unsigned long long *settings_of, const double *draw, int *chosen,
           double *results, int size, int stride) {
    __shared__ Scratch scratch;
    __shared__ unsigned long long bests[WARPS];
    __shared__ int known;
    const int number = blockIdx.x, rows = gridDim.x;
    if (lane[number] < 0) return;
    const Settings settings = reinterpret_cast<const Settings *>(settings_of)[lane[number]];
    float *const row_logits = logits + static_cast<long long>(number) * stride;
    const Row row = {row_logits, size};

    double largest = 0, log_sum = 0;
    if (settings.logprobs >= 0) {
        unsigned long long best = best_of(row, HIGHEST, bests);
        largest = row.logits[id_in(best)];
        log_sum = log(weight_of_all(
            row, [&](int, float logit) { return exp(static_cast<double>(logit) - largest); }, scratch.sums));
        for (int i = 0; i < min(settings.logprobs, size); i++) {
            if (i > 0) best = best_of(row, best, bests);
            if (threadIdx.x == 0) {
                const int id = id_in(best);
                results[(2 + 2 * i) * rows + number] = id;
                results[(3 + 2 * i) * rows + number] = static_cast<double>(row.logits[id]) - largest - log_sum;
            }
        }
    }
    if (settings.history != nullptr) change(row_logits, settings);
    const int token = choice(row, settings, draw[number], scratch, bests);
    if (settings.history != nullptr) restore(row_logits, settings.history, token, known);
    if (threadIdx.x != 0) return;
    chosen[lane[number]] = token;
    results[number] = token;
    if (settings.logprobs >= 0) {
        results[rows + number] = static_cast<double>(row.logits[token]) - largest - log_sum;
    }
}
