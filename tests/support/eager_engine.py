"""An engine that rounds every intermediate to 16 bits, as eager PyTorch code does: the oracle with roundings.

It also rounds the cosines and sines of RoPE, the scores, the probabilities and the activation, which minitp
keeps in float32.
"""

import numpy as np

import minitp.oracle.model as oracle_model
from minitp.loading.source import open_model
from minitp.oracle import ops
from minitp.trace.reference import open_oracle, oracle_steps


class EagerOps:
    """The oracle's operations with their results rounded to a dtype; the arrays are float64."""

    def __init__(self, dtype):
        self.dtype = dtype

    def round(self, x):
        return np.asarray(x, np.float64).astype(self.dtype).astype(np.float64)

    def embed(self, token_ids, table):
        return self.round(np.asarray(table, np.float64)[list(token_ids)])

    def linear(self, x, weight, bias=None):
        y = self.round(ops.linear(x, self.round(weight)))
        return y if bias is None else self.round(y + self.round(bias))

    def rms_norm(self, x, weight, eps):
        return self.round(self.round(ops.rms_norm(x, np.ones(x.shape[-1]), eps)) * self.round(weight))

    def rope(self, x, positions, inverse_frequencies, factor=1.0):
        angles = np.multiply.outer(positions, inverse_frequencies)  # [T, R/2]
        cos, sin = self.round(np.cos(angles) * factor), self.round(np.sin(angles) * factor)  # [T, R/2] each
        half = len(inverse_frequencies)  # R/2
        a, b, rest = np.split(x, [half, 2 * half], axis=-1)  # [n, T, R/2], [n, T, R/2], [n, T, d - R]
        first = self.round(a * cos) - self.round(b * sin)  # [n, T, R/2]
        second = self.round(b * cos) + self.round(a * sin)  # [n, T, R/2]
        return self.round(np.concatenate((first, second, rest), axis=-1))

    def scores(self, q, k, mask, root=None, cap=None):
        dots = self.round(ops.scores(q, k, np.ones_like(mask), 1.0))  # [H, T, S]
        dots = self.round(dots / (root or np.sqrt(q.shape[-1])))  # [H, T, S]
        dots = dots if cap is None else self.round(ops.soft_cap(dots, cap))  # [H, T, S]
        return np.where(mask, dots, -np.inf)  # [H, T, S]

    def softmax(self, x):
        return self.round(ops.softmax(x))

    def context(self, probs, v):
        return self.round(ops.context(probs, v))

    def swiglu(self, gate, up):
        return self.round(self.round(ops.swiglu(gate, 1.0)) * up)

    def geglu(self, gate, up):
        return self.round(self.round(ops.geglu(gate, 1.0)) * up)


def eager_steps(monkeypatch, name, token_ids, passes, dtype):
    """Run a model in the eager engine; return its steps of all passes by full name, in `dtype`."""
    eager = EagerOps(dtype)
    for operation in [name for name in vars(EagerOps) if not name.startswith("_") and name != "round"]:
        monkeypatch.setattr(oracle_model, operation, getattr(eager, operation))
    oracle, found = open_oracle(open_model(str(name), 1)), {}
    steps = oracle.steps

    def rounded(ids):
        for step, array in steps(ids):
            if array.dtype == np.float64:
                array[...] = eager.round(array)  # the oracle goes on with it
            yield step, array

    oracle.steps = rounded
    for step, array in oracle_steps(oracle, token_ids, passes):
        found[step] = array.astype(dtype) if array.dtype == np.float64 else array.copy()
    return found
