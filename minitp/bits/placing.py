"""The places of a sequence in two recordings: its index in a batch, its padding, and the passes' positions.

A trace has them in its metadata. In other recordings they are found by the tokens of both recordings, or else
by the rows of the first step that both have; then by the recorded positions; and at last by the names: a
prefill begins at position 0, and decode.2 follows decode.1. Passes without any of them are left out.

One of the recordings, the reference, is placed by itself, and the other one by its rows.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from minitp.bits.alike import RowContents, own_columns
from minitp.compare.pairing import pass_order
from minitp.errors import InputError

FROM_ZERO = ("prefill", "prefill.0")  # names of passes that begin at position 0
RECORD = "record tokens or positions, or all passes from prefill on"


def placed(a, b):
    """Return FileRecordings a and b with passes whose positions are known, and remarks on the others.

    Raises
    ------
    InputError
        If nothing shows which rows of the two recordings belong together.
    """
    if all(one.metadata is not None and _count(one) == 1 for one in (a, b)) or not (a.passes and b.passes):
        return a, b, []
    reference, other = sorted((a, b), key=_is_hard)
    places = [_Places(reference, other, index) for index in range(_count(reference))]
    found = max(
        (each.of_sequence(sequence) for each in places for sequence in range(_count(other))),
        key=lambda match: match.score,
    )
    remarks = found.reference.remarks + found.remarks()
    if not found.passes or (found.score == 0 and _count(other) > 1):
        raise InputError(
            f"nothing shows which rows belong together: the tokens differ or are not recorded; {RECORD}"
        )
    pair = {id(reference): found.reference.passes, id(other): found.passes}
    return (*(one.with_passes(pair[id(one)]) for one in (a, b)), remarks)


def _count(recording):
    return max((one.count for one in recording.passes), default=1)


def _is_hard(recording):
    """Return a sort key: the recording that is easier to place by itself comes first."""
    return len(_own_places(recording, 0)[1]), recording.metadata is None, _count(recording) > 1


def _chains(recording):
    """Return the passes in lists in which each follows the one before, by their names."""
    chains = []
    for pass_ in recording.passes:
        if chains and _follows(pass_.name, chains[-1][-1].name):
            chains[-1].append(pass_)
        else:
            chains.append([pass_])
    return chains


def _follows(name, before):
    order, last = pass_order(name), pass_order(before)
    if len(order) != 2:
        return False
    if order[0] == last[0]:
        return order[1] == last[1] + 1
    is_first = order[1] == 1 or (order[1] == 0 and name.startswith("decode"))
    return is_first and (before == "prefill" or (last[0] == 1 and name.startswith("decode")))


def _from_zero(recording, pass_):
    """Return whether a pass begins at position 0 by its name; the only pass of a file may have any name."""
    return pass_.name in FROM_ZERO or (len(recording.passes) == 1 and pass_order(pass_.name) == (0,))


def _at(pass_, sequence, first, before=0, after=0, holes=False):
    """Return a pass whose first column has the position `first`; columns before position 0 are padding."""
    before = max(before, -first)
    stop = first + pass_.width - after
    places = dict(sequence=sequence, before=before, after=after, holes=holes)
    return replace(pass_, start=first + before, stop=stop, **places)


def _own_places(recording, sequence, starts=None):
    """Return the passes that a recording places by itself, and those whose positions it does not show.

    `starts` has the first position of passes by name, if it is known in another way.
    """
    found, lost = [], []
    for chain in _chains(recording):
        following = None
        for pass_ in chain:
            own = own_columns(recording, pass_, sequence)
            if own is None and pass_.name in (starts or ()):
                own = starts[pass_.name], 0, 0
            if own is None and following is None and not _from_zero(recording, pass_):
                lost.append(pass_)
                continue
            found.append(_at(pass_, sequence, *(own or (following or 0,))))
            following = found[-1].stop
    return found, lost


@dataclass
class _Match:
    """The passes of the other recording, for one of its sequences.

    Attributes
    ----------
    reference : _Places
    score : int
        The number of rows that are alike.
    lost : list of PassRows
        The passes whose positions are unknown.
    differing : set of int
        The positions of rows that are not alike, at the end of a pass.
    """

    reference: object
    passes: list = field(default_factory=list)
    score: int = 0
    lost: list = field(default_factory=list)
    differing: set = field(default_factory=set)
    unsure: bool = False

    def remarks(self):
        """Return lines on what is not compared."""
        lines = [_remark_on(self.lost)] if self.lost else []
        differing = self.differing - {n for one in self.passes for n in range(one.start, one.stop)}
        if differing:
            why = "the tokens differ" if self.reference.contents.exact else "the rows are of other tokens"
            lines.append(f"positions from {min(differing)} on are not compared: {why}")
        if self.unsure:
            lines.append("the rows are paired by their number: tokens are not recorded, and no row is alike")
        return lines


def _remark_on(lost):
    names = ", ".join(one.name for one in lost[:3]) + (", .." if len(lost) > 3 else "")
    return f"not compared, because their positions are unknown: {names}; {RECORD}"


class _Places:
    """The places of the rows of a recording, by those of the sequence `index` of a reference.

    Attributes
    ----------
    passes : list of PassRows
        The passes of the reference.
    remarks : list of str
        What is unknown in the reference.
    contents : RowContents
    """

    def __init__(self, reference, other, index):
        self.other, self.remarks, self.contents = other, [], RowContents(reference, other)
        self.passes, lost = _own_places(reference, index)
        self._by_name = not self.passes and self._common_start(reference, other)
        if self._by_name:
            self.passes, lost = _own_places(reference, index, self._by_name)
            name = next(iter(self._by_name))
            self.remarks.append(f"positions are counted from {name}, the first pass of both recordings")
        if lost:
            self.remarks.append(_remark_on(lost))
        rows = [(one, self.contents.of(reference, one)) for one in self.passes]
        rows = [(one, each[min(index, len(each) - 1)]) for one, each in rows if each is not None]
        self._positions = np.array(
            [n for one, _ in rows for n in range(one.start - one.before, one.stop + one.after)], dtype=int
        )  # [N]
        self._rows = np.concatenate([each for _, each in rows]) if rows else None  # [N, n]

    @staticmethod
    def _common_start(reference, other):
        """Return the start of the first pass that both have, by name; its keys show how many came before."""
        names = [one.name for one in reference.passes]
        shared = next((one for one in other.passes if one.name in names), None)
        if shared is None or _own_places(other, 0)[0]:
            return {}
        keys = [each.keys_of(shared.name) - shared.width for each in (reference, other)]
        return {shared.name: max(0, *keys)}

    def of_sequence(self, sequence):
        """Return the _Match of a sequence of the other recording."""
        match = _Match(self)
        for chain in _chains(self.other):
            rows = [self._contents_of(one, sequence) for one in chain]
            alike = np.concatenate([each for each, _ in rows], axis=1)  # [N, M]
            known = np.concatenate([each for _, each in rows])  # [M]
            first = self._first_position(chain, sequence, alike, known, match)
            if first is None:
                match.lost += chain
            else:
                self._place(chain, sequence, alike, known, first, match)
        return match

    def _contents_of(self, pass_, sequence):
        """Return which rows of the reference a pass's columns are like, bool [N, W], and which are known."""
        rows = None if self._rows is None else self.contents.of(self.other, pass_)
        if rows is None:
            return np.zeros((len(self._positions), pass_.width), bool), np.zeros(pass_.width, bool)
        alike = self.contents.alike(self._rows, rows[min(sequence, len(rows) - 1)])  # [N, W]
        return alike, np.ones(pass_.width, bool)

    def _first_position(self, chain, sequence, alike, known, match):
        """Return the position of the first column of a chain, or None."""
        own, zero = own_columns(self.other, chain[0], sequence), _from_zero(self.other, chain[0])
        if own is not None and not zero:
            return own[0]  # a few decoded tokens may also occur elsewhere
        same_name = [one.start for one in self.passes if one.name == chain[0].name]
        preferred = [*([own[0]] if own else []), *([0] if zero else []), *same_name]
        at, columns = np.nonzero(alike)
        firsts, counts = np.unique(self._positions[at] - columns, return_counts=True)
        best = firsts[counts == counts.max()].tolist() if counts.size else []
        best = [first for first in best if self._is_convincing(alike, known, first)]
        if not zero and counts.size and counts.max() == 1:  # one token alone may occur anywhere
            best = [first for first in best if first in same_name]
        for first in [*preferred, *(best if zero or len(best) == 1 else [])]:
            if first in best:
                return first
        if own is not None:
            return own[0]
        if zero and chain[0].count == 1 and not (self.contents.exact and known.any()):
            match.unsure = match.unsure or (bool(known.any()) and len(known) != len(self._positions))
            return 0
        return self._by_name.get(chain[0].name) if self._by_name else None

    def _columns(self, alike, known, first):
        """Return which columns of a chain are like the rows of their positions, and which have such rows."""
        columns = self._positions - first  # [N]
        inside = (columns >= 0) & (columns < alike.shape[1])  # [N]
        ok, comparable = np.zeros_like(known), np.zeros_like(known)  # [M]
        ok[columns[inside]] = alike[inside, columns[inside]]
        comparable[columns[inside]] = True
        return ok, comparable & known

    def _is_convincing(self, alike, known, first):
        """Return whether half of the columns up to the last like one are like their rows."""
        ok, comparable = self._columns(alike, known, first)
        return ok.any() and 2 * ok.sum() >= comparable[: np.flatnonzero(ok)[-1] + 1].sum()

    def _place(self, chain, sequence, alike, known, first, match):
        """Add the passes of a chain to a _Match; rows at the end of a pass that are not alike are padding."""
        column, holes = 0, False
        same_size = chain[0].count == 1 and len(known) == len(self._positions)
        by_rows = not same_size and self._is_convincing(alike, known, first)
        for number, pass_ in enumerate(chain):
            ok, comparable = (
                each[column : column + pass_.width] for each in self._columns(alike, known, first)
            )
            stop = int(np.flatnonzero(ok)[-1]) + 1 if ok.any() else 0
            other = np.flatnonzero(comparable[stop:]) + stop  # columns with rows that are not alike
            after = pass_.width - stop if len(other) and (self.contents.exact or by_rows) else 0
            if after:
                match.differing.update((first + column + other).tolist())
            if after == pass_.width:
                if not match.passes:
                    match.lost += chain[number:]
                break
            match.passes.append(_at(pass_, sequence, first + column, after=after, holes=holes))
            match.score += int(ok.sum())
            column, first, holes = column + pass_.width, first - after, holes or after > 0
