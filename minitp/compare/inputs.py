"""The inputs of each step, and the operation that computes the step from them.

A step whose operation needs no weight can be recomputed from B's own inputs: RoPE, attention, the activation,
the residual stream and the cache. So can a norm, because its weight is what turns A's input into A's output.
Products with a weight matrix cannot, because the matrix is not in the files.
"""

from functools import partial

import numpy as np

from minitp.oracle import Oracle
from minitp.oracle import ops as oracle_ops
from minitp.trace.names import AFTER, BEFORE, full_name, split_name

STREAM = "the residual stream before the layer"
INPUTS = {  # step -> steps that it is computed from; the first tuple of which both files have all is used
    "embed": [()],  # rows of a table, so that A's array is what B should have
    "attn.norm": [(STREAM,)],
    "attn.q": [("attn.norm",)],
    "attn.k": [("attn.norm",)],
    "attn.v": [("attn.norm",)],
    "attn.q_norm": [("attn.q",)],
    "attn.k_norm": [("attn.k",)],
    "attn.q_rope": [("attn.q",)],
    "attn.k_rope": [("attn.k",)],
    "attn.k_cache": [("attn.k_rope",)],
    "attn.v_cache": [("attn.v",)],
    "attn.scores": [("attn.q_rope", "attn.k_cache")],
    "attn.probs": [("attn.scores",)],
    "attn.context": [("attn.probs", "attn.v_cache"), ("attn.q_rope", "attn.k_cache", "attn.v_cache")],
    "attn.out_partial": [("attn.context",)],
    "attn.out": [("attn.out_partial",), ("attn.context",)],
    "attn.post_norm": [("attn.out",)],
    "attn.residual": [("attn.out", STREAM)],
    "mlp.norm": [("attn.residual",)],
    "mlp.router": [("mlp.norm",)],
    "mlp.gate": [("mlp.norm",)],
    "mlp.up": [("mlp.norm",)],
    "mlp.act": [("mlp.gate", "mlp.up")],
    "mlp.out_partial": [("mlp.act",), ("mlp.experts", "mlp.router")],
    "mlp.out": [("mlp.out_partial",), ("mlp.act",), ("mlp.experts", "mlp.router")],
    "mlp.post_norm": [("mlp.out",)],
    "mlp.residual": [("mlp.out", "attn.residual")],
    "final_norm": [(STREAM,)],
    "logits_partial": [("final_norm",)],
    "logits": [("final_norm",)],
}
HEAD_NORMS = {"attn.q_rope": [("attn.q_norm",)], "attn.k_rope": [("attn.k_norm",)]}
POST_NORMS = {
    "attn.residual": [("attn.post_norm", STREAM)],
    "mlp.residual": [("mlp.post_norm", "attn.residual")],
}


