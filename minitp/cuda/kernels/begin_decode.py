"""Launches begin_decode.cu: what a decode step does before its first layer and after its last."""

import numpy as np

THREADS = 256


class BeginDecode:
    """Embed the tokens, and find their angles and their places in the cache, by what is on the device.

    Parameters
    ----------
    compiler : Compiler
    block_size : int
        Positions in a block of the paged cache.
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
        """Fills the last five.

        Parameters
        ----------
        token : int32 [B]
        lengths : int32 [B]
            Keys that are in the cache: the positions of the tokens. -1: a row that pads the batch.
        block_table : int32 [B, max_blocks]
        inverse_frequencies : float32 [d/2]
        table : 16-bit [V_r, D or more]
            This rank's rows of the embedding; their length and D are multiples of 8.
        x : 16-bit [B, D]
            The embeddings that this rank holds, zeros for other tokens and for padding.
        slot : int32 [B]
            The rows of the cache that the new keys and values go to; -1 for padding.
        cosines, sines : float32 [B, d/2]
        seen : int32 [B]
            Keys that attention reads, the new one included; 0 for padding.
        """
        sequences, width = x.shape
        rows, stride = table.shape
        sizes = (block_table.shape[1], self._block_size, self._first_row, rows, stride, width)
        arrays = (token, lengths, block_table, inverse_frequencies, table, x, slot, cosines, sines, seen)
        numbers = [np.int32(n) for n in (*sizes, len(inverse_frequencies))]
        self._begin((sequences,), (THREADS,), (*arrays, *numbers))

    def end(self, lengths):
        """`lengths` int32 [B] += 1, but not for padding."""
        sequences = len(lengths)
        self._end((-(-sequences // THREADS),), (THREADS,), (lengths, np.int32(sequences)))
