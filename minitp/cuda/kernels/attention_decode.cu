// attention_decode: attention of one query token of each of B sequences over a paged cache; the counterpart of
// ops.attention_scores, ops.softmax and ops.attention_context. The work is split over the keys (flash-decoding,
// Dao et al., 2023).
//
//   q             [B, H, d]           d = HEAD_DIM, a multiple of 8
//   k_cache       [K, slots, d]       keys of one layer; v_cache has the values. Key p of sequence b is in slot
//   block_table   [B, max_blocks]         block_table[b][p / BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
//   lengths       [B]                 number of keys, including the new one; if 0, the row of out becomes zeros
//   group_starts  [K + 1]             query heads group_starts[j] .. group_starts[j + 1] - 1 read KV head j
//   out           [B, out_stride]     the first H * out_dim columns are written; the other HEAD_DIM - out_dim columns
//                                         of each head are padding, which is zero in q, k_cache and v_cache
//   partials      [B, K * pieces, splits / cluster] of Part; not used if one cluster has all splits
//   counters      [B, K * pieces]     zeros before a launch, and zeros again after it
//
// The grid is (splits, K * pieces, B), with enough pieces of 8 query heads for the largest group. The keys that
// the sequence attends to (the last `window`, or all if that is 0) are divided into runs, one per split. The warps
// of a split take turns at tiles of 16 keys. The first block of a cluster combines the results of its splits, which it
// reads from their shared memory. The cluster that finishes last combines the results of all clusters, through
// `partials`; a cluster of 8 splits does not need that for up to 512 keys. Both orders are fixed, so there is one launch,
// and it always gives the same bits. Without clusters, each split is one. Lengths are read on the GPU, so the same grid serves
// all lengths; splits without keys return at once.
//
// Lengths and slots are loaded before the wait for the previous kernel (qkv), which writes neither. So the loads after
// it, of queries, keys and values, wait for no other load.
//
// Each key and value is read once for all heads of a group, directly into the registers that feed the tensor
// cores: 4 d bytes per key and KV head, and nothing else of that size. A sum over d may be in any order, and so
// may the rows of a product. So lane l, with g = l / 4 and t = l % 4, loads 16 bytes at once:
//   from keys g and g + 8, elements 8t .. 8t + 7 of each 32: this lane's operands of two products over 16 columns,
//   if the query is loaded the same way;
//   from the values of keys 2t, 2t+1, 2t+8 and 2t+9, elements 8g .. 8g + 7 of each 64: this lane's rows g and g + 8
//   of four products.
// With d = 128 a lane has 16 such loads in flight, and a warp 8 KiB.
//
//   scores [8 heads, 16 keys] = query @ keys.T * scale         context.T [d, 8 heads] += values.T @ weights.T
//
// Each score ends up in the lane that needs its weight for the second product. The explicit operation rounds the
// probabilities to 16 bits; this kernel rounds exp(score - the largest so far), and divides by the sum at the end.

#include "common.h"

constexpr int WARPS = 4, TILE = 16, HEADS = 8;
constexpr int KEY_CHUNKS = (HEAD_DIM + 31) / 32, VALUE_CHUNKS = (HEAD_DIM + 63) / 64;

struct alignas(16) Part {  // the result of attention over some of the keys
    float max[HEADS], sum[HEADS];  // the largest score; the sum of exp(score - max)
    float context[HEADS][HEAD_DIM];  // the sum of exp(score - max) * value
};

// Combines n parts, part_of(0) and so on: returns 4 columns of a head's context, and sets the head's max and sum.
template <class PartOf>
__device__ inline float4 merged(PartOf part_of, int n, int head, int column, float &max, float &sum) {
    max = part_of(0)->max[head];
    for (int i = 1; i < n; i++) max = fmaxf(max, part_of(i)->max[head]);
    sum = 0;
    float4 context = {0, 0, 0, 0};
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        const Part &part = *part_of(i);
        const float weight = __expf(part.max[head] - max);  // 0 for a part without keys
        const float4 more = *reinterpret_cast<const float4 *>(&part.context[head][column]);
        sum += weight * part.sum[head];
        context.x += weight * more.x;
        context.y += weight * more.y;
        context.z += weight * more.z;
        context.w += weight * more.w;
    }
    return context;
}

__device__ inline void put(Part &part, int head, int column, float4 context, float max, float sum) {
    *reinterpret_cast<float4 *>(&part.context[head][column]) = context;
    part.max[head] = max;
    part.sum[head] = sum;
}

