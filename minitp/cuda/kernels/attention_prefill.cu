// attention_prefill: causal attention of the new tokens of some sequences, over a paged cache that already contains
// the new keys and values; the counterpart of ops.attention_scores with ops.causal_mask, ops.softmax and
// ops.attention_context. (FlashAttention-2: Dao, 2023.)
//
//   q             [T, q_stride]       the first H * d columns are read; d = HEAD_DIM
//   k_cache       [K, slots, d]       keys of one layer, d a multiple of 8; v_cache has the values. Key p is in
//   block_tables  [blocks]                slot table[p / BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE of its sequence
//   sequences     [S, 4]              for each sequence: its first row of q, its number n of rows (0 if it only pads
//                                         the pass), the number of keys before them, and the start of its table
//   group_starts  [K + 1]             query heads group_starts[j] .. group_starts[j + 1] - 1 read KV head j
//   out           [T, out_stride]     the first H * out_dim columns are written; the other HEAD_DIM - out_dim columns
//                                         of each head are padding, which is zero in q, k_cache and v_cache
//
// The new tokens of a sequence have positions past .. past + n - 1. The token at i attends to keys j <= i, and with a
// window only to those with i - window < j.
//
// The grid is (tiles, K, S), with enough tiles for the longest sequence. All that changes from pass to pass is read
// from GPU memory, so that a captured graph can be replayed.
// A block computes 64 rows of the queries that share a KV head, and each warp 16 of them.
// Row r is token r / G and head r % G of the group, so a key is read once for all of them. The block loops over the
// keys that at least one of its rows attends to, one tile in shared memory at a time. The values are loaded while
// the scores are computed, and the next keys while the values are added up. The scores of a whole row never exist
// at once; see attention_decode.cu. That file also explains the order in which 16 bytes of a row of keys or values
// contain the operands of a lane for several products.
//
//   scores [16, keys] = query [16, d] @ keys.T * scale       context [16, d] += weights [16, keys] @ values
//
// A lane's scores are in the positions in which the second product needs the weights.

#include "common.h"

constexpr int WARPS = 4, ROWS = 16 * WARPS;
constexpr int KEYS = HEAD_DIM <= 128 ? 64 : HEAD_DIM <= 192 ? 32 : 16;  // keys per tile; more would spill registers
constexpr int KEY_CHUNKS = (HEAD_DIM + 31) / 32, VALUE_CHUNKS = (HEAD_DIM + 63) / 64;

// Row lengths in shared memory, chosen so that the 16-byte loads of 8 lanes use different banks: for keys, 64 bytes
// from each of 2 neighboring rows; for values, 32 bytes from each of 4 rows that are 2 apart.
constexpr int KEY_WIDTH = (HEAD_DIM + 31) / 64 * 64 + 32;
constexpr int VALUE_WIDTH = HEAD_DIM / 16 * 16 + 8;

