// y = x @ weight.T for up to 64 rows of x, on the tensor cores. Each kernel also does what follows the product:
//
//     store      out = y + bias                                       counterpart of ops.column_parallel
//     residual   residual += (y + bias) * multiplier, in place        ops.row_parallel and the addition
//     logits     out = y / divisor, in float32                        ops.logits_partial
//     swiglu     out = silu(gate) * up of y = [gate | up] + bias      ops.column_parallel and ops.swiglu
//     qkv        y + bias as heads, RoPE, k and v to the cache        ops.column_parallel and ops.apply_rope
//
// x         [tokens, width]    width is a multiple of 8; padding columns are zero in x and in weight
// weight    [outputs, width]   the weights of each output are contiguous
// bias      [outputs] or null
// norm      [width]            with -DNORM: x, a single token of norm_size columns and padding, goes through
//                              ops.rms_norm with this weight first. Every block computes this; with more tokens, a
//                              separate launch is faster
//
// Macros: TOKEN_TILES, the number of tiles of 8 tokens; PAIR_TILES and SPLITS, see below; NORM; EXPERTS, if
// expert_linear.cu includes this file: then the rows of x may be any, listed in Product::rows. Some families need
// PLUS_ONE (the norm is ops.rms_norm_plus_one), GELU (swiglu becomes ops.geglu) or SOFT_CAP (of the logits, at `cap`).
//
// Most of the time goes into reading the weights, each once. Rows of weight are processed in pairs whose outputs are
// needed together (gate and up, or the two that RoPE rotates), in tiles of 8 pairs. These are the 16 rows of a tensor
// core's product, and tokens are its columns. A warp reads every eighth chunk of 32 columns of its rows. Lane (g, t)
// reads columns 8t .. 8t + 7 of both rows of pair g, 16 bytes per load, and has 8 such loads in flight. A tensor core
// expects columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16 in a lane. But a sum may take its columns in any order, as long
// as x has the same order: the lane's first four columns stand for those of one product, the last four for those of
// the next.
//
// A block has PAIR_TILES tiles, and every block reads all of x from the L2 cache: tokens / (16 PAIR_TILES) bytes per
// byte of weight. For many tokens, linear.py compares this with the work of the busiest multiprocessor. For few tokens
// PAIR_TILES is 1, so that more blocks share the work. The 8 warps of a block add their sums in a fixed order. If so few rows would leave multiprocessors idle, SPLITS blocks, a
// cluster, share the columns of a tile as 8 SPLITS warps do. They read each other's sums from shared memory, and each
// completes a part of the outputs. SPLITS depends on the matrix and the GPU, but not on the number of tokens. Neither a warp's columns nor their order depends on the macros,
// so a token's output has the same bits whichever other tokens are in the batch. (This includes the norm: a row is
// summed in the same order as in rms_norm.cu.)

#include "common.h"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int TILE = 8;                     // pairs, or tokens, per tile
constexpr int TOKENS = TILE * TOKEN_TILES;  // maximum number of tokens
constexpr int COLUMNS = 8;                  // columns per load: a uint4, whose words are pairs of columns
#ifndef SPLITS
#define SPLITS 1
#endif
constexpr int NEXT = 32 * WARPS * SPLITS / COLUMNS;  // distance between two chunks of a warp, in uint4
constexpr int IN_FLIGHT = 4 / PAIR_TILES;   // chunks in flight, with two loads per tile of pairs
constexpr int BLOCKS = TOKEN_TILES * PAIR_TILES <= 2 ? 3 : TOKEN_TILES <= 4 ? 2 : 1;  // per SM; registers limit it

using Sums = float[2][TOKENS][TILE];  // of the first and the second rows of a tile of pairs

struct Product {
    const Half *x, *weight, *norm;
    float eps;
    int norm_size, tokens, width, outputs;
#ifdef EXPERTS
    const int *rows;  // the row of x of each token; null if they are rows 0, 1, 2, ..
#endif
};

struct Rows {  // a pair of rows of weight
    int first, second;
};

// The x of the product (after the norm, if there is one) and the distance between its rows.
struct Input {
    const Half *x;
    int stride;
};

#ifdef NORM

