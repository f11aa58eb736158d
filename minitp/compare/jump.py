"""The jump of a step's error over the errors of its inputs, in a 16-bit run.

The tolerance of a 16-bit run is wide, because rounding errors add up over the layers: a mistake that changes
a step by 5% is within it. But rounding can change a single step only slightly, however wrong its inputs are.
So each step whose inputs are in both files is also judged by what it adds to their error.

A step that can be recomputed from B's inputs (see `inputs`) must be what they give:

    ||B - f(B's inputs)||  <=  4 u ||f|| + 2 u ||s||

u is the unit roundoff of the dtype. s is the error of attention's output for scores with a relative error of
one, because many engines round the scores to 16 bits, once or twice; for other steps it is 0. A product with
a weight matrix must not have much more error than its input:

    ||B - A|| / ||A||  <=  8 (1 + 2 / sqrt(n)) e + 4 u

e is the relative error of the input, averaged over the tokens with the squared norms of the product's rows as
weights, and n is the number of elements. Of logits, the mean of each row is subtracted first, because an
error that all logits share may be much larger, and does not change a probability.

On the other hand, the errors of a right run may add up to more than the tolerance. Its inputs *explain* a
step that meets the first bound, or the second with the factor 3 in place of 8, and then its error may be
LENIENCE times the tolerance. docs/compare.md has the measurements from which the factors follow.
"""

from dataclasses import dataclass

import numpy as np

from minitp.check.tolerance import roundoff
from minitp.compare.inputs import StepInputs
from minitp.oracle import ops as oracle_ops
from minitp.trace.names import AFTER, BEFORE, LAYER, split_name

ROUNDINGS = 4  # roundings of a step, each of which has at most the relative error u
SCORE_ROUNDINGS = 2  # roundings of the scores before the softmax
LOGITS = ("logits_partial", "logits")  # [T, V]
GAIN = 8  # largest factor by which a product with a weight matrix may multiply the error of its input
USUAL_GAIN = 3  # largest such factor that is not remarkable
LENIENCE = 3  # factor of the tolerance for a step whose inputs explain its error
NEWTON_STEPS = 6
MOST_SCORES = 1 << 24  # the largest H T S for which the search takes only seconds
NEGLIGIBLE = 1e-4  # relative error of a context for which no cause is sought
MUCH_CLOSER = 0.2  # fraction of the error that may remain if a factor of the scores explains it


@dataclass(frozen=True)
class Jump:
    """The comparison of a step's error with that of its inputs.

    Attributes
    ----------
    inherited : float or None
        The relative error of the step that its inputs explain; for a product, that of its input; None for a
        step without inputs.
    added : float or None
        ||B - f(B's inputs)|| / ||f||; None for a product, which cannot be recomputed.
    limit : float
        The largest `added`, or for a product the largest relative error, of a right run.
    error : float
        The relative error of the step; of logits, without the mean of each row.
    dtype : str
    usual : float
        The largest relative error of a product that its input explains.
    """

    inherited: float | None
    added: float | None
    limit: float
    error: float
    dtype: str
    usual: float = 0.0

    @property
    def too_large(self):
        return not (self.error if self.added is None else self.added) <= self.limit

    @property
    def explained(self):
        """Return whether the errors of the inputs explain that of the step."""
        return self.error <= self.usual if self.added is None else not self.too_large

    @property
    def text(self):
        """Return a sentence about an error that is too large."""
        error, limit = percent(self.error), f"{self.dtype} explains {percent(self.limit)}"
        if self.inherited is None:
            return f"its error is {error}, of which {limit}"
        said = f"its error jumps from {percent(self.inherited)} of its inputs to {error}"
        if self.added is None:
            return f"{said}, of which {limit}"
        if self.error < 1.5 * self.inherited:
            said = f"its error is {error} and that of its inputs {percent(self.inherited)}"
        return f"{said}; recomputed from B's inputs, it differs by {percent(self.added)}, of which {limit}"


