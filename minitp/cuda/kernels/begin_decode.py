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
    """

    def __init__(self, compiler, block_size, first_row):
        self._begin = compiler.kernel("begin_decode.cu", "begin_decode")
        self._end = compiler.kernel("begin_decode.cu", "end_decode")
        self._block_size, self._first_row = block_size, first_row

    def __call__(
        self, token, lengths, block_table, inverse_frequencies, table, x, slot, cosines, sines, seen
    ):
        """Compute the last five arrays from the first five.

        Parameters
        ----------
        token : int32 [B]
        lengths : int32 [B]
            Number of keys in the cache, which is the position of the new token; -1 for a padding row.
        block_table : int32 [B, max_blocks]
        inverse_frequencies : float32 [d/2]
        table : 16-bit [V_r, D or more]
            This rank's rows of the embedding; their length and D are multiples of 8.
        x : 16-bit [B, D]
            The embeddings of the tokens whose rows this rank has, zeros for other tokens and for padding.
        slot : int32 [B]
            The cache slot for each new key and value; -1 for padding.
        cosines, sines : float32 [B, d/2]
        seen : int32 [B]
            Number of keys that attention reads, the new one included; 0 for padding.
        """
        sequences, width = x.shape
        rows, stride = table.shape
        sizes = (block_table.shape[1], self._block_size, self._first_row, rows, stride, width)
        arrays = (token, lengths, block_table, inverse_frequencies, table, x, slot, cosines, sines, seen)
        numbers = [np.int32(n) for n in (*sizes, len(inverse_frequencies))]
        self._begin((sequences,), (THREADS,), (*arrays, *numbers))

    def end(self, lengths):
        """Increment `lengths`, int32 [B], except for padding."""
        sequences = len(lengths)
        self._end((-(-sequences // THREADS),), (THREADS,), (lengths, np.int32(sequences)))