// Computes ops.rms_norm of the only row, into shared memory.
__device__ Input input_of(const Product &p) {
    __shared__ float scratch[WARP];
    DYNAMIC_SHARED(Half, normed);
    const Half8 *const x8 = reinterpret_cast<const Half8 *>(p.x);
    const Half8 *const norm8 = reinterpret_cast<const Half8 *>(p.norm);
    Half8 *const normed8 = reinterpret_cast<Half8 *>(normed);

    float squares = 0;
    for (int i = threadIdx.x; i < p.width / 8; i += THREADS) {
        const Half8 values = x8[i];
        normed8[i] = values;  // read again below, by this thread only
        for (int j = 0; j < 8; j++) squares += to_float(values.at[j]) * to_float(values.at[j]);
    }
    const float rms = sqrtf(block_sum(squares, scratch) / p.norm_size + p.eps);
    for (int i = threadIdx.x; i < p.width / 8; i += THREADS) {
        const Half8 values = normed8[i], weights = norm8[i];
        Half8 result;
        for (int j = 0; j < 8; j++) {
            result.at[j] = with_gain(to_float(values.at[j]) / rms, weights.at[j]);
        }
        normed8[i] = result;
    }
    __syncthreads();
    return {normed, p.width};
}

#else

__device__ Input input_of(const Product &p) { return {p.x, p.width}; }

#endif

#ifdef EXPERTS

struct TokenTiles {  // the distances from the first row of x to a lane's row in each tile of tokens, in uint4
    static constexpr bool LEAVES_EARLY = true;  // most experts have fewer tokens than the macro allows
    int row[TOKEN_TILES];
    __device__ TokenTiles(const Product &p, int g, int stride) {
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            const int token = min(tile * TILE + g, p.tokens - 1);
            row[tile] = (p.rows == nullptr ? token : p.rows[token]) * (stride / COLUMNS);
        }
    }
    __device__ static int first_row(int g) { return 0; }
    __device__ int operator[](int tile) const { return row[tile]; }
};

#else

struct TokenTiles {  // the distances from a lane's row in the first tile of tokens to its row in each, in uint4
    static constexpr bool LEAVES_EARLY = false;
    int distance;
    __device__ TokenTiles(const Product &p, int g, int stride) : distance(TILE * stride / COLUMNS) {}
    __device__ static int first_row(int g) { return g; }
    __device__ int operator[](int tile) const { return tile * distance; }
};

#endif

__device__ inline const uint4 *at(const Half *matrix, int row, int stride, int column) {
    return reinterpret_cast<const uint4 *>(matrix + static_cast<long long>(row) * stride + column);
}

__device__ inline void split_barrier() {
    if (SPLITS > 1) {
        cluster_barrier();
    } else {
        __syncthreads();
    }
}

