"""The comparison of two files of steps: the steps that differ, and the first of them.

A is the reference. Arrays are paired by name or by a map of names, and one pair is in memory at a time, plus
the inputs of the step in a 16-bit run (see `jump`). If an array of B has another layout than A's (see
`layouts`), it is converted to A's layout; if only parts of two arrays fit (see `partial`), the parts are
compared. A step `departs` if the two arrays differ by more than the tolerance, or if its error is much larger
than those of its inputs.
"""

import os
from dataclasses import replace

import numpy as np

from minitp.check.difference import WORST, difference_of
from minitp.compare.diagnosis import diagnose
from minitp.compare.files import open_dump
from minitp.compare.fit import fit, letters_of
from minitp.compare.jump import LENIENCE, JumpRule
from minitp.compare.open_other import open_other
from minitp.compare.pairing import exclusions, match, read_map, read_metadata, same_name
from minitp.compare.result import Comparison, NotCompared, StepDifference
from minitp.errors import InputError
from minitp.mapping.tensors import ENGINES, rotates_neighbors
from minitp.trace.names import INTEGERS, split_name

# The relative errors allowed, by the coarsest floating-point dtype; see docs/compare.md for measurements.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
MASKED = -1e4  # lower scores are masks, usually -1e9 or the lowest number of the dtype
SHOWN = 3  # number of arrays of another size that are listed
DIAGNOSED = 20  # number of steps, from the first that differs, for which a cause is sought


def compare_files(
    a_path,
    b_path,
    mapping=None,
    tolerance=None,
    progress=lambda count: None,
    pictures=None,
    rope=None,
    split=None,
):
    """Compare the arrays of file B with those of file A.

    Parameters
    ----------
    a_path, b_path : path
        Files in .safetensors or .npz format; A is the reference. B may be a folder with a file per rank.
    mapping : str, path or None
        An engine of `mapping.tensors.ENGINES`, whose names B has; or a file with a JSON object of names in A
        to names in B, in which a `*` stands for the same number in both.
    tolerance : float or None
        The relative error allowed; by default that of the coarsest dtype in the two files (TOLERANCES), and
        in 16 bits the rule of `jump`. Integers must be equal at any tolerance.
    progress : callable
        Function that is called with 1 after each pair.
    pictures : Pictures or None
        Object to which a picture of each pair is added.
    rope : str or None
        The RoPE layout of B's heads, `interleaved` or `half`; interleaved heads are converted.
    split : str or None
        The shares of the ranks of B, as in "3,1"; None for equal shares.

    Raises
    ------
    InputError
        for a file that cannot be read, traces of different models or tokens, files without a common name, a
        map with unknown names, or files of which no two arrays can be compared.
    """
    a = open_dump(a_path)
    metadata = read_metadata(a)
    engine = mapping if mapping in ENGINES else None
    if mapping and not engine and not os.path.lexists(mapping):
        raise InputError(f"--map {mapping}: no such file, and none of the engines {', '.join(ENGINES)}")
    b = open_other(b_path, a, metadata, engine, split)
    if engine and rotates_neighbors(engine, metadata.config):
        rope = rope or "interleaved"
    excluded = exclusions(a, b, metadata, read_metadata(b))
    pairs = match(a, b, read_map(mapping, a, b) if mapping and not engine else {}, excluded)
    found, not_compared = fit(a, b, pairs, rope, metadata)
    unfit, remarks = _unfit(a, b)
    not_compared += unfit
    tolerance, why, low = _tolerance(tolerance, a, b, pairs)
    result = Comparison(tolerance, why, not_compared=not_compared, remarks=excluded.remarks + remarks)
    paired = pairs.keys() | {one.name for one in unfit}
    result.only_a = [name for name in a.entries if name not in paired and name not in excluded]
    paired = set(pairs.values())
    result.only_b = [name for name in b.entries if name not in paired and name not in excluded]
    layout_of = {}  # the layout of each step that B has completely

    def read(name):
        return layout_of[name].both(a.read(name), b.read(pairs[name]))

    rule = JumpRule(metadata, low, read, layout_of) if metadata else None
    departing, sequence = 0, None
    for name, layouts in found.items():
        entries = a.entries[name], b.entries[pairs[name]]
        arrays = a.read(name), b.read(pairs[name])
        same = [each for each in layouts if None in (sequence, each.sequence) or each.sequence == sequence]
        exact = _is_exact(name, *entries)
        step, layout = _step(name, pairs[name], *arrays, same or layouts, tolerance, exact)
        sequence = layout.sequence if sequence is None else sequence
        both = layout.both(*arrays)
        if layout.has_all_of_a:
            layout_of[name] = layout
            step = _with_jump(step, rule and rule.judge(name, *both), departing)
        if step.departs and departing < DIAGNOSED:
            known = metadata if layout.has_all_of_a else None  # it has the positions of A's array
            cause = rule.cause(name, *both, step.jumps) if rule and known else ""
            way_on = rope is None and not departing
            cause = cause or diagnose(name, letters_of(name), *both, step.tolerance, known, way_on)
            step = replace(step, note=_joined(b.blame(pairs[name], step.tolerance), step.note, cause))
        departing += step.departs
        if pictures is not None:
            pictures.add(step, *_masked_alike(name, *both))
        result.steps.append(step)
        progress(1)
    result.remarks += _nan_remark(result.steps)
    return result


