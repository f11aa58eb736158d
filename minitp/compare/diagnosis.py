"""What may be the cause when a step departs: mistakes that are often made, tried one by one.

A cause is named if A, with that mistake made on purpose, is B within the tolerance, and far nearer than A
itself. It is a help for people and never makes a step pass.
"""

from itertools import chain

import ml_dtypes
import numpy as np

from minitp.oracle import ops as oracle_ops
from minitp.trace.names import split_name

ROTATED = ("attn.q_rope", "attn.k_rope", "attn.k_cache")  # [n, T, d], or [K, S, d]
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")  # [n * d, D], [n * d]
FAR_NEARER = 0.2  # so much of the error may be left
NEAR = 0.3  # relative error up to which rounding may be the cause


def diagnose(name, letters, a, b, tolerance, facts=None):
    """A likely cause as text, or the empty string.

    Parameters
    ----------
    name : str
        Of the step.
    letters : list of str or None
        Of its axes, as in `trace.names`.
    a, b : float64, of one shape
    tolerance : float
        Relative.
    facts : TraceMetadata or None
        Of A's trace, if it is one of ours.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all() and a.any() and b.any()):
        return ""
    tried = [_scaled(a, b), _shifted(letters, a, b), _interleaved(name, letters, a, b, facts)]
    passed = split_name(name)[0].rpartition("/")[2]  # without the rank of a raw piece
    if facts and name.endswith(ROTATED) and passed in facts.passes:
        tried.append(_rotated(a, b, facts, stop=facts.passes[passed][1]))
    error = np.linalg.norm(b - a)
    for text, expected, found in chain(*tried):
        left = np.linalg.norm(found - expected)
        if left <= tolerance * np.linalg.norm(expected) and left <= FAR_NEARER * error:
            return text
    return _rounded(a, b) if error <= NEAR * np.linalg.norm(a) else ""


# Each of these yields (what it is, what would then be expected, what was found).


def _scaled(a, b):
    factor = np.vdot(a, b) / np.vdot(a, a)
    yield f"B is {factor:.6g} * A", factor * a, b


def _shifted(letters, a, b):
    """Rows one place off, along the axes of tokens; of an unknown array, along any axis but the last."""
    axes = [i for i in range(a.ndim - 1) if letters is None or letters[i] in "TS"]
    for axis in axes:
        n = a.shape[axis]
        if n < 3:
            continue
        a_early, b_early = (np.take(x, range(n - 1), axis) for x in (a, b))
        a_late, b_late = (np.take(x, range(1, n), axis) for x in (a, b))
        yield "position t of B is position t - 1 of A: shifted by one", a_early, b_late
        yield "position t of B is position t + 1 of A: shifted by one", a_late, b_early


def _interleaved(name, letters, a, b, facts):
    """The dimensions of a head in the order of the other RoPE layout."""
    if facts and name.endswith(PROJECTIONS):
        by_head = (-1, facts.config.head_dim, *a.shape[1:])
        a, b = (np.moveaxis(x.reshape(by_head), 1, -1) for x in (a, b))
    elif not (letters[-1] == "d" if letters else a.ndim > 2):
        return
    if a.shape[-1] % 2 == 0 and a.shape[-1] > 2:
        text = "each head's dimensions are {} in B and {} in A: the other RoPE layout"
        yield text.format("interleaved", "half-split"), interleaved(a), b
        yield text.format("half-split", "interleaved"), half_split(a), b


def _rotated(a, b, facts, stop):
    """Other ways to turn what A has turned; `stop` is the position after its last."""
    positions = np.arange(stop - a.shape[1], stop)  # [T]
    frequencies = oracle_ops.rope_inverse_frequencies(facts.fields)  # [d/2]

    def turned(x, places):
        return oracle_ops.rope(x, places, frequencies)  # [n, T, d]

    plain = turned(a, -positions)  # [n, T, d]
    yield "B is not rotated (RoPE)", plain, b
    pairwise = interleaved(turned(half_split(plain), positions))  # [n, T, d]
    yield "B is rotated in pairs (x[2i], x[2i+1]), not (x[i], x[i+d/2]): the other RoPE layout", pairwise, b
    yield "B is rotated the other way round (RoPE)", turned(plain, -positions), b
    yield "B's positions are one too large (RoPE)", turned(plain, positions + 1), b
    yield "B's positions are one too small (RoPE)", turned(plain, positions - 1), b
    yield "B is rotated twice (RoPE)", turned(a, positions), b


def interleaved(x):
    """The pairs (x[i], x[i + d/2]) of the last axis side by side: [.., d] -> [.., d].

    >>> interleaved(np.arange(6)).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def half_split(x):
    """The pairs (x[2i], x[2i + 1]) of the last axis half of it apart: [.., d] -> [.., d].

    >>> half_split(np.arange(6)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return np.concatenate((x[..., ::2], x[..., 1::2]), axis=-1)


def _rounded(a, b):
    """Whether B has gone through 16 bits and A has not."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        with np.errstate(over="ignore"):
            if (b.astype(dtype) == b).all() and not (a.astype(dtype) == a).all():
                return f"all of B's values are {np.dtype(dtype).name} numbers: see --tolerance"
    return ""