// Calls finish(token, n, y of the first row, y of the second row) once for each token and each n < pairs.
// rows_of(n) are the rows of pair n.
template <class RowsOf, class Finish>
__device__ void multiply(const Product &p, int pairs, RowsOf rows_of, Finish finish) {
#if SPLITS > 1
    DYNAMIC_SHARED(Sums, partial);  // replaces the normed x
#else
    __shared__ Sums partial[WARPS];
#endif
    const int rank = blockIdx.x % SPLITS;  // in the cluster
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int first_pair = blockIdx.x / SPLITS * PAIR_TILES * TILE;

    int column = ((rank * WARPS + warp) * 4 + t) * COLUMNS;
    const uint4 *row[PAIR_TILES][2];  // pointers to `column`; a row after the last is replaced by the last
    for (int tile = 0; tile < PAIR_TILES; tile++) {
        const Rows rows = rows_of(first_pair + tile * TILE + g);
        row[tile][0] = at(p.weight, min(rows.first, p.outputs - 1), p.width, column);
        row[tile][1] = at(p.weight, min(rows.second, p.outputs - 1), p.width, column);
    }

    // A ring of chunks in flight. The first ones are requested before the previous kernel ends and before the norm, so
    // that memory is not idle. No kernel writes weights.
    uint4 weights[IN_FLIGHT][PAIR_TILES][2];
    const auto load = [&](int chunk, int later) {
        const bool inside = column + (chunk + later) * NEXT * COLUMNS < p.width;
        for (int i = 0; i < PAIR_TILES * 2; i++) {
            weights[chunk][i / 2][i % 2] = load_once(row[i / 2][i % 2] + (chunk + later) * NEXT, inside);
        }
    };
#pragma unroll
    for (int chunk = 0; chunk < IN_FLIGHT; chunk++) load(chunk, 0);

    wait_for_previous();
    const Input input = input_of(p);
    const uint4 *x_row = at(input.x, TokenTiles::first_row(g), input.stride, column);
    const TokenTiles x_tile(p, g, input.stride);

    float sums[PAIR_TILES][TOKEN_TILES][4] = {};
    while (column - t * COLUMNS < p.width) {  // the same number of iterations on all lanes
        // In the last iteration nothing is left to request, so the next kernel may request its first weights. Its
        // waiting blocks would only be in the way before.
        if (column - t * COLUMNS + IN_FLIGHT * NEXT * COLUMNS >= p.width) let_next_start();
#pragma unroll
        for (int chunk = 0; chunk < IN_FLIGHT; chunk++) {
            const bool inside = column + chunk * NEXT * COLUMNS < p.width;
            for (int tile = 0; tile < TOKEN_TILES; tile++) {
                if (TokenTiles::LEAVES_EARLY && tile > 1 && tile * TILE >= p.tokens) break;
                const bool there = inside && tile * TILE + g < p.tokens;
                const uint4 x = there ? x_row[x_tile[tile] + chunk * NEXT] : uint4{};
                for (int i = 0; i < PAIR_TILES; i++) {
                    const uint4 &first = weights[chunk][i][0], &second = weights[chunk][i][1];
                    mma(sums[i][tile], {first.x, second.x, first.y, second.y}, {x.x, x.y});
                    mma(sums[i][tile], {first.z, second.z, first.w, second.w}, {x.z, x.w});
                }
            }
            load(chunk, IN_FLIGHT);
        }
        column += IN_FLIGHT * NEXT * COLUMNS;
        for (int i = 0; i < PAIR_TILES * 2; i++) row[i / 2][i % 2] += IN_FLIGHT * NEXT;
        x_row += IN_FLIGHT * NEXT;
    }

#pragma unroll
    for (int pair_tile = 0; pair_tile < PAIR_TILES; pair_tile++) {
        if (pair_tile > 0 || SPLITS > 1) split_barrier();  // the previous contents of `partial` have been read
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 4; i++) {
            const int token = i / 4 * TILE + 2 * t + i % 2;
            if (token < p.tokens) partial[warp][i / 2 % 2][token][g] = sums[pair_tile][i / 4][i % 4];
        }
        split_barrier();
        for (int i = threadIdx.x * SPLITS + rank; i < p.tokens * TILE; i += THREADS * SPLITS) {
            const int token = i / TILE, n = first_pair + pair_tile * TILE + i % TILE;
            float first = 0, second = 0;
            for (int w = 0; w < WARPS * SPLITS; w++) {
                const Sums &sums_of_warp = *(SPLITS > 1 ? in_block(partial + w % WARPS, w / WARPS) : partial + w);
                first += sums_of_warp[0][token][i % TILE];
                second += sums_of_warp[1][token][i % TILE];
            }
            if (n < pairs) finish(token, n, first, second);
        }
    }
    if (SPLITS > 1) cluster_barrier();  // a block must not end before the others have read its sums
}

// The same for outputs that need no partner: calls finish(token, output, y). 16 outputs form a tile of pairs.
template <class Finish>
__device__ void multiply(const Product &p, Finish finish) {
    const auto rows_of = [](int n) {
        const int first = n / TILE * 2 * TILE + n % TILE;
        return Rows{first, first + TILE};
    };
    const int pairs = (p.outputs + 2 * TILE - 1) / (2 * TILE) * TILE;
    multiply(p, pairs, rows_of, [&](int token, int n, float first, float second) {
        const Rows rows = rows_of(n);
        if (rows.first < p.outputs) finish(token, rows.first, first);
        if (rows.second < p.outputs) finish(token, rows.second, second);
    });
}

#ifndef EXPERTS

__device__ inline float with_bias(float y, const Half *bias, int row) {
    return bias == nullptr ? y : y + to_float(bias[row]);
}

// out [tokens, outputs], its rows `stride` apart. No kernel here writes to the gaps between rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    store(const Half *x, const Half *weight, const Half *norm, float eps, int norm_size, int tokens, int width,
          int outputs, const Half *bias, Half *out, int stride) {
    const Product p = {x, weight, norm, eps, norm_size, tokens, width, outputs};
    multiply(p, [=](int token, int n, float y) { out[token * stride + n] = to_half(with_bias(y, bias, n)); });
}