def _unfit(a, b):
    """Return the arrays of B that cannot be used: a NotCompared for each that A has, and remarks."""
    found, others = [], []
    for name, (shape, why) in b.unfit.items():
        ours = same_name(name, a.entries)
        if ours is None:
            others.append(f"{name} {list(shape)} is not compared: {why}")
        else:
            found.append(NotCompared(ours, name, a.entries[ours].shape, shape, why))
    more = [f"and {len(others) - SHOWN} more such arrays"] if len(others) > SHOWN else []
    return found, (*others[:SHOWN], *more)


def _tolerance(given, a, b, pairs):
    """Return the relative error allowed, the reason as text, and the dtype if it has 16 bits, else None."""
    if given is not None:
        if not given >= 0:
            raise InputError(f"--tolerance {given}: expected 0 or a positive number")
        return given, "as given", None
    dtypes = {a.entries[name].dtype for name in pairs} | {b.entries[name].dtype for name in pairs.values()}
    for dtype in reversed(TOLERANCES):
        if dtype in dtypes:
            return TOLERANCES[dtype], f"for {dtype}", dtype if dtype in ("float16", "bfloat16") else None
    return 0.0, "for integers", None


# --- one pair of arrays ---------------------------------------------------------------------------------


def _is_exact(name, a, b):
    """Return whether the arrays, two file entries, must be equal: integers, token ids and positions."""
    return "float" not in a.dtype or split_name(name)[2] in INTEGERS


def _step(name, partner, a, b, layouts, tolerance, exact):
    """Return the StepDifference of two float64 arrays and the Layout of B for which it was measured."""
    best, tolerance = None, 0.0 if exact else tolerance
    for layout in layouts:
        expected, value = _masked_alike(name, *layout.both(a, b))
        error = difference_of(value, expected)
        # Prefer the likelier layout unless another is clearly closer.
        if best is None or error.relative < best[0].relative / 2:
            best = error, expected, value, layout
        if best[0].relative <= tolerance:
            break
    error, expected, value, layout = best
    worst = _first_differing(expected, value) if exact else error.worst
    return StepDifference(
        name,
        partner,
        error.relative,
        error.absolute,
        tuple((layout.index(index), ours, theirs) for index, theirs, ours in worst),
        tolerance,
        layout=layout.text,
        note=_joined(layout.text, layout.rest, _note(expected, value)),
        rest=layout.rest,
        exact=exact,
        both_nan=int((np.isnan(expected) & np.isnan(value)).sum()),
    ), layout


def _first_differing(a, b):
    """Return (index, b, a) of the first elements that differ, or of the first element if none does."""
    places = np.argwhere(a != b)[:WORST].tolist() or ([[0] * a.ndim] if a.size else [])
    return [(tuple(index), float(b[tuple(index)]), float(a[tuple(index)])) for index in places]


def _with_jump(step, jump, departing):
    """Add the judgement of the step's error by those of its inputs, a Jump or None.

    `departing` is the number of steps before it that depart.
    """
    if jump is None:
        return step
    if jump.too_large:
        return replace(step, jumps=True, note=_joined(step.note, "" if step.departs else jump.text))
    if not (jump.explained and step.departs and np.isfinite(step.relative)):
        return step
    step = replace(step, tolerance=LENIENCE * step.tolerance)
    says_so = not (step.departs and departing)  # not for all that follow from the first
    return replace(step, note=_joined(step.note, "explained by its inputs" if says_so else ""))


def _masked_alike(name, a, b):
    """Replace large negative masks with -inf if both arrays have them; they would dominate the norm."""
    hidden = [np.isfinite(x) & (x < MASKED) for x in (a, b)]
    if "score" not in name or not all(mask.any() for mask in hidden):
        return a, b
    return tuple(np.where(mask, -np.inf, x) for mask, x in zip(hidden, (a, b), strict=True))


def _note(a, b):
    """Describe entries that are not finite in A or B; return an empty string if all are finite."""
    finite, both_nan = np.isfinite(a) & np.isfinite(b), np.isnan(a) & np.isnan(b)
    differs = ~(finite | (a == b) | both_nan)
    if not differs.any():
        return f"{both_nan.sum()} NaN in both" if both_nan.any() else ""
    count, a, b = differs.sum(), a[differs], b[differs]
    if np.isnan(b).any():
        return f"{np.isnan(b).sum()} NaN in B"
    if np.isneginf(a).all() and (b < MASKED).all():
        return f"entries that are -inf in A and large negative numbers in B: {count}; do the masks differ?"
    return f"entries that are infinite or NaN in only one of the two: {count}"


def _joined(*notes):
    return "; ".join(filter(None, notes))


def _nan_remark(steps):
    """Return a remark, in a tuple, about steps that are NaN at the same places in both files."""
    same = [step.name for step in steps if step.both_nan]
    if not same:
        return ()
    which = f"{same[0]} has" if len(same) == 1 else f"{len(same)} steps have, from {same[0]} on,"
    return (f"{which} NaN at the same places in A and B; these count as equal, so check A first",)
