"""The rows of a step that two recordings have in common, by position."""

from dataclasses import dataclass, replace
from typing import Any

from minitp.bits.difference import differing
from minitp.bits.names import BATCH
from minitp.bits.recording import PassRows


@dataclass(frozen=True)
class StepArray:
    """The array of a step in a pass of a recording, of one sequence.

    Attributes
    ----------
    pass_ : PassRows
    array : array
    letters : list of str
        The letters of its axes; T are the tokens and S the keys in the cache.
    """

    pass_: PassRows
    array: Any
    letters: list

    @property
    def row_axis(self):
        """The axis of the rows: the tokens, or the keys of a cache."""
        return self.letters.index("T" if "T" in self.letters else "S")

    def first(self, axis):
        """Return the position of the first element of an axis of tokens or keys.

        The array has the last positions of its pass: all of them, those with logits, or the keys in a window.
        """
        return self.pass_.stop - self.array.shape[axis]


class Sequences:
    """The sequence that is compared if an array is of a batch, for each of two recordings."""

    def __init__(self):
        self._chosen = {}  # id of a recording -> index in the batch

    def read(self, recording, pass_, name, other=None):
        """Return the StepArray of a full name; of a batch, the sequence that fits the StepArray `other`."""
        array, letters = recording.read(name), recording.letters(name)
        if BATCH not in letters:
            return StepArray(pass_, array, letters)
        axis = letters.index(BATCH)
        count, letters = array.shape[axis], [letter for letter in letters if letter != BATCH]
        pass_ = replace(pass_, rows=pass_.rows * count)
        choices = [StepArray(pass_, array.take(index, axis), letters) for index in range(count)]
        if id(recording) not in self._chosen:
            self._chosen[id(recording)] = min(range(count), key=lambda n: _distance(other, choices[n]))
        return choices[self._chosen[id(recording)]]

    def take(self, recording, array):
        """Return the chosen sequence of an array whose first axis is that of sequences, with this axis."""
        index = self._chosen.get(id(recording))
        return array if index is None or index >= len(array) else array[index : index + 1]


def _distance(a, b):
    """Return the number of elements whose bits differ in two StepArrays; 0 without a first one."""
    found = a and fits(a, b) and common_rows(a, b)
    return int(differing(*found[:2]).sum()) if found and found[0].dtype == found[1].dtype else 0


def fits(a, b):
    """Return whether two StepArrays differ only in their numbers of tokens and keys."""
    sizes = zip(a.array.shape, b.array.shape, a.letters, strict=False)
    return a.letters == b.letters and all(n == m for n, m, letter in sizes if letter not in "TS")


def common_rows(a, b, stop=None):
    """Return the common parts of two StepArrays that fit, and the slice of positions that are their rows.

    Positions from `stop` on are left out. The result is None without common positions.
    """
    cuts, rows = ([], []), None
    for axis, letter in enumerate(a.letters):
        if letter not in "TS":
            for cut in cuts:
                cut.append(slice(None))
            continue
        first, last = max(a.first(axis), b.first(axis)), min(a.pass_.stop, b.pass_.stop)
        last = last if stop is None else min(last, stop)
        if not 0 <= first < last:
            return None
        for cut, one in zip(cuts, (a, b), strict=True):
            cut.append(slice(first - one.first(axis), last - one.first(axis)))
        if axis == a.row_axis:
            rows = slice(first, last)
    return a.array[tuple(cuts[0])], b.array[tuple(cuts[1])], rows