class StepInputs:
    """The inputs of the steps of a model, and the operations that need no weight.

    Parameters
    ----------
    metadata : TraceMetadata
        The metadata of A; the model's settings and the positions of the passes are read from it.
    """

    def __init__(self, metadata):
        self.model = Oracle(metadata.fields, None, metadata.layers)  # for its settings; it has no weights
        self.passes = metadata.passes
        self._inputs = INPUTS | (HEAD_NORMS if self.model.norms_heads else {})
        self._inputs |= POST_NORMS if self.model.post_norms else {}
        operations = {
            "q_rope": self._rope,
            "k_rope": self._rope,
            "k_cache": self._cache,
            "v_cache": self._cache,
        }
        operations |= {
            "norm": self._norm,
            "q_norm": self._norm,
            "k_norm": self._norm,
            "post_norm": self._norm,
        }
        operations |= {"scores": self._scores, "probs": self._probs, "context": self._context}
        operations |= {"residual": self._residual, "act": self._act, "final_norm": self._norm}
        operations |= {"embed": lambda layer, positions, inputs, a_inputs, a: a}
        self._operations = operations

    def of(self, name, known):
        """Return the full names of a step's inputs, or None if they are not all in `known`.

        A cache also has the cache of the pass before as an input, after which it appends.
        """
        pass_name, layer, step = split_name(name)
        if pass_name not in self.passes or (layer is None) != (step in BEFORE | AFTER):
            return None
        start, _ = self.passes[pass_name]
        for steps in self._inputs.get(step, ()):
            names = [self._full(pass_name, layer, each) for each in steps]
            if step.endswith("_cache") and start > 0:
                before = [other for other, (_, stop) in self.passes.items() if stop == start]
                names += [full_name(other, layer, step) for other in before[:1]] or [None]
            if all(each in known for each in names):
                return names
        return None

    def _full(self, pass_name, layer, step):
        if step == STREAM:
            last = self.model.layers if layer is None else layer
            return (
                full_name(pass_name, last - 1, "mlp.residual")
                if last
                else full_name(pass_name, None, "embed")
            )
        return full_name(pass_name, None if step in AFTER else layer, step)

    def recompute(self, name, inputs, a_inputs, a, factor=1.0):
        """Return a step as computed from B's inputs, and the error that 16-bit scores cause in it.

        Parameters
        ----------
        name : str
        inputs, a_inputs : list of float64 arrays
            The inputs of `of` in B and in A, in A's shapes.
        a : float64 array
            The step in A.
        factor : float
            A factor by which the scores are multiplied.

        Returns
        -------
        (array, float), or None for a product with a weight matrix
            The array, and its absolute error for scores with a relative rounding error of one.
        """
        pass_name, layer, step = split_name(name)
        operation = self._operations.get(step.rpartition(".")[2])
        if operation is None:
            return None
        start, stop = self.passes[pass_name]
        if operation in (self._scores, self._probs, self._context):
            operation = partial(operation, factor=factor)
        with np.errstate(all="ignore"):
            value = operation(layer, np.arange(start, stop), inputs, a_inputs, a)
        return value if isinstance(value, tuple) else (value, 0.0)

    # Each operation takes the layer, the positions [T], B's inputs, A's inputs, and A's array of the step.

    def _norm(self, layer, positions, inputs, a_inputs, a):
        """Normalize with the weights that explain A: [.., D] -> [.., D]; NaN where A's input is 0."""
        plain = oracle_ops.rms_norm(a_inputs[0], np.ones(a.shape[-1]), self.model.eps)  # [.., D]
        axes = tuple(range(a.ndim - 1))
        squares = np.square(plain).sum(axes)  # [D]
        weight = np.divide(
            (a * plain).sum(axes), squares, where=squares > 0, out=np.full_like(squares, np.nan)
        )  # [D]
        return oracle_ops.rms_norm(inputs[0], weight, self.model.eps)

    def _rope(self, layer, positions, inputs, a_inputs, a):
        if not self.model.turns[layer]:
            return inputs[0]
        return oracle_ops.rope(inputs[0], positions, *self.model.rotations[layer])

    def _cache(self, layer, positions, inputs, a_inputs, a):
        new, *before = inputs  # [K, T, d], and [K, S, d] of the pass before
        return np.concatenate((*before, new), axis=1)[:, -a.shape[1] :]  # [K, S, d]

    def _scores(self, layer, positions, inputs, a_inputs, a, factor):
        q, k = inputs[:2]  # [H, T, d], [K, S, d]
        keys = np.arange(positions[-1] + 1 - k.shape[1], positions[-1] + 1)  # [S]
        mask = oracle_ops.causal_mask(positions, keys, self.model.windows[layer])  # [T, S]
        root = self.model.score_root / factor
        return oracle_ops.scores(q, k, mask, root, self.model.score_cap)  # [H, T, S]

    def _probs(self, layer, positions, inputs, a_inputs, a, factor):
        probs = oracle_ops.softmax(factor * inputs[0])  # [H, T, S]
        squares = np.square(_weighted(probs, inputs[0]))  # [H, T, S]
        spread = squares + np.square(probs) * squares.sum(-1, keepdims=True)  # [H, T, S]
        return probs, spread.sum() ** 0.5

    def _context(self, layer, positions, inputs, a_inputs, a, factor):
        """Compute the context from the probabilities, or else from q and k; one query head at a time."""
        v = inputs[-1]  # [K, S, d]
        if len(inputs) == 2:
            return oracle_ops.context(inputs[0], v)  # [T, H d]
        q, k, found, spread = inputs[0], inputs[1], [], 0.0
        group = len(q) // len(v)
        for h in range(len(q)):
            one = slice(h // group, h // group + 1)
            scores = self._scores(layer, positions, (q[h : h + 1], k[one]), None, None, factor)  # [1, T, S]
            probs = oracle_ops.softmax(scores)  # [1, T, S]
            context = oracle_ops.context(probs, v[one])  # [T, d]
            found.append(context)
            # The sum over s of (p_s score_s (v_s - context))^2, multiplied out.
            squares = np.square(_weighted(probs, scores))[0]  # [T, S]
            spread += (squares @ np.square(v[one][0]) - 2 * context * (squares @ v[one][0])).sum()
            spread += (np.square(context) * squares.sum(-1, keepdims=True)).sum()
        return np.concatenate(found, axis=-1), max(spread, 0.0) ** 0.5  # [T, H d]

    def _residual(self, layer, positions, inputs, a_inputs, a):
        out, x = inputs  # [T, D] each
        return x + self.model.residual_scale * out  # [T, D]

    def _act(self, layer, positions, inputs, a_inputs, a):
        return (oracle_ops.swiglu if self.model.activation == "silu" else oracle_ops.geglu)(*inputs)  # [T, F]


def _weighted(probs, scores):
    """Return p s, the change of each term of a softmax for a relative error of one in its score."""
    return np.where(probs > 0, probs * np.where(np.isfinite(scores), scores, 0), 0)