extern "C" __global__ void __launch_bounds__(128) attention_prefill(
    const Half *q, const Half *k_cache, const Half *v_cache, const int *block_tables, const int *sequences,
    const int *group_starts, Half *out, int q_stride, int slots, int out_stride, int window, int out_dim,
    float scale, float cap) {
    alignas(16) __shared__ Half key_tile[KEYS][KEY_WIDTH];
    alignas(16) __shared__ Half value_tile[KEYS][VALUE_WIDTH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.y;
    const int first_head = group_starts[kv_head], group = group_starts[kv_head + 1] - first_head;
    const int *const sequence = sequences + 4 * blockIdx.z;
    const int first_token = sequence[0], tokens = sequence[1], past = sequence[2];
    const int *const block_table = block_tables + sequence[3];
    const int rows = tokens * group;
    const int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;  // rows with the most keys start first
    if (first_row >= rows) return;
    const int last_row = min(first_row + ROWS, rows) - 1;
    const int stop_key = past + last_row / group + 1;
    const int reach = window > 0 ? window : stop_key;  // keys per query, including its own
    const int first_key = max(0, past + first_row / group - reach + 1);

    const long long plane = static_cast<long long>(kv_head) * slots * HEAD_DIM;
    const auto copy_tile = [=](const Half *cache, Half *tile, int width, int from) {
#pragma unroll 4
        for (int i = threadIdx.x; i < KEYS * (HEAD_DIM / 8); i += blockDim.x) {
            const int row = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8;
            const int key = min(from + row, stop_key - 1);  // after the last key, the last one, which is masked
            const int slot = block_table[key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
            copy_async(tile + row * width + column,
                       cache + plane + static_cast<long long>(slot) * HEAD_DIM + column);
        }
    };
    copy_tile(k_cache, key_tile[0], KEY_WIDTH, first_key);

    // This lane's rows g and g + 8 of the warp. After the last row, it computes the last again without writing it.
    int position[2];
    Half8 query[2][KEY_CHUNKS];
    for (int i = 0; i < 2; i++) {
        const int row = min(first_row + 16 * warp + g + 8 * i, last_row);
        position[i] = past + row / group;
        const Half *const from = q + static_cast<long long>(first_token + row / group) * q_stride +
                                 (first_head + row % group) * HEAD_DIM;
        for (int c = 0; c < KEY_CHUNKS; c++) {
            const int column = 32 * c + 8 * t;
            query[i][c] = column < HEAD_DIM ? *reinterpret_cast<const Half8 *>(from + column) : Half8{};
        }
    }

    float max[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {};  // per row; the sum covers only this lane's keys
    float context[VALUE_CHUNKS][8][4] = {};  // [j][2i + e] is row g + 8i, element j of piece 2t + e of 8
    for (int tile = first_key; tile < stop_key; tile += KEYS) {
        copies_done();
        __syncthreads();  // these keys have arrived, and the previous values are no longer needed
        copy_tile(v_cache, value_tile[0], VALUE_WIDTH, tile);

        float scores[KEYS / 8][4] = {};  // [n][2i + e] is row g + 8i, key 8n + 2t + e of the tile
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            for (int c = 0; c < KEY_CHUNKS; c++) {
                const int column = 32 * c + 8 * t < HEAD_DIM ? 32 * c + 8 * t : 0;  // else multiplied by zeros
                const Half8 keys = *reinterpret_cast<const Half8 *>(&key_tile[8 * n + g][column]);
                for (int j = 0; j < 8; j += 4) {
                    const Half *const x = &query[0][c].at[j], *const y = &query[1][c].at[j];
                    const Half *const z = &keys.at[j];
                    mma(scores[n], {pair(x[0], x[1]), pair(y[0], y[1]), pair(x[2], x[3]), pair(y[2], y[3])},
                        {pair(z[0], z[1]), pair(z[2], z[3])});
                }
            }
        }
        copies_done();
        __syncthreads();  // the values have arrived, and the keys are no longer needed
        if (tile + KEYS < stop_key) copy_tile(k_cache, key_tile[0], KEY_WIDTH, tile + KEYS);

        float shrink[2];
        for (int i = 0; i < 2; i++) {
            float new_max = max[i];
            for (int n = 0; n < KEYS / 8; n++) {
                for (int e = 0; e < 2; e++) {
                    const int key = tile + 8 * n + 2 * t + e;
                    const bool seen = key <= position[i] && key > position[i] - reach;
                    float &score = scores[n][2 * i + e];
                    score = seen ? soft_capped(score * scale, cap) : MINUS_INFINITY;
                    new_max = fmaxf(new_max, score);
                }
            }
            for (int offset = 1; offset < 4; offset *= 2) {
                new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, offset));
            }
            const float finite = new_max == MINUS_INFINITY ? 0 : new_max;  // a row may have no key in a tile
            shrink[i] = __expf(max[i] - finite);
            max[i] = new_max;
            sum[i] *= shrink[i];
            for (int n = 0; n < KEYS / 8; n++) {
                for (int e = 0; e < 2; e++) {
                    float &score = scores[n][2 * i + e];
                    score = __expf(score - finite);  // the weight
                    sum[i] += score;
                }
            }
        }
        for (int c = 0; c < VALUE_CHUNKS; c++) {
            for (int j = 0; j < 8; j++) {
                for (int i = 0; i < 4; i++) context[c][j][i] *= shrink[i / 2];
            }
        }
#pragma unroll
        for (int k = 0; k < KEYS; k += 16) {
            unsigned weights[4];
            for (int i = 0; i < 4; i++) {
                const float *const two = &scores[k / 8 + i / 2][i % 2 * 2];
                weights[i] = pair(to_half(two[0]), to_half(two[1]));
            }
            for (int c = 0; c < VALUE_CHUNKS; c++) {
                const int column = 64 * c + 8 * g < HEAD_DIM ? 64 * c + 8 * g : 0;  // else not written
                Half8 values[4];
                for (int i = 0; i < 4; i++) {
                    const int key = k + 2 * t + i % 2 + i / 2 * 8;
                    values[i] = *reinterpret_cast<const Half8 *>(&value_tile[key][column]);
                }
                for (int j = 0; j < 8; j++) {
                    mma(context[c][j], weights, {pair(values[0].at[j], values[1].at[j]),
                                                 pair(values[2].at[j], values[3].at[j])});
                }
            }
        }
    }

    for (int i = 0; i < 2; i++) {
        for (int offset = 1; offset < 4; offset *= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], offset);
        const float share = 1 / sum[i];
        const int row = first_row + 16 * warp + g + 8 * i;
        if (row > last_row) continue;
        Half *const to = out + static_cast<long long>(first_token + row / group) * out_stride +
                         (first_head + row % group) * out_dim;
        for (int c = 0; c < VALUE_CHUNKS; c++) {
            for (int e = 0; e < 2; e++) {
                const int column = 64 * c + 8 * (2 * t + e);
                Half8 mean;
                for (int j = 0; j < 8; j++) mean.at[j] = to_half(context[c][j][2 * i + e] * share);
                if (out_dim == HEAD_DIM) {
                    if (column < HEAD_DIM) *reinterpret_cast<Half8 *>(to + column) = mean;
                } else {
                    for (int j = 0; j < 8 && column + j < out_dim; j++) to[column + j] = mean.at[j];
                }
            }
        }
    }
}
