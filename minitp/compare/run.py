"""Two files of steps held against each other, whoever wrote them: what departs, and where first.

A is the reference. Arrays are matched by name, or by a map of names, and one pair of them is in memory at a
time. Where B lies in another layout than A (see `layouts`), it is read in A's.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from minitp.check.difference import difference_of
from minitp.compare.diagnosis import diagnose
from minitp.compare.files import open_dump
from minitp.compare.layouts import layouts
from minitp.compare.pairing import match, read_facts, read_map, what_to_leave_out
from minitp.errors import InputError
from minitp.trace.names import AFTER, BEFORE, LAYER, split_name

# Relative errors allowed, by the coarsest floating-point dtype; docs/compare.md has the measurements.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
MASKED = -1e4  # no score of a model is so low, and masks are: -1e9, or the lowest number of the dtype
DIAGNOSED = 20  # departing steps that are looked at more closely: the first ones


@dataclass(frozen=True)
class StepDifference:
    """How B's array of a step departs from A's.

    Attributes
    ----------
    name, b_name : str
        What it is called in A and in B.
    relative : float
        ||b - a|| / ||a|| over the finite entries; infinite if others are not the same.
    absolute : float
        max |b - a|.
    worst : tuple of (index, a, b)
        Up to three elements, the one that differs most first, none of an empty array; the index is in A's
        layout.
    tolerance : float
    layout : str
        B's, if it is not A's.
    note : str
        That, and what may be the cause.
    """

    name: str
    b_name: str
    relative: float
    absolute: float
    worst: tuple
    tolerance: float
    layout: str = ""
    note: str = ""

    @property
    def departs(self):
        return not self.relative <= self.tolerance

    @property
    def index(self):
        """Where the two differ most, in A's layout."""
        return self.worst[0][0]

    @property
    def a_value(self):
        return self.worst[0][1]

    @property
    def b_value(self):
        return self.worst[0][2]


@dataclass
class Comparison:
    """All common steps, in the order in which they happen, and what was not compared."""

    tolerance: float
    why: str  # this tolerance
    steps: list = field(default_factory=list)
    only_a: list = field(default_factory=list)  # names
    only_b: list = field(default_factory=list)
    remarks: tuple = ()

    @property
    def departing(self):
        return [step for step in self.steps if step.departs]


def compare_files(a_path, b_path, map_path=None, tolerance=None, progress=lambda count: None):
    """Hold the arrays of file B against those of file A.

    Parameters
    ----------
    a_path, b_path : path
        .safetensors or .npz.
    map_path : path or None
        A JSON object: name in A to name in B; a `*` stands for a number, the same in both.
    tolerance : float or None
        The relative error allowed; None: by the coarser dtype of the two files (TOLERANCES).
    progress : callable
        Called with 1 after each pair.

    Raises
    ------
    InputError
        for a file that cannot be read, traces of two models or of other tokens, no common name, a map that
        names what is not there, or a pair of shapes that no layout explains.
    """
    a, b = open_dump(a_path), open_dump(b_path)
    facts = read_facts(a)
    left_out = what_to_leave_out(a, b, facts, read_facts(b))
    pairs = match(a, b, {} if map_path is None else read_map(map_path, a, b), left_out)
    tolerance, why = _tolerance(tolerance, a, b, pairs)
    found = {name: _layouts(a, name, b, partner) for name, partner in pairs.items()}
    result = Comparison(tolerance, why, remarks=left_out.remarks)
    result.only_a = [name for name in a.entries if name not in pairs and name not in left_out]
    paired = set(pairs.values())
    result.only_b = [name for name in b.entries if name not in paired and name not in left_out]
    departing = 0
    for name, partner in pairs.items():
        arrays = a.read(name), b.read(partner)
        step, layout = _step(name, partner, *arrays, found[name], tolerance)
        if step.departs and departing < DIAGNOSED:
            cause = diagnose(name, letters_of(name), arrays[0], layout.view(arrays[1]), tolerance, facts)
            step = replace(step, note="; ".join(filter(None, (step.note, cause))))
        departing += step.departs
        result.steps.append(step)
        progress(1)
    return result


def _tolerance(given, a, b, pairs):
    """The relative error allowed, and where it comes from."""
    if given is not None:
        if not given >= 0:
            raise InputError(f"--tolerance {given}: expected 0 or a positive number")
        return given, "as given"
    dtypes = {a.entries[name].dtype for name in pairs} | {b.entries[name].dtype for name in pairs.values()}
    for dtype in reversed(TOLERANCES):
        if dtype in dtypes:
            return TOLERANCES[dtype], f"for {dtype}"
    return TOLERANCES["float32"], "for whole numbers"


# --- one pair of arrays ---------------------------------------------------------------------------------


def _layouts(a, name, b, partner):
    a_shape, b_shape = a.entries[name].shape, b.entries[partner].shape
    found = layouts(a_shape, b_shape, letters_of(name))
    if not found:
        called = "" if partner == name else f" (there {partner})"
        raise InputError(
            f"{name}: shape {list(a_shape)} in {a.path} cannot match {list(b_shape)} in {b.path}{called}; "
            "are they of the same model and tokens? TensorFile all positions and heads, or leave it out"
        )
    return found


def letters_of(name):
    """The axes of a step in letters, as in the tables of `trace.names`; None for a name that is not there."""
    letters = (BEFORE | LAYER | AFTER).get(split_name(name)[2])
    return letters and letters.split()


def _step(name, partner, a, b, found, tolerance):
    """The StepDifference of two float64 arrays, and the Layout in which it was measured."""
    best = None
    for layout in found:
        expected, value = _masked_alike(name, a, layout.view(b))
        error = difference_of(value, expected)
        # The likelier one, unless another is clearly nearer.
        if best is None or error.relative < best[0].relative / 2:
            best = error, _note(expected, value), layout
        if best[0].relative <= tolerance:
            break
    error, note, layout = best
    note = "; ".join(filter(None, (layout.text, note)))
    worst = tuple((index, ours, theirs) for index, theirs, ours in error.worst)
    return StepDifference(
        name, partner, error.relative, error.absolute, worst, tolerance, layout.text, note
    ), layout


def _masked_alike(name, a, b):
    """Scores that both mask with large negative numbers get -inf there: else masks would make the norm."""
    hidden = [np.isfinite(x) & (x < MASKED) for x in (a, b)]
    if "score" not in name or not all(mask.any() for mask in hidden):
        return a, b
    return tuple(np.where(mask, -np.inf, x) for mask, x in zip(hidden, (a, b), strict=True))


def _note(a, b):
    """What is said of entries that are not finite in one or both; empty if all are."""
    finite, both_nan = np.isfinite(a) & np.isfinite(b), np.isnan(a) & np.isnan(b)
    apart = ~(finite | (a == b) | both_nan)
    if not apart.any():
        return f"{both_nan.sum()} NaN in both" if both_nan.any() else ""
    count, a, b = apart.sum(), a[apart], b[apart]
    if np.isnan(b).any():
        return f"{np.isnan(b).sum()} NaN in B"
    if np.isneginf(a).all() and (b < MASKED).all():
        return f"{count} entries are -inf in A and large negative numbers in B: another way to mask?"
    return f"{count} entries are infinite or NaN in one of the two only"
