"""Rows of two recordings that are of the same token: by the tokens, or by the first step that both have."""

from collections import Counter

import numpy as np

from minitp.bits.names import BATCH, LETTERS
from minitp.trace.names import BEFORE, LAYER, full_name

NEARLY = 0.05  # relative distance of rows of the same token, at most; far above rounding, even in 16 bits


class RowContents:
    """The contents of the rows of two recordings: their tokens, or their rows in the first common step.

    Attributes
    ----------
    step : (int or None, str) or None
        The layer and the step; None if the recordings have no step in common.
    """

    def __init__(self, a, b):
        steps = [(layer, step) for layer in range(min(a.layers, b.layers)) for step in LAYER]
        steps = [(None, step) for step in BEFORE if step != "positions"] + steps
        self.step = next(
            (
                (layer, step)
                for layer, step in steps
                if "S" not in LETTERS[step] and _has(a, layer, step) and _has(b, layer, step)
            ),
            None,
        )

    @property
    def exact(self):
        """True if the rows are tokens."""
        return self.step == (None, "tokens")

    def of(self, recording, pass_):
        """Return the rows of a pass, [count, width, n], or None if they are not recorded."""
        if self.exact and recording.metadata is not None and pass_.count == 1:
            ids = np.array(recording.metadata.token_ids[pass_.start : pass_.stop])  # [width]
            return ids[None, :, None] if len(ids) == pass_.width else None
        return None if self.step is None else rows_of_batch(recording, pass_, *self.step)

    def alike(self, x, y):
        """Return which rows of x [N, n] and y [M, n] are of the same token, bool [N, M]."""
        if x.shape[-1] != y.shape[-1]:
            return np.zeros((len(x), len(y)), dtype=bool)  # [N, M]
        if self.exact:
            return x == y.T  # [N, M]
        x, y = x.astype(np.float64), y.astype(np.float64)
        with np.errstate(all="ignore"):
            squares = [np.square(each).sum(-1) for each in (x, y)]  # [N], [M]
            distance = squares[0][:, None] + squares[1] - 2 * x @ y.T  # [N, M]
            return distance <= NEARLY**2 * np.maximum(squares[0][:, None], squares[1])  # [N, M]


def own_columns(recording, pass_, sequence):
    """Return the position of the first column of a pass, and the columns of padding on both sides, or None.

    They are in the metadata or in the recorded positions. The positions of padding do not follow each other.
    """
    if recording.metadata is not None:
        return pass_.start, 0, 0
    rows = rows_of_batch(recording, pass_, None, "positions")
    if rows is None:
        return None
    positions = rows[min(sequence, len(rows) - 1), :, 0].astype(int)  # [width]
    offsets = (positions - np.arange(len(positions))).tolist()  # [width]
    first = Counter(offsets).most_common(1)[0][0]
    return first, offsets.index(first), offsets[::-1].index(first)


def rows_of_batch(recording, pass_, layer, step):
    """Return a step of a pass as [count, width, n], or None; the count may be 1 for all sequences."""
    name = full_name(pass_.name, layer, step)
    if name not in recording:
        return None
    array, letters = recording.read(name), recording.letters(name)
    front = [letters.index(letter) for letter in (BATCH, "T") if letter in letters]
    array = np.moveaxis(array, front, range(len(front)))  # [count, T, ..] or [T, ..]
    if len(front) == 1:
        count = pass_.count if len(array) == pass_.count * pass_.width else 1
        array = array.reshape(count, len(array) // count, *array.shape[1:])  # [count, T, ..]
    return array.reshape(*array.shape[:2], -1) if array.shape[1] == pass_.width else None


def _has(recording, layer, step):
    if step == "tokens" and recording.metadata is not None:
        return True
    return any(full_name(one.name, layer, step) in recording for one in recording.passes)