// stream [tokens, outputs], the residual stream, its rows `stride` apart. It must not be x.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    residual(const Half *x, const Half *weight, const Half *norm, float eps, int norm_size, int tokens,
             int width, int outputs, const Half *bias, float multiplier, Half *stream, int stride) {
    const Product p = {x, weight, norm, eps, norm_size, tokens, width, outputs};
    multiply(p, [=](int token, int n, float y) {
        Half *const value = stream + token * stride + n;
        *value = to_half(to_float(*value) + rounded(rounded(with_bias(rounded(y), bias, n)) * multiplier));
    });
}

// out [tokens, outputs], its rows `stride` apart.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    logits(const Half *x, const Half *weight, const Half *norm, float eps, int norm_size, int tokens,
           int width, int outputs, float divisor, float cap, float *out, int stride) {
    const Product p = {x, weight, norm, eps, norm_size, tokens, width, outputs};
    multiply(p, [=](int token, int n, float y) {
        out[static_cast<long long>(token) * stride + n] = soft_capped(y / divisor, cap);
    });
}

// weight [2 columns, width], the gate rows first; out [tokens, columns], its rows `stride` apart.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    swiglu(const Half *x, const Half *weight, const Half *norm, float eps, int norm_size, int tokens,
           int width, int columns, const Half *bias, Half *out, int stride) {
    const Product p = {x, weight, norm, eps, norm_size, tokens, width, 2 * columns};
    const auto rows_of = [=](int n) { return Rows{n, n + columns}; };
    multiply(p, columns, rows_of, [=](int token, int n, float first, float second) {
        const float gate = rounded(with_bias(first, bias, n));
        const float up = rounded(with_bias(second, bias, n + columns));
        out[token * stride + n] = to_half(activated(gate) * up);
    });
}

// weight [(heads + 2 kv_heads) * head_dim, width], q heads first, then k, then v; head_dim is even.
// q [tokens, heads, head_stride]; k_cache and v_cache [kv_heads, slots, head_stride], whose padding columns are not
// written; slot [tokens], each token's slot in the caches, or -1 to write nothing there; cos and sin
// [tokens, rotary_dim / 2]. RoPE rotates the first rotary_dim dimensions of a head, an even number.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    qkv(const Half *x, const Half *weight, const Half *norm, float eps, int norm_size, int tokens, int width,
        const Half *bias, Half *q, Half *k_cache, Half *v_cache, const int *slot, const float *cos,
        const float *sin, int heads, int kv_heads, int head_dim, int slots, int rotary_dim, int head_stride) {
    const int half = head_dim / 2, turned = rotary_dim / 2, all_heads = heads + 2 * kv_heads;
    const Product p = {x, weight, norm, eps, norm_size, tokens, width, all_heads * head_dim};
    const auto columns_of = [=](int i) {  // of a head's pair i: first those that RoPE rotates, then the others
        return i < turned ? Rows{i, i + turned} : Rows{i + turned, i + half};
    };
    const auto rows_of = [=](int n) {
        const Rows columns = columns_of(n % half);
        return Rows{n / half * head_dim + columns.first, n / half * head_dim + columns.second};
    };
    multiply(p, all_heads * half, rows_of, [=](int token, int n, float first, float second) {
        const Rows rows = rows_of(n);
        const int head = n / half, i = n % half;
        float left = rounded(with_bias(first, bias, rows.first));
        float right = rounded(with_bias(second, bias, rows.second));
        if (head < heads + kv_heads && i < turned) {
            turn(left, right, cos[token * turned + i], sin[token * turned + i]);
        }
        Half *to = q + (token * heads + head) * head_stride;
        if (head >= heads) {
            if (slot[token] < 0) return;
            Half *const cache = head < heads + kv_heads ? k_cache : v_cache;
            const int kv_head = (head - heads) % kv_heads;
            to = cache + (static_cast<long long>(kv_head) * slots + slot[token]) * head_stride;
        }
        const Rows columns = columns_of(i);
        to[columns.first] = to_half(left);
        to[columns.second] = to_half(right);
    });
}

#endif