// Writes 4 columns of a head's context, without padding.
__device__ inline void write_mean(Half *out, int head, int column, int out_dim, float4 context, float sum) {
    const float scale = 1 / sum;
    const Half4 mean = {to_half(context.x * scale), to_half(context.y * scale), to_half(context.z * scale),
                        to_half(context.w * scale)};
    out += head * out_dim + column;
    if (out_dim == HEAD_DIM) {
        *reinterpret_cast<Half4 *>(out) = mean;
    } else {
        for (int j = 0; j < 4 && column + j < out_dim; j++) out[j] = mean.at[j];
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) attention_decode(
    const Half *q, const Half *k_cache, const Half *v_cache, const int *block_table, const int *lengths,
    const int *group_starts, Half *out, float *partials, unsigned *counters, int pieces, int slots,
    int max_blocks, int out_stride, int window, int out_dim, float scale, float cap) {
    __shared__ Part of_warps[WARPS];
    __shared__ bool last;
    DYNAMIC_SHARED(Part, of_block);  // for the other blocks of a cluster
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int split = blockIdx.x, kv_head = blockIdx.y / pieces, sequence = blockIdx.z;
    const int all_heads = group_starts[gridDim.y / pieces];
    const int first_head = group_starts[kv_head] + blockIdx.y % pieces * HEADS;
    const int heads = min(HEADS, group_starts[kv_head + 1] - first_head);
    Half *const my_out = out + static_cast<long long>(sequence) * out_stride + first_head * out_dim;

    // This split's tiles, counted from the first visible key.
    const int length = load_early(lengths + sequence);
    const int first_key = window > 0 ? max(0, length - window) : 0;
    const int tiles = (length - first_key + TILE - 1) / TILE;
    const int splits = min(static_cast<int>(gridDim.x), (tiles + WARPS - 1) / WARPS);  // splits that have keys
    const int begin = tiles * split / max(splits, 1), end = tiles * (split + 1) / max(splits, 1);
    const int *const table = block_table + static_cast<long long>(sequence) * max_blocks;
    const auto key_of = [=](int tile) {  // key lane % 16 of the tile, or the last key after the end
        return max(min(first_key + tile * TILE + lane % TILE, length - 1), 0);
    };
    const int early_key = key_of(begin + warp);
    int slot = load_early(table + early_key / BLOCK_SIZE) * BLOCK_SIZE + early_key % BLOCK_SIZE;

    wait_for_previous();
    let_next_start();
    if (heads <= 0) return;
    if (length == 0 && split == 0) {
        for (int i = threadIdx.x; i < heads * out_dim; i += blockDim.x) my_out[i] = Half{};
    }
    if (split >= splits) return;

    // This lane's columns. After the last column, it loads the first again, which is multiplied by zeros or not used.
    int key_columns[KEY_CHUNKS], value_columns[VALUE_CHUNKS];
    Half8 query[KEY_CHUNKS];  // the query of head g
    for (int c = 0; c < KEY_CHUNKS; c++) {
        const int column = 32 * c + 8 * t;
        key_columns[c] = column < HEAD_DIM ? column : 0;
        query[c] = Half8{};
        if (g < heads && column < HEAD_DIM) {
            const long long row = static_cast<long long>(sequence) * all_heads + first_head + g;
            query[c] = *reinterpret_cast<const Half8 *>(q + row * HEAD_DIM + column);
        }
    }
    for (int c = 0; c < VALUE_CHUNKS; c++) {
        const int column = 64 * c + 8 * g;
        value_columns[c] = column < HEAD_DIM ? column : 0;
    }
    const long long plane = static_cast<long long>(kv_head) * slots * HEAD_DIM;

    float max = MINUS_INFINITY, sum = 0;  // for head g; the sum covers only this lane's keys
    float context[VALUE_CHUNKS][4][4] = {};  // [j][i] is element 2j + i/2 of this lane's 8, head 2t + i%2
    for (int tile = begin + warp; tile < end; tile += WARPS) {
        const int next_key = key_of(tile + WARPS);
        const int next_slot = table[next_key / BLOCK_SIZE] * BLOCK_SIZE + next_key % BLOCK_SIZE;  // for the next loads
        Half8 keys[2][KEY_CHUNKS], values[VALUE_CHUNKS][4];
        for (int half = 0; half < 2; half++) {
            const long long row = __shfl_sync(ALL_LANES, slot, 8 * half + g);
            for (int c = 0; c < KEY_CHUNKS; c++) {
                const Half *const from = k_cache + plane + row * HEAD_DIM + key_columns[c];
                keys[half][c] = load_once(reinterpret_cast<const Half8 *>(from));
            }
        }
        const auto load_values = [&] {
            for (int i = 0; i < 4; i++) {
                const long long row = __shfl_sync(ALL_LANES, slot, 2 * t + i % 2 + i / 2 * 8);
                for (int c = 0; c < VALUE_CHUNKS; c++) {
                    const Half *const from = v_cache + plane + row * HEAD_DIM + value_columns[c];
                    values[c][i] = load_once(reinterpret_cast<const Half8 *>(from));
                }
            }
        };
        if (HEAD_DIM <= 128) load_values();  // in flight with the keys, if there are registers for both

        float scores[2][4] = {};  // [half][i], i < 2, is head g, key 8 half + 2t + i; rows 8 to 15 are not used
        for (int c = 0; c < KEY_CHUNKS; c++) {
            for (int j = 0; j < 8; j += 4) {
                const Half *const x = &query[c].at[j];
                for (int half = 0; half < 2; half++) {
                    const Half *const y = &keys[half][c].at[j];
                    mma(scores[half], {pair(x[0], x[1]), 0, pair(x[2], x[3]), 0},
                        {pair(y[0], y[1]), pair(y[2], y[3])});
                }
            }
        }
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 2; i++) scores[half][i] = soft_capped(scores[half][i] * scale, cap);
        }
        if (HEAD_DIM > 128) load_values();
        float new_max = max;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 2; i++) {
                const int key = first_key + tile * TILE + 8 * half + 2 * t + i;
                scores[half][i] = key < length ? scores[half][i] : MINUS_INFINITY;
                new_max = fmaxf(new_max, scores[half][i]);
            }
        }
        for (int offset = 1; offset < 4; offset *= 2) {
            new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, offset));
        }
        const float shrink = __expf(max - new_max);  // a tile has a visible key, so new_max is finite
        max = new_max;
        sum *= shrink;
        unsigned weights[2];
        for (int half = 0; half < 2; half++) {
            const float first = __expf(scores[half][0] - max), second = __expf(scores[half][1] - max);
            sum += first + second;
            weights[half] = pair(to_half(first), to_half(second));
        }
        const float shrinks[2] = {__shfl_sync(ALL_LANES, shrink, 4 * (2 * t)),
                                  __shfl_sync(ALL_LANES, shrink, 4 * (2 * t + 1))};
        for (int c = 0; c < VALUE_CHUNKS; c++) {
            for (int j = 0; j < 4; j++) {
                const Half *const x = &values[c][0].at[2 * j], *const y = &values[c][1].at[2 * j];
                const Half *const z = &values[c][2].at[2 * j], *const w = &values[c][3].at[2 * j];
                for (int i = 0; i < 4; i++) context[c][j][i] *= shrinks[i % 2];
                mma(context[c][j], {pair(x[0], y[0]), pair(x[1], y[1]), pair(z[0], w[0]), pair(z[1], w[1])},
                    weights);
            }
        }
        slot = next_slot;
    }

    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    Part &own = of_warps[warp];
    own.max[g] = max;  // the same on the head's four lanes
    own.sum[g] = sum;
    for (int c = 0; c < VALUE_CHUNKS; c++) {
        const int column = 64 * c + 8 * g;
        for (int j = 0; j < 4 && column < HEAD_DIM; j++) {
            for (int i = 0; i < 4; i++) {
                own.context[2 * t + i % 2][column + 2 * j + i / 2] = context[c][j][i];
            }
        }
    }
    __syncthreads();

    const int cluster = cluster_size(), group = split / cluster, groups = (splits + cluster - 1) / cluster;
    const long long at = static_cast<long long>(sequence) * gridDim.y + blockIdx.y;
    Part *const parts = reinterpret_cast<Part *>(partials) + at * (gridDim.x / cluster);
    const auto merge = [&](auto part_of, int n, Part *into) {  // if `into` is null, into the output
        for (int i = threadIdx.x * 4; i < heads * HEAD_DIM; i += blockDim.x * 4) {
            const int head = i / HEAD_DIM, column = i % HEAD_DIM;
            const float4 context = merged(part_of, n, head, column, max, sum);
            if (into == nullptr) {
                write_mean(my_out, head, column, out_dim, context, sum);
            } else {
                put(*into, head, column, context, max, sum);
            }
        }
    };

    Part *const of_group = groups == 1 ? nullptr : &parts[group];
    const int members = min(cluster, splits - group * cluster);  // blocks of this cluster with keys
    merge([&](int i) { return &of_warps[i]; }, WARPS, members == 1 ? of_group : of_block);
    if (members > 1) {
        cluster_barrier();
        if (cluster_rank() == 0) merge([&](int i) { return in_block(of_block, i); }, members, of_group);
        cluster_barrier();  // a block must not end before the first has read its part
        if (cluster_rank() > 0) return;
    }
    if (groups == 1) return;

    __threadfence();  // write this part before the count
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&counters[at], 1u) == static_cast<unsigned>(groups - 1);
    __syncthreads();
    if (!last) return;
    __threadfence();  // read the count before the other parts
    merge([&](int i) { return &parts[i]; }, groups, nullptr);
    if (threadIdx.x == 0) counters[at] = 0;
}
