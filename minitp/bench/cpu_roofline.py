"""The limits of a CPU, measured with the matrix products of the model itself.

A forward pass cannot take less time than its matrix products: for a few tokens they are bound by reading the
weights, for many by arithmetic. All ranks measure at the same time, because they share the memory.
"""

import math
from statistics import median
from time import perf_counter

import numpy as np

from minitp.bench.roofline import ALL_REDUCE_BYTES, Roofline, total_elements
from minitp.comm.single import SingleRank

LEAST_S = 0.2  # minimum duration of a measurement; shorter calls are repeated


class BareProducts(Roofline):
    """The matrix products of a model with its own weights: no norm, no RoPE, no softmax, no collective.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model):
        super().__init__(model)
        self.xp = model.device.xp
        self._ones, self._cache = {}, None

    def measure(self, prompt_tokens):
        comm = self.model.comm
        sizes = sorted({*ALL_REDUCE_BYTES, 4 * self.model.config.hidden_size})
        sizes = [] if isinstance(comm, SingleRank) else sizes
        return {
            "bytes_per_token": total_elements(comm, self) * self.dtype.itemsize,
            "bandwidth_gb_per_s": bandwidth(comm, self) / 1e9,
            "matrix_gflop_per_s": matrix_rate(comm, self, min(prompt_tokens, self.model.prefill_chunk)) / 1e9,
            "all_reduce": [{"bytes": n, "us": 1e6 * all_reduce_seconds(comm, self.xp, n)} for n in sizes],
        }

    def seconds(self, passes):
        self.reserve(
            max(len(parts) for parts, _ in passes), max(keys for parts, _ in passes for _, keys in parts)
        )

        def multiply():
            for parts, logit_rows in passes:
                self.multiply(parts, logit_rows)

        return synchronized_seconds(self.model.comm, multiply)

    def collective_shares(self, rounds):
        shares = [one.all_reduce_shares for one in rounds]  # [rounds, ranks]
        return [median(of_rank) for of_rank in zip(*shares, strict=True)]

    def multiply(self, parts, logit_rows):
        """Compute the products of a pass, which is (parts, logit_rows) as in Roofline."""
        rows = sum(tokens for tokens, _ in parts)
        self.reserve(len(parts), max(keys for _, keys in parts))
        for i, layer in enumerate(self.layers):
            for n, matrix in self.products(layer, rows):
                self._product(n, matrix)
            for (tokens, keys), cache in zip(parts, self._cache, strict=False):
                self._attention(tokens, cache[i, :, :, :keys])
        self._product(logit_rows, self.lm_head)

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
        """Allocate keys and values for `sequences`, each with separate memory as in a cache."""
        if self._cache is None or len(self._cache) < sequences or self._cache.shape[4] < keys:
            model = self.model
            shape = (sequences, len(self.layers), 2, model.kv_heads, keys, model.config.head_dim)
            self._cache = self.xp.ones(shape, dtype=self.dtype)  # [sequences, layers, 2, K_r, S, d]


def synchronized_seconds(comm, function, least_s=LEAST_S):
    """Return the time in seconds of a call that all ranks make at once, until the last one returns.

    The call is repeated until `least_s` have passed, the same number of times on all ranks.
    """
    seconds = _timed(comm, function, 1)
    calls = math.ceil(least_s / seconds) if seconds < least_s else 0
    return _timed(comm, function, calls) if calls else seconds


def _timed(comm, function, calls):
    comm.allgather_object(None)
    _barrier(comm)
    started = perf_counter()
    for _ in range(calls):
        function()
    _barrier(comm)
    return comm.broadcast((perf_counter() - started) / calls)


def _barrier(comm):
    """Wait until all ranks have arrived; unlike `allgather_object`, this does not sleep."""
    comm.all_reduce(np.zeros(1, np.float32))  # [1]


def all_reduce_seconds(comm, xp, nbytes, rounds=5):
    """Return the median time in seconds of a float32 all-reduce of `nbytes`."""
    x = xp.zeros(nbytes // 4, dtype=np.float32)  # [n]
    return median(synchronized_seconds(comm, lambda: comm.all_reduce(x), least_s=0.02) for _ in range(rounds))


def bandwidth(comm, products):
    """Return the bytes per second that all ranks together read in the products of single tokens."""
    seconds = synchronized_seconds(comm, lambda: products.multiply([(1, 1)], logit_rows=1))
    return total_elements(comm, products) * products.dtype.itemsize / seconds


def matrix_rate(comm, products, rows):
    """Return the multiplications and additions per second of all ranks, in products of `rows` rows."""
    seconds = synchronized_seconds(comm, lambda: products.multiply([(rows, 1)], logit_rows=1))
    return 2 * total_elements(comm, products, rows) / seconds
