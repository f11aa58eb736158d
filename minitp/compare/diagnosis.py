"""The likely causes of a difference: common mistakes, tried one by one.

The mistake is applied to A. It is reported if the result equals B within the tolerance and is much closer to
B than A is. It is only a hint and never makes a step pass.
"""

from itertools import chain

import ml_dtypes
import numpy as np

from minitp.compare.heads import PROJECTIONS, by_head, half_split, has_pairs, interleaved
from minitp.oracle import Oracle
from minitp.oracle import ops as oracle_ops
from minitp.trace.names import split_name

ROTATED = ("attn.q_rope", "attn.k_rope", "attn.k_cache")  # [n, T, d], or [K, S, d]
MUCH_CLOSER = 0.2  # fraction of the error that may remain
CLOSE = 0.3  # largest relative error that rounding may explain


def diagnose(name, letters, a, b, tolerance, metadata=None, name_rope=False):
    """Return a likely cause as text, or the empty string.

    Parameters
    ----------
    name : str
        Name of the step.
    letters : list of str or None
        Letters of the step's axes, as in `trace.names`.
    a, b : float64 arrays
        Arrays of the same shape.
    tolerance : float
        The relative error allowed.
    metadata : TraceMetadata or None
        The metadata of A, if it is a trace of minitp.
    name_rope : bool
        Whether to name the option --rope if it would explain the difference.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all() and a.any() and b.any()):
        return ""
    tried = [_scaled(a, b), _added(a, b), _shifted(letters, a, b)]
    tried.append(_interleaved(name, letters, a, b, metadata, name_rope))
    pass_name = split_name(name)[0].rpartition("/")[2]  # without the prefix rank0/
    if metadata and name.endswith(ROTATED) and pass_name in metadata.passes:
        layer = split_name(name)[1]
        tried.append(_rotated(a, b, metadata, layer, stop=metadata.passes[pass_name][1]))
    error = np.linalg.norm(b - a)
    for text, expected, found in chain(*tried):
        left = np.linalg.norm(found - expected)
        if left <= tolerance * np.linalg.norm(expected) and left <= MUCH_CLOSER * error:
            return text
    return _rounded(a, b, tolerance) if error <= CLOSE * np.linalg.norm(a) else ""


# Each of these functions yields (description, expected array, actual array) for some mistakes.


def _scaled(a, b):
    if a.size < 2:
        return
    factor = np.vdot(a, b) / np.vdot(a, a)
    yield f"B is {factor:.6g} * A", factor * a, b


def _shifted(letters, a, b):
    """Try a shift by one, along token axes or, if the axes are unknown, along any axis but the last."""
    axes = [i for i in range(a.ndim - 1) if letters is None or letters[i] in "TS"]
    axes = [0] if letters == ["T"] else axes
    for axis in axes:
        n = a.shape[axis]
        if n < 3:
            continue
        a_first, b_first = (np.take(x, range(n - 1), axis) for x in (a, b))
        a_last, b_last = (np.take(x, range(1, n), axis) for x in (a, b))
        yield "position t of B is position t - 1 of A: shifted by one", a_first, b_last
        yield "position t of B is position t + 1 of A: shifted by one", a_last, b_first


def _added(a, b):
    """Try a constant that is added to integers, such as the first position."""
    difference = (b - a).flat[0]
    if a.size > 1 and difference.is_integer():
        yield f"B is A {'+' if difference > 0 else '-'} {abs(difference):.0f}", a + difference, b


def _interleaved(name, letters, a, b, metadata, name_rope):
    """Try the order of a head's dimensions in the other RoPE layout."""
    if metadata and name.endswith(PROJECTIONS):
        a, b = (by_head(x, metadata.config.head_dim) for x in (a, b))
    elif not (letters[-1] == "d" if letters else a.ndim > 2):
        return
    rotary_dim = metadata.config.rotary_dim if metadata else a.shape[-1]
    if rotary_dim % 2 == 0 and rotary_dim > 2:
        text = "each head's dimensions are {} in B and {} in A: the other RoPE layout"
        way_on = "; --rope interleaved converts them" if name_rope and has_pairs(name) else ""
        yield text.format("interleaved", "half-split") + way_on, interleaved(a, rotary_dim), b
        yield text.format("half-split", "interleaved"), half_split(a, rotary_dim), b


def _rotated(a, b, metadata, layer, stop):
    """Try other RoPE rotations than A's; `stop` is the position after A's last one."""
    reference = Oracle(metadata.fields, None, metadata.layers)  # for its settings; it has no weights
    positions = np.arange(stop - a.shape[1], stop)  # [T]
    frequencies, factor = reference.rotations[layer]  # [R/2]
    rotary_dim = 2 * len(frequencies)

    def rotated(x, by):
        return oracle_ops.rope(x, by, frequencies, factor)  # [n, T, d]

    if not reference.turns[layer]:
        yield "B is rotated (RoPE) in a layer without RoPE", rotated(a, positions), b
        return
    plain = oracle_ops.rope(a, -positions, frequencies, 1 / factor)  # [n, T, d]
    yield "B is not rotated (RoPE)", plain, b
    if rotary_dim < a.shape[-1]:
        yield from _wholly_rotated(plain, b, positions, metadata, rotary_dim)
    pairwise = interleaved(rotated(half_split(plain, rotary_dim), positions), rotary_dim)  # [n, T, d]
    yield "B is rotated in pairs (x[2i], x[2i+1]), not (x[i], x[i+d/2]): the other RoPE layout", pairwise, b
    yield "B is rotated in the opposite direction (RoPE)", rotated(plain, -positions), b
    yield "B's positions are one too large (RoPE)", rotated(plain, positions + 1), b
    yield "B's positions are one too small (RoPE)", rotated(plain, positions - 1), b
    yield "B is rotated twice (RoPE)", rotated(a, positions), b
    for other, rotation in enumerate(reference.rotations):
        if (rotation[0] != frequencies).any():
            text = f"B is rotated with the RoPE of layer {other}, not of layer {layer}"
            yield text, oracle_ops.rope(plain, positions, *rotation), b
            return


def _wholly_rotated(plain, b, positions, metadata, rotary_dim):
    """Try RoPE over all of each head, for a model that rotates a part; `plain` [n, T, d] is not rotated."""
    fields = {**metadata.fields, "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_parameters": None}
    fields["rope_theta"] = metadata.config.rope.rope_theta
    frequencies = oracle_ops.rope_inverse_frequencies(fields)  # [d/2]
    text = f"B rotates all {plain.shape[-1]} dimensions of a head, not the first {rotary_dim} (RoPE)"
    yield text, oracle_ops.rope(plain, positions, frequencies), b  # without scaling: it has R/2 factors


def _rounded(a, b, tolerance):
    """Return a description if all of B's values are 16-bit numbers and A's are not.

    It is empty for integers, and for a tolerance that allows for the rounding.
    """
    if (a == np.rint(a)).all():
        return ""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        with np.errstate(over="ignore"):
            rounded = (b.astype(dtype) == b).all() and not (a.astype(dtype) == a).all()
            if rounded and tolerance < ml_dtypes.finfo(dtype).eps / 2:
                name = np.dtype(dtype).name
                return f"all of B's values are {name} numbers: save them as {name}, or use --tolerance"
    return ""
