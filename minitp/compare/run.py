"""The comparison of two files of steps: the steps that differ, and the first of them.

A is the reference. Arrays are paired by name or by a map of names, and one pair is in memory at a time. If an
array of B has another layout than A's (see `layouts`), it is converted to A's layout. A step `departs` if the
two arrays differ by more than the tolerance.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from minitp.check.difference import difference_of
from minitp.compare.diagnosis import diagnose
from minitp.compare.files import open_dump
from minitp.compare.layouts import layouts
from minitp.compare.pairing import exclusions, match, read_map, read_metadata
from minitp.errors import InputError
from minitp.trace.names import AFTER, BEFORE, LAYER, split_name

# The relative errors allowed, by the coarsest floating-point dtype; see docs/compare.md for measurements.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
MASKED = -1e4  # lower scores are masks, usually -1e9 or the lowest number of the dtype
DIAGNOSED = 20  # number of steps, from the first that differs, for which a cause is sought


@dataclass(frozen=True)
class StepDifference:
    """The difference between B's array of a step and A's.

    Attributes
    ----------
    name, b_name : str
        The step's names in A and in B.
    relative : float
        ||b - a|| / ||a|| over the finite entries; infinite if the other entries differ.
    absolute : float
        max |b - a|; infinite in the same case.
    worst : tuple of (index, a, b)
        Up to three elements, the one with the largest difference first; empty for an empty array. Indices
        refer to A's layout.
    tolerance : float
        The largest `relative` error allowed.
    layout : str
        Description of B's layout; empty if it is A's.
    note : str
        Remarks about B's layout, entries that are not finite, and the likely cause.
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
        """The index of the largest difference, in A's layout."""
        return self.worst[0][0]

    @property
    def a_value(self):
        return self.worst[0][1]

    @property
    def b_value(self):
        return self.worst[0][2]


@dataclass
class Comparison:
    """The differences of all common steps, in the order in which they happen, and the names not compared."""

    tolerance: float
    why: str  # reason for this tolerance, as text
    steps: list = field(default_factory=list)
    only_a: list = field(default_factory=list)  # names that only A has
    only_b: list = field(default_factory=list)
    remarks: tuple = ()

    @property
    def departing(self):
        return [step for step in self.steps if step.departs]


def compare_files(a_path, b_path, map_path=None, tolerance=None, progress=lambda count: None, pictures=None):
    """Compare the arrays of file B with those of file A.

    Parameters
    ----------
    a_path, b_path : path
        Files in .safetensors or .npz format; A is the reference.
    map_path : path or None
        File with a JSON object of names in A to names in B; a `*` stands for the same number in both.
    tolerance : float or None
        The relative error allowed; by default that of the coarsest dtype in the two files (TOLERANCES).
    progress : callable
        Function that is called with 1 after each pair.
    pictures : Pictures or None
        Object to which a picture of each pair is added.

    Raises
    ------
    InputError
        for a file that cannot be read, traces of different models or tokens, files without a common name, a
        map with unknown names, or a pair of shapes that no layout explains.
    """
    a, b = open_dump(a_path), open_dump(b_path)
    metadata = read_metadata(a)
    excluded = exclusions(a, b, metadata, read_metadata(b))
    pairs = match(a, b, {} if map_path is None else read_map(map_path, a, b), excluded)
    tolerance, why = _tolerance(tolerance, a, b, pairs)
    found = {name: _layouts(a, name, b, partner) for name, partner in pairs.items()}
    result = Comparison(tolerance, why, remarks=excluded.remarks)
    result.only_a = [name for name in a.entries if name not in pairs and name not in excluded]
    paired = set(pairs.values())
    result.only_b = [name for name in b.entries if name not in paired and name not in excluded]
    departing = 0
    for name, partner in pairs.items():
        arrays = a.read(name), b.read(partner)
        step, layout = _step(name, partner, *arrays, found[name], tolerance)
        if step.departs and departing < DIAGNOSED:
            cause = diagnose(name, letters_of(name), arrays[0], layout.view(arrays[1]), tolerance, metadata)
            step = replace(step, note="; ".join(filter(None, (step.note, cause))))
        departing += step.departs
        if pictures is not None:
            pictures.add(step, *_masked_alike(name, arrays[0], layout.view(arrays[1])))
        result.steps.append(step)
        progress(1)
    return result


def _tolerance(given, a, b, pairs):
    """Return the relative error allowed and the reason for it, as text."""
    if given is not None:
        if not given >= 0:
            raise InputError(f"--tolerance {given}: expected 0 or a positive number")
        return given, "as given"
    dtypes = {a.entries[name].dtype for name in pairs} | {b.entries[name].dtype for name in pairs.values()}
    for dtype in reversed(TOLERANCES):
        if dtype in dtypes:
            return TOLERANCES[dtype], f"for {dtype}"
    return TOLERANCES["float32"], "for integers"


# --- one pair of arrays ---------------------------------------------------------------------------------


def _layouts(a, name, b, partner):
    a_shape, b_shape = a.entries[name].shape, b.entries[partner].shape
    found = layouts(a_shape, b_shape, letters_of(name))
    if not found:
        called = "" if partner == name else f" as {partner}"
        raise InputError(
            f"{name}: shape {list(a_shape)} in {a.path} cannot match {list(b_shape)} in {b.path}{called}; "
            "check that model and tokens are the same; write all positions and heads, or leave this step out"
        )
    return found


def letters_of(name):
    """Return the letters of a step's axes from the tables of `trace.names`; None for an unknown name."""
    letters = (BEFORE | LAYER | AFTER).get(split_name(name)[2])
    return letters and letters.split()


def _step(name, partner, a, b, found, tolerance):
    """Return the StepDifference of two float64 arrays and the Layout of B for which it was measured."""
    best = None
    for layout in found:
        expected, value = _masked_alike(name, a, layout.view(b))
        error = difference_of(value, expected)
        # Prefer the likelier layout unless another is clearly closer.
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
