"""Launch begin_decode.cu: the work of a decode pass before its first layer and after its last."""

import numpy as np

THREADS = 256


class BeginDecode:
    """A kernel that embeds tokens and computes their RoPE angles and cache slots from data on the GPU.

    Parameters
    ----------
    compiler : Compiler
    block_size : int
        Positions per block of the paged cache.
    first_row : int
        The token id of the first row of this rank's embedding.
    multiplier : float
        The factor of `ops.scaled` for the embeddings.
    """

    def __init__(self, compiler, block_size, first_row, multiplier=1.0):
        self._begin = compiler.kernel("begin_decode.cu", "begin_decode")
        self._end = compiler.kernel("begin_decode.cu", "end_decode")
        self._block_size, self._first_row, self._multiplier = block_size, first_row, np.float32(multiplier)

    def __call__(
        self,
        token,
        lengths,
        block_table,
        rotations,
        table,
        x,
        slot,
        cosines,
        sines,
        seen,
        lanes=(None, None, None),
        table_starts=None,
    ):
        """Write each token's embedding, cache slot, RoPE cosines and sines, and number of visible keys.

        Parameters
        ----------
        token : int32 [B]
            A token below 0 is the one that `sample` has chosen for the row's lane.
        lengths : int32 [B]
            Number of keys in the cache, which is the position of the new token; -1 for a padding row.
        block_table : int32 [B, max_blocks], or [blocks] with `table_starts`
            The new blocks in `lanes` are added to it.
        rotations : (float32 [ropes, R/2], float32 [ropes])
            The inverse frequencies and the attention factor of each RoPE of the model's layers.
        table : 16-bit [V_r, D or more]
            This rank's rows of the embedding; their length and D are multiples of 8.
        x : 16-bit [B, D]
            An output: the embeddings of tokens whose rows this rank has; zeros for others and padding.
        slot : int32 [B]
            An output: the cache slot for each new key and value; -1 for padding.
        cosines, sines : float32 [ropes, B, R/2]
            Outputs: the cosines and sines of the angles of each new position, times the attention factor.
        seen : int32 [B]
            An output: the number of keys that attention reads, including the new one; 0 for padding.
        lanes : tuple of int32 [B], [lanes], [B]
            The lane of each row; the token chosen for each lane; the block of the new token's position where
            it is new, else -1. A prompt has none.
        table_starts : int32 [B] or None
            The start in `block_table` of each row's table. With it, rows may be tokens of one sequence.
        """
        sequences, width = x.shape
        rows, stride = table.shape
        sizes = (block_table.shape[-1], self._block_size, self._first_row, rows, stride, width)
        inputs = token, lengths, block_table, table_starts, *rotations, table
        arrays = (*inputs, x, slot, cosines, sines, seen)
        numbers = *map(np.int32, (*sizes, *rotations[0].shape)), self._multiplier
        self._begin((sequences,), (THREADS,), (*arrays, *lanes, *numbers))

    def end(self, lengths):
        """Increment `lengths`, int32 [B], except for padding."""
        sequences = len(lengths)
        self._end((-(-sequences // THREADS),), (THREADS,), (lengths, np.int32(sequences)))
