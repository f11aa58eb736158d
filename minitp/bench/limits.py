"""The limits of this machine, measured through the very products that a model is made of.

A forward pass cannot take less time than its matrix products: for a few tokens they are bound by reading the
weights, for many by arithmetic. All ranks measure at the same time, for they share the memory.
"""

import math
from statistics import median
from time import perf_counter

import numpy as np

LEAST_S = 0.2  # of a measurement, or repeat what is measured
ALL_REDUCE_BYTES = (4, 4 << 10, 64 << 10, 1 << 20)


class BareProducts:
    """Only the matrix products of a model, in its own weights: no norm, no RoPE, no softmax, no collective.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model):
        self.model = model
        self.xp, self.dtype = model.device.xp, model.device.dtype
        layers, self.lm_head = model.weights.layers, model.weights.lm_head
        self.layers = [(w.w_qkv, w.w_o, w.w_gate_up, w.w_down) for w in layers]
        self._ones, self._cache = {}, None

    def run(self, parts, logit_rows):
        """A pass of some sequences, of which `logit_rows` positions get logits.

        `parts` are (tokens of this pass, keys that they read) of each sequence.
        """
        rows = sum(tokens for tokens, _ in parts)
        self.reserve(len(parts), max(keys for _, keys in parts))
        for i, matrices in enumerate(self.layers):
            for matrix in matrices:
                self._product(rows, matrix)
            for (tokens, keys), own in zip(parts, self._cache, strict=False):
                self._attention(tokens, own[i, :, :, :keys])
        self._product(logit_rows, self.lm_head)

    def weight_elements(self, rows=1, logit_rows=1):
        """That this rank multiplies by, each counted as often as it has rows."""
        layers = sum(m.size for matrices in self.layers for m in matrices)
        return rows * layers + logit_rows * self.lm_head.size

    def cache_bytes(self, keys):
        """That a token reads in the cache of this rank."""
        return keys * self.model.new_cache(1).nbytes

    def _product(self, rows, matrix):
        self.xp.matmul(self._row(rows, matrix.shape[0]), matrix, dtype=np.float32)

    def _attention(self, tokens, kv):
        k, v = kv  # [K_r, S, d] each
        for n, (start, stop) in enumerate(self.model.query_groups):
            queries = (stop - start) * tokens
            self.xp.matmul(self._row(queries, k.shape[2]), k[n].T, dtype=np.float32)
            self.xp.matmul(self._row(queries, k.shape[1]), v[n], dtype=np.float32)

    def _row(self, *shape):
        if shape not in self._ones:
            self._ones[shape] = self.xp.ones(shape, dtype=self.dtype)
        return self._ones[shape]

    def reserve(self, sequences, keys):
        """Have keys and values for so many sequences, in memory of each one's own as in a cache."""
        if self._cache is None or len(self._cache) < sequences or self._cache.shape[4] < keys:
            model = self.model
            shape = (sequences, len(self.layers), 2, model.kv_heads, keys, model.config.head_dim)
            self._cache = self.xp.ones(shape, dtype=self.dtype)  # [sequences, layers, 2, K_r, S, d]


def together(comm, function, least_s=LEAST_S):
    """Seconds that a call of `function` takes when all ranks call it at once, until the last has done.

    It is called as often as takes `least_s`, the same number of times everywhere.
    """
    seconds = _timed(comm, function, 1)
    calls = math.ceil(least_s / seconds) if seconds < least_s else 0
    return _timed(comm, function, calls) if calls else seconds


def _timed(comm, function, calls):
    comm.exchange(None)
    _meet(comm)
    started = perf_counter()
    for _ in range(calls):
        function()
    _meet(comm)
    return comm.broadcast((perf_counter() - started) / calls)


def _meet(comm):
    """All ranks are here; unlike `exchange` this does not sleep."""
    comm.all_reduce(np.zeros(1, np.float32))  # [1]


def all_reduce_seconds(comm, xp, nbytes, rounds=5):
    """The median time of an all-reduce of float32 of so many bytes, one after the other."""
    x = xp.zeros(nbytes // 4, dtype=np.float32)  # [n]
    return median(together(comm, lambda: comm.all_reduce(x), least_s=0.02) for _ in range(rounds))


def bandwidth(comm, products):
    """Bytes a second that all ranks together read through the products of single tokens."""
    seconds = together(comm, lambda: products.run([(1, 1)], logit_rows=1))
    return total_elements(comm, products) * products.dtype.itemsize / seconds


def matrix_rate(comm, products, rows):
    """Multiplications and additions a second of all ranks together, in products of `rows` rows."""
    seconds = together(comm, lambda: products.run([(rows, 1)], logit_rows=1))
    return 2 * total_elements(comm, products, rows) / seconds


def total_elements(comm, products, rows=1):
    """Elements that a pass multiplies `rows` rows by, and one row for logits, on all ranks together."""
    return sum(comm.exchange(products.weight_elements(rows)))
