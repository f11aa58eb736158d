"""The KV cache: the keys and values of earlier positions, so that a pass computes only those of new tokens.

Every cache has the same small interface: `length`, the number of positions it holds; `append`, which adds
one layer's keys and values of a pass and returns those that attention reads; and `advance`, which ends a
pass after all layers have appended.

A KVCache holds one sequence in its own memory. Many sequences share a pool of blocks through
`paged_cache.PagedCache`. The arrays of both are `KVStorage` objects, in the compute dtype or a smaller one.
"""


class KVCache:
    """The keys and values of one sequence on one rank.

    Memory for `capacity` positions is reserved at once. On a CPU this costs only address space: the system
    provides each page of memory when it is first written, so memory use grows with the sequence. If a
    sequence outgrows the capacity, it is copied to memory for 1.5 times as many positions.

    Call `append` for every layer of a pass, then `advance` once:

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
        The dtype of the keys and values that `append` takes and returns.
    layers, kv_heads, head_dim : int
    capacity : int
        The number of positions to reserve memory for.
    kv_dtype : str
        The dtype in which they are stored: auto (`dtype`), float16 or int8.
    """

    def __init__(self, xp, dtype, layers, kv_heads, head_dim, capacity=64, kv_dtype="auto"):
        self.length = 0  # positions held by every layer
        self.storage = make_storage(xp, dtype, layers, (kv_heads, capacity, head_dim), kv_dtype)

    def append(self, layer, k, v, first=0):
        """Append `k`, `v` [K_r, n, d]; return keys and values from position `first` on, [K_r, S, d] each."""
        stop = self.length + k.shape[1]
        pair = self.storage[layer]
        if stop > pair[0].capacity:
            capacity = max(stop, pair[0].capacity + pair[0].capacity // 2)
            pair[:] = [stored.grown(capacity, self.length) for stored in pair]
        for stored, new in zip(pair, (k, v), strict=True):
            stored.write(slice(self.length, stop), new)
        return pair[0].read(slice(first, stop)), pair[1].read(slice(first, stop))  # [K_r, S, d] each

    def advance(self, tokens):
        """End a pass: add `tokens`, the number of positions that every layer has appended, to `length`."""
        self.length += tokens

    @property
    def nbytes(self):
        """The number of bytes reserved on this rank."""
        return sum(stored.nbytes for pair in self.storage for stored in pair)


def make_storage(xp, dtype, layers, shape, kv_dtype):
    """Return a [keys, values] pair per layer, each a KVStorage of `shape` [K_r, n, d] in dtype `kv_dtype`."""
    kind = Int8KVStorage if kv_dtype == "int8" else KVStorage
    stored_dtype = dtype if kv_dtype == "auto" else xp.dtype(kv_dtype)
    return [[kind(xp, shape, dtype, stored_dtype) for _ in range(2)] for _ in range(layers)]


class KVStorage:
    """The keys or the values of one layer, [K_r, capacity, d], in the dtype in which they are stored."""

    def __init__(self, xp, shape, dtype, stored_dtype):
        self.xp, self.dtype = xp, dtype
        self.values = xp.empty(shape, dtype=stored_dtype)  # [K_r, capacity, d]

    @property
    def capacity(self):
        """The number of positions with reserved memory."""
        return self.values.shape[1]

    @property
    def nbytes(self):
        """The number of bytes reserved."""
        return self.values.nbytes

    def write(self, slots, x):
        """Store x [K_r, n, d] in these slots, a slice or int [n]."""
        self.values[:, slots] = x  # [K_r, n, d]

    def read(self, slots):
        """Return a slice of slots, [K_r, n, d], in the compute dtype; a view if that is the stored dtype."""
        return self.values[:, slots].astype(self.dtype, copy=False)  # [K_r, n, d]

    def gather(self, slots):
        """Return a copy of the slots with numbers int [n], in the compute dtype, [K_r, n, d]."""
        # NumPy's `take` is twice as fast as indexing.
        return self.values.take(slots, axis=1).astype(self.dtype, copy=False)  # [K_r, n, d]

    def grown(self, capacity, length):
        """Return a storage for `capacity` positions with a copy of the first `length` positions."""
        kv_heads, _, head_dim = self.values.shape
        grown = type(self)(self.xp, (kv_heads, capacity, head_dim), self.dtype, self.values.dtype)
        grown.values[:, :length] = self.values[:, :length]  # [K_r, length, d]
        return grown


class Int8KVStorage(KVStorage):
    """A KVStorage of int8 numbers from -127 to 127, with a float32 scale for each position and head.

    A key or value x of a head is divided by scale = max(abs(x)) / 127 and rounded, so the error of an element
    is at most scale / 2, which is 1/254 of the largest element.
    """

    def __init__(self, xp, shape, dtype, stored_dtype):
        super().__init__(xp, shape, dtype, stored_dtype)
        self.scales = xp.empty((*shape[:2], 1), dtype=xp.float32)  # [K_r, capacity, 1]

    @property
    def nbytes(self):
        """The number of bytes reserved, including the scales."""
        return self.values.nbytes + self.scales.nbytes

    def write(self, slots, x):
        """Store x [K_r, n, d] in these slots, as KVStorage does."""
        x = x.astype(self.xp.float32, copy=False)  # [K_r, n, d]
        scale = self.xp.abs(x).max(axis=-1, keepdims=True) / 127  # [K_r, n, 1]
        self.scales[:, slots] = scale  # [K_r, n, 1]
        scale = self.xp.where(scale > 0, scale, 1)  # [K_r, n, 1]: a head of zeros stays zero
        self.values[:, slots] = self.xp.rint(x / scale).astype(self.xp.int8)  # [K_r, n, d]

    def read(self, slots):
        """Return a copy of these slots in the compute dtype, [K_r, n, d]."""
        values = self.values[:, slots].astype(self.xp.float32)  # [K_r, n, d]
        return (values * self.scales[:, slots]).astype(self.dtype, copy=False)  # [K_r, n, d]

    def gather(self, slots):
        """Return a copy of the slots with numbers int [n], in the compute dtype, [K_r, n, d]."""
        values = self.values.take(slots, axis=1).astype(self.xp.float32)  # [K_r, n, d]
        return (values * self.scales.take(slots, axis=1)).astype(self.dtype, copy=False)  # [K_r, n, d]

    def grown(self, capacity, length):
        """Return a larger storage, with the scales, as KVStorage does."""
        grown = super().grown(capacity, length)
        grown.scales[:, :length] = self.scales[:, :length]  # [K_r, length, 1]
        return grown
