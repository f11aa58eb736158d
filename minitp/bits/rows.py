"""The rows of a step that two recordings have in common, by position."""

from dataclasses import dataclass
from typing import Any

from minitp.bits.names import BATCH
from minitp.bits.recording import PassRows
from minitp.trace.names import AFTER, split_name


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

        The array has the last rows of its pass: all of them, those with logits, or the keys in a window.
        """
        return self.pass_.stop + self.pass_.after - self.array.shape[axis]

    @property
    def has_positions(self):
        """True if the positions of the rows and keys are known."""
        tokens = [n for n, letter in zip(self.array.shape, self.letters, strict=True) if letter == "T"]
        return all(n <= self.pass_.width for n in tokens) and not (self.pass_.holes and "S" in self.letters)


def step_array(recording, pass_, name):
    """Return the StepArray of a full name; of a batch, the sequence that the pass has."""
    array, letters = recording.read(name), recording.letters(name)
    return _of_sequence(array, letters, pass_, split_name(name)[2] in AFTER)


def other_array(array, pass_):
    """Return the StepArray of an array that is not a step, or None if it has no axis of tokens.

    The axis is recognized by its size: `[count, width, ..]`, `[width, ..]` or `[count * width, ..]`.
    """
    letters = ["x"] * array.ndim
    if array.ndim > 1 and array.shape[0] in (1, pass_.count) and array.shape[1] == pass_.width:
        letters[:2] = [BATCH, "T"]
    elif array.ndim and array.shape[0] in (pass_.width, pass_.count * pass_.width):
        letters[0] = "T"
    else:
        return None
    return _of_sequence(array, letters, pass_, False)


def _of_sequence(array, letters, pass_, only_last):
    """Return the StepArray of a pass's sequence; a step with `only_last` may have fewer rows than the pass.

    A batch has an axis of its own, or the rows of its sequences follow each other, as in `[count * T, E]`. An
    array of one sequence in a batch, such as the angles of RoPE, is the same for all of them.
    """
    if BATCH in letters:
        axis = letters.index(BATCH)
        array = array.take(pass_.sequence if array.shape[axis] > 1 else 0, axis)
        return StepArray(pass_, array, [letter for letter in letters if letter != BATCH])
    if pass_.count > 1 and "T" in letters:
        axis = letters.index("T")
        each, left = divmod(array.shape[axis], pass_.count)
        if not left and (only_last or each == pass_.width):
            array = array.take(range(pass_.sequence * each, (pass_.sequence + 1) * each), axis)
    return StepArray(pass_, array, letters)


def fits(a, b):
    """Return whether two StepArrays differ only in their numbers of tokens and keys, of known positions."""
    sizes = zip(a.array.shape, b.array.shape, a.letters, strict=False)
    same = a.letters == b.letters and all(n == m for n, m, letter in sizes if letter not in "TS")
    return same and a.has_positions and b.has_positions


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
        least = max(a.pass_.start, b.pass_.start) if letter == "T" else 0  # padding comes before it
        first, last = max(a.first(axis), b.first(axis), least), min(a.pass_.stop, b.pass_.stop)
        last = last if stop is None else min(last, stop)
        if not first < last:
            return None
        for cut, one in zip(cuts, (a, b), strict=True):
            cut.append(slice(first - one.first(axis), last - one.first(axis)))
        if axis == a.row_axis:
            rows = slice(first, last)
    return a.array[tuple(cuts[0])], b.array[tuple(cuts[1])], rows