class JumpRule:
    """The judgement of steps by their inputs, for a comparison with a minitp trace.

    Parameters
    ----------
    metadata : TraceMetadata
        The metadata of A.
    dtype : str or None
        The coarsest dtype in the files if it has 16 bits; None for a comparison that is not judged this way.
    read : callable
        A function from a step's name to its two arrays, float64, both in A's shape.
    known : container of str
        The steps that `read` has: those of which B has all of A's elements.
    """

    def __init__(self, metadata, dtype, read, known):
        self.steps, self.read, self.known, self.dtype = StepInputs(metadata), read, known, dtype

    def judge(self, name, a, b):
        """Return the Jump of a step, float64 arrays of the same shape; None if it cannot be judged."""
        names = self.steps.of(name, self.known)
        if names is None or self.dtype is None:
            return None
        u = roundoff(self.dtype)
        a_inputs, b_inputs = zip(*map(self.read, names), strict=True) if names else ((), ())
        recomputed = self.steps.recompute(name, b_inputs, a_inputs, a)
        if recomputed is None:
            return self._judge_product(name, a, b, names, a_inputs, b_inputs, u)
        value, spread = recomputed
        finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(value)
        size, expected = np.linalg.norm(a[finite]), np.linalg.norm(value[finite])
        limit = float(u * (ROUNDINGS + SCORE_ROUNDINGS * spread / expected)) if expected else np.inf
        if not size or not np.isfinite(limit):
            return None
        a, b, value = a[finite], b[finite], value[finite]
        error, inherited = (float(np.linalg.norm(x - a) / size) for x in (b, value))
        added = float(np.linalg.norm(b - value) / expected)
        return Jump(inherited if names else None, added, limit, error, self.dtype)

    def _judge_product(self, name, a, b, names, a_inputs, b_inputs, u):
        """Return the Jump of a product with a weight matrix, or None for arrays that are not finite."""
        if split_name(name)[2] in LOGITS and a.size:
            a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))  # [T, V] each
        size = np.linalg.norm(a)
        inherited = _row_error(name, a, names, a_inputs, b_inputs)
        if not size or not np.isfinite([inherited, np.linalg.norm(b)]).all():
            return None
        by_chance = 1 + 2 / a.size**0.5  # a few numbers may be small by chance
        limit, usual = (gain * by_chance * inherited + ROUNDINGS * u for gain in (GAIN, USUAL_GAIN))
        return Jump(inherited, None, limit, float(np.linalg.norm(b - a) / size), self.dtype, usual)

    def cause(self, name, a, b, jumps):
        """Return a likely cause of a difference that the step's inputs show, or the empty string.

        `jumps` says whether `judge` found the error too large for the step's inputs.
        """
        step = split_name(name)[2]
        router = name.removesuffix("experts") + "router"
        if step == "mlp.experts" and router in self.known:
            return self._other_experts(*self.read(router))
        names = self.steps.of(name, self.known)
        explained = self.dtype is not None and not jumps
        if step != "attn.context" or explained or names is None or len(names) != 3:
            return ""
        a_inputs, b_inputs = zip(*map(self.read, names), strict=True)
        if b_inputs[0].shape[0] * b_inputs[0].shape[1] * b_inputs[1].shape[1] > MOST_SCORES:
            return ""
        return _factor_of_scores(
            lambda factor: self.steps.recompute(name, b_inputs, a_inputs, a, factor)[0], b
        )

    def _other_experts(self, a, b):
        """Describe the tokens that go to other experts in B than in A, whose router logits are [T, E]."""
        per_token = self.steps.model.experts_per_token
        ours, theirs = (oracle_ops.choose_experts(x, per_token) for x in (a, b))  # bool [T, E] each
        tokens = np.flatnonzero((ours != theirs).any(axis=1)).tolist()
        return f"B's router logits choose other experts for tokens {tokens}" if tokens else ""


def _factor_of_scores(context_for, b):
    """Describe the factor of the scores that explains B's context, if there is one.

    The best power of two is refined with Newton's method for least squares. `context_for` computes the
    context [T, H d] for a factor.
    """

    def error(factor):
        return np.linalg.norm(b - context_for(factor))

    before = error(1.0)
    if not before > NEGLIGIBLE * np.linalg.norm(b):
        return ""
    factor = min(2.0 ** np.arange(-6, 7), key=error)
    for _ in range(NEWTON_STEPS):
        value = context_for(factor)
        slope = (context_for(factor * (1 + 1e-4)) - value) / (factor * 1e-4)
        if slope.any():
            factor *= np.exp(np.clip(np.vdot(slope, b - value) / np.vdot(slope, slope) / factor, -0.5, 0.5))
    return (
        f"as if the scores were {factor:.3g} times as large" if error(factor) <= MUCH_CLOSER * before else ""
    )


def percent(x):
    """Return a fraction as text, in percent with two digits."""
    return f"{100 * x:.0f}%" if x >= 1 or x < 1e-6 else f"{100 * x:.2g}%"


def _row_error(name, a, names, a_inputs, b_inputs):
    """Return the relative error of a product's inputs: the average over its tokens, by their size in `a`."""
    weights = np.square(_rows(name, a)).sum(axis=1)  # [T]
    if not weights.any():
        return 0.0
    squares = 0.0
    for input_name, x, y in zip(names, a_inputs, b_inputs, strict=True):
        x, y = _rows(input_name, x), _rows(input_name, y)  # [T, n] each
        size = np.square(x).sum(axis=1)  # [T]
        errors = np.divide(np.square(y - x).sum(axis=1), size, where=size > 0, out=np.zeros_like(size))  # [T]
        squares += np.vdot(weights, errors) / weights.sum()
    return float(squares**0.5)


def _rows(name, array):
    """Return a step's array with one row for each token: [T, n]."""
    axis = (BEFORE | LAYER | AFTER)[split_name(name)[2]].split().index("T")
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
