"""The result of a comparison: the difference of each step, and the steps that were left out."""

import re
from dataclasses import dataclass, field

from minitp.util.format import counted

NAMES_SHOWN = 3


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
        Remarks about B's layout, entries that are not finite, the error of the inputs, and the likely cause.
    rest : str
        Description of what is not compared; empty if all of both arrays is.
    exact : bool
        Whether the arrays are integers, which must be equal. Then `worst` has the first that differ.
    both_nan : int
        Number of elements that are NaN in both arrays.
    jumps : bool
        Whether rounding does not explain how much larger the error is than those of the step's inputs.
    """

    name: str
    b_name: str
    relative: float
    absolute: float
    worst: tuple
    tolerance: float
    layout: str = ""
    note: str = ""
    rest: str = ""
    exact: bool = False
    both_nan: int = 0
    jumps: bool = False

    @property
    def departs(self):
        return self.jumps or not self.relative <= self.tolerance

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


@dataclass(frozen=True)
class NotCompared:
    """A step that both files have and that cannot be compared, with both shapes and the reason."""

    name: str
    b_name: str
    a_shape: tuple
    b_shape: tuple
    reason: str

    def __str__(self):
        called = "" if self.b_name == self.name else f" as {self.b_name}"
        return f"{self.name}: {list(self.a_shape)} in A, {list(self.b_shape)} in B{called}: {self.reason}"


@dataclass
class Comparison:
    """The differences of all common steps, in the order in which they happen, and the names not compared."""

    tolerance: float
    why: str  # reason for this tolerance, as text
    steps: list = field(default_factory=list)
    only_a: list = field(default_factory=list)  # names that only A has
    only_b: list = field(default_factory=list)
    not_compared: list = field(default_factory=list)  # NotCompared, of the names that both have
    remarks: tuple = ()

    @property
    def departing(self):
        return [step for step in self.steps if step.departs]

    @property
    def partial(self):
        """Return the steps that were compared only in part."""
        return [step for step in self.steps if step.rest]

    @property
    def left_out(self):
        """Return a line for each array that was not compared, or only in part; similar arrays share one."""
        shapes, rests, lines = {}, {}, []
        for array in self.not_compared:
            shapes.setdefault(str(array).replace(array.name, without_numbers(array.name)), []).append(array)
        for step in self.partial:
            rests.setdefault(step.rest, []).append(step.name)
        for text, arrays in shapes.items():
            alike = f"{counted(len(arrays), 'array')} {text}"
            lines.append(f"not compared: {arrays[0] if len(arrays) == 1 else alike}")
        for rest, names in rests.items():
            which = names[0] if len(names) == 1 else count_and_first(names)
            lines.append(f"compared in part: {which}: {rest}")
        return lines


def count_and_first(names):
    """Return the number of names and the first few of them, as text."""
    shown = ", ".join(names[:NAMES_SHOWN]) + (", .." if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} ({shown})"


def without_numbers(name):
    """Return a step's name with a * for each number."""
    return re.sub(r"\d+", "*", name)
