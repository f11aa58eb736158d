"""The keys and values of all earlier positions, so that a step computes only its own.

Every cache has the same small interface: `length`, the positions that it holds; `append`, which puts the keys
and values of a step behind them and returns what attention reads; `advance`, when a step is complete in all
layers.

KVCache is one sequence in memory of its own; `paged_cache` has the one for many that share a pool of blocks.
How the numbers are kept, in the compute dtype or smaller, is the business of `KVStorage` below both.
"""


class KVCache:
    """One sequence's keys and values on one rank.

    The memory is reserved for `capacity` positions at once. On a CPU that costs address space only: the
    system gives memory, page by page, to what has been written, so it grows with the sequence. A sequence
    that outgrows its capacity gets half as much again, and is copied there.

    `append` a step's keys and values in every layer, then `advance` once:

    >>> import numpy as np
    >>> cache = KVCache(np, np.float32, layers=1, kv_heads=2, head_dim=4)
    >>> k, v = cache.append(0, np.ones((2, 3, 4)), np.ones((2, 3, 4)))
    >>> cache.advance(3)
    >>> k.shape, cache.length
    ((2, 3, 4), 3)

    Parameters
    ----------
    xp : module
    dtype : numpy.dtype
        Of what goes in and comes out.
    layers, kv_heads, head_dim : int
    capacity : int
        Positions.
    kv_dtype : str
        How they are kept: auto, as they come; float16; or int8.
    """

    def __init__(self, xp, dtype, layers, kv_heads, head_dim, capacity=64, kv_dtype="auto"):
        self.length = 0  # positions that all layers hold
        self.storage = make_storage(xp, dtype, layers, (kv_heads, capacity, head_dim), kv_dtype)

    def append(self, layer, k, v, first=0):
        """Put `k`, `v` [K_r, n, d] behind the positions so far; return those from `first` on, [K_r, S, d]."""
        stop = self.length + k.shape[1]
        pair = self.storage[layer]
        if stop > pair[0].capacity:
            capacity = max(stop, pair[0].capacity + pair[0].capacity // 2)
            pair[:] = [stored.grown(capacity, self.length) for stored in pair]
        for stored, new in zip(pair, (k, v), strict=True):
            stored.write(slice(self.length, stop), new)
        return pair[0].read(slice(first, stop)), pair[1].read(slice(first, stop))  # [K_r, S, d] each

    def advance(self, tokens):
        """The step of `tokens` positions is complete in every layer."""
        self.length += tokens

    @property
    def nbytes(self):
        """Bytes reserved on this rank."""
        return sum(stored.nbytes for pair in self.storage for stored in pair)


def make_storage(xp, dtype, layers, shape, kv_dtype):
    """For each layer the KVStorage of keys and of values, [K_r, n, d], that --kv-dtype asks for."""
    kind = Int8KVStorage if kv_dtype == "int8" else KVStorage
    kept = dtype if kv_dtype == "auto" else xp.dtype(kv_dtype)
    return [[kind(xp, shape, dtype, kept) for _ in range(2)] for _ in range(layers)]


class KVStorage:
    """Keys or values of one layer, [K_r, capacity, d], kept in a dtype of their own."""

    def __init__(self, xp, shape, dtype, kept):
        self.xp, self.dtype = xp, dtype
        self.values = xp.empty(shape, dtype=kept)  # [K_r, capacity, d]

    @property
    def capacity(self):
        """Positions."""
        return self.values.shape[1]

    @property
    def nbytes(self):
        """Bytes reserved."""
        return self.values.nbytes

    def write(self, slots, x):
        """Keep x [K_r, n, d] at these positions: a slice, or int [n]."""
        self.values[:, slots] = x

    def read(self, slots):
        """[K_r, n, d] of a slice of positions in the compute dtype; a view if that is what is kept."""
        return self.values[:, slots].astype(self.dtype, copy=False)  # [K_r, n, d]

    def gather(self, slots):
        """The same of positions int [n], as a copy. (NumPy's take, for its index takes twice as long.)"""
        return self.values.take(slots, axis=1).astype(self.dtype, copy=False)  # [K_r, n, d]

    def grown(self, capacity, length):
        """The first `length` positions in KVStorage of that capacity."""
        kv_heads, _, head_dim = self.values.shape
        grown = type(self)(self.xp, (kv_heads, capacity, head_dim), self.dtype, self.values.dtype)
        grown.values[:, :length] = self.values[:, :length]
        return grown


class Int8KVStorage(KVStorage):
    """Whole numbers from -127 to 127, and for each position and head the float32 that one of them stands for.

    The largest element of a head's key or value becomes 127, so no element is off by more than 1/254 of that.
    """

    def __init__(self, xp, shape, dtype, kept):
        super().__init__(xp, shape, dtype, kept)
        self.scales = xp.empty((*shape[:2], 1), dtype=xp.float32)  # [K_r, capacity, 1]

    @property
    def nbytes(self):
        """Bytes reserved, the scales included."""
        return self.values.nbytes + self.scales.nbytes

    def write(self, slots, x):
        """As in KVStorage."""
        x = x.astype(self.xp.float32, copy=False)  # [K_r, n, d]
        scale = self.xp.abs(x).max(axis=-1, keepdims=True) / 127  # [K_r, n, 1]
        self.scales[:, slots] = scale
        scale = self.xp.where(scale > 0, scale, 1)  # [K_r, n, 1]: a head of zeros stays zeros
        self.values[:, slots] = self.xp.rint(x / scale).astype(self.xp.int8)

    def read(self, slots):
        """As in KVStorage, always a copy."""
        values = self.values[:, slots].astype(self.xp.float32)  # [K_r, n, d]
        return (values * self.scales[:, slots]).astype(self.dtype, copy=False)  # [K_r, n, d]

    def gather(self, slots):
        """As in KVStorage."""
        values = self.values.take(slots, axis=1).astype(self.xp.float32)  # [K_r, n, d]
        return (values * self.scales.take(slots, axis=1)).astype(self.dtype, copy=False)  # [K_r, n, d]

    def grown(self, capacity, length):
        """As in KVStorage."""
        grown = super().grown(capacity, length)
        grown.scales[:, :length] = self.scales[:, :length]
        return grown
