"""The keys and values of all earlier positions, so that a step computes only its own."""


class KVCache:
    """One sequence's keys and values on one rank: per layer two buffers [K_r, capacity, d].

    The buffers are reserved for `capacity` positions at once. On a CPU that costs address space only: the
    system gives memory, page by page, to what has been written, so it grows with the sequence and nothing is
    ever copied. A sequence that grows beyond that gets buffers half as large again.

    `append` a step's keys and values in every layer, then `advance` once:

    >>> import numpy as np
    >>> cache = KVCache(np, np.float32, layers=1, kv_heads=2, head_dim=4)
    >>> k, v = cache.append(0, np.ones((2, 3, 4)), np.ones((2, 3, 4)))
    >>> cache.advance(3)
    >>> k.shape, cache.length
    ((2, 3, 4), 3)
    """

    def __init__(self, xp, dtype, layers, kv_heads, head_dim, capacity=64):
        self.length = 0  # positions that all layers hold
        self._xp = xp
        self._buffers = [
            [xp.empty((kv_heads, capacity, head_dim), dtype=dtype) for _ in range(2)] for _ in range(layers)
        ]

    def append(self, layer, k, v):
        """Put `k`, `v` [K_r, T, d] behind the positions so far; return views of all, [K_r, S, d] each."""
        stop = self.length + k.shape[1]
        pair = self._buffers[layer]
        for i, new in enumerate((k, v)):
            if stop > pair[i].shape[1]:
                pair[i] = self._grown(pair[i], stop)
            pair[i][:, self.length : stop] = new
        return pair[0][:, :stop], pair[1][:, :stop]

    def advance(self, tokens):
        """The step of `tokens` positions is complete in every layer."""
        self.length += tokens

    def _grown(self, buffer, needed):
        kv_heads, capacity, head_dim = buffer.shape
        capacity = max(needed, capacity + capacity // 2)
        grown = self._xp.empty((kv_heads, capacity, head_dim), dtype=buffer.dtype)
        grown[:, : self.length] = buffer[:, : self.length]
        return grown

    @property
    def nbytes(self):
        """Bytes reserved for this rank's buffers."""
        return sum(buffer.nbytes for pair in self._buffers for buffer in pair)
