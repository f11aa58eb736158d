// begin_decode: the work of a decode pass over B sequences before its first layer; the counterpart of
// ops.embed_partial, ops.scaled, ops.rope_cos_sin and PagedCache.slots. end_decode: adds one to every sequence's length.
//
// A block handles one sequence b. It has p = lengths[b] keys in the cache, so p is its new token's position.
//   token, lengths int [B]                  a length of -1 marks a row that pads the batch to the size of a graph
//   block_table int [B, max_blocks]         has a block for each position up to p; the host allocates them
//   table_starts int [B] or null            if given, the start in block_table of each row's table, for a prompt,
//                                               whose tokens are rows with the same table
//   inverse_frequencies float [ropes, half_dim]   a row for each RoPE of the model's layers; half_dim is R / 2
//   factors float [ropes]                   the attention factor of each RoPE, which multiplies its cosines and sines
//   lane int [B], chosen int [lanes]        a token below 0 is the one that `sample` has chosen for the row's lane
//   new_block int [B]                       the block of position p if it is new, else -1; it is added to block_table
//   table [rows, stride]                    this rank's rows of the embedding; the first is token `first_row`
//   x [B, width]                            the token's row, times `multiplier`; zeros if another rank has the row, and
//                                           for padding
//   slot int [B]                            the cache slot of the new key; -1 for padding
//   cosines, sines float [ropes, B, half_dim]     for the angles of position p, or of position 0 for padding
//   seen int [B]                            number of keys for attention, including the new one; 0 for padding
// width and stride are multiples of 8. The kernel reads little (a row of the table), so a single launch is enough.
// Everything that changes from token to token is in GPU memory, so that a captured graph can be replayed.

#include "common.h"

extern "C" __global__ void begin_decode(const int *token, const int *lengths, int *block_table,
                                      const int *table_starts, const float *inverse_frequencies,
                                      const float *factors, const Half *table, Half *x, int *slot, float *cosines,
                                      float *sines, int *seen, const int *lane, const int *chosen,
                                      const int *new_block, int max_blocks, int block_size, int first_row, int rows,
                                      int stride, int width, int ropes, int half_dim, float multiplier) {
    wait_for_previous();
    let_next_start();
    const int sequence = blockIdx.x;
    const int length = lengths[sequence];
    const bool padding = length < 0;
    if (threadIdx.x == 0) {
        seen[sequence] = padding ? 0 : length + 1;
        slot[sequence] = -1;
        if (!padding) {
            const int start = table_starts == nullptr ? sequence * max_blocks : table_starts[sequence];
            int &block = block_table[start + length / block_size];
            if (new_block != nullptr && new_block[sequence] >= 0) block = new_block[sequence];
            slot[sequence] = block * block_size + length % block_size;
        }
    }

    const float position = padding ? 0 : length;
    for (int i = threadIdx.x; i < ropes * half_dim; i += blockDim.x) {
        const int rope = i / half_dim, at = (rope * gridDim.x + sequence) * half_dim + i % half_dim;
        const float angle = position * inverse_frequencies[i];
        cosines[at] = cosf(angle) * factors[rope];  // not __cosf: an angle may be 100000
        sines[at] = sinf(angle) * factors[rope];
    }

    int id = padding ? -1 : token[sequence];
    if (id < 0 && !padding) id = chosen[lane[sequence]];
    const int local = padding ? -1 : id - first_row;
    const bool has_row = local >= 0 && local < rows;
    const long long start = static_cast<long long>(has_row ? local : 0) * stride;
    const Half8 *const row = reinterpret_cast<const Half8 *>(table + start);
    Half8 *const x8 = reinterpret_cast<Half8 *>(x + static_cast<long long>(sequence) * width);
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        Half8 values = has_row ? load_once(row + i) : Half8{};
        for (int j = 0; j < 8; j++) values.at[j] = to_half(to_float(values.at[j]) * multiplier);
        x8[i] = values;
    }
}

// lengths int [B], as above. One thread per sequence.
extern "C" __global__ void end_decode(int *lengths, int sequences) {
    const int sequence = blockIdx.x * blockDim.x + threadIdx.x;
    if (sequence < sequences && lengths[sequence] >= 0) lengths[sequence]++;
}
