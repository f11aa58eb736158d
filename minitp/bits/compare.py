"""The comparison of two recordings bit by bit, position by position: the steps in which changes begin.

The two recordings may have different passes: one prefill in one, chunks or decode passes in the other. So a
row of a step is compared with the row of the same position. Keys that only one of the two passes has are
later than the position, and masked.

A change begins in a row whose bits differ although those of all its inputs are the same. The first change in
the order of the forward pass is always such a beginning; the steps of later ones are listed.
"""

from dataclasses import replace

import numpy as np

from minitp.bits.changes import BitComparison, Change
from minitp.bits.copies import COPIES
from minitp.bits.difference import bit_difference, differing
from minitp.bits.names import LETTERS
from minitp.bits.rows import common_rows, fits, other_array, step_array
from minitp.compare.inputs import HEAD_NORMS, INPUTS, POST_NORMS, STREAM
from minitp.compare.pairing import FIRST_PASS
from minitp.errors import InputError
from minitp.trace.names import AFTER, BEFORE, LAYER, PARTIAL, WEIGHTS, full_name
from minitp.util.shares import other_shares

# The inputs of steps for which the table of `compare.inputs` has none, or others; the first tuple that is
# recorded is used.
OWN_INPUTS = {
    "tokens": [()],
    "positions": [()],
    "embed_partial": [("tokens",)],
    "embed": [("embed_partial",), ("tokens",)],
    "attn.k_cache": [("attn.k_rope",)],
    "attn.v_cache": [("attn.v",)],
    "attn.probs": [("attn.scores",), ("attn.q_rope", "attn.k_cache")],
    "mlp.experts": [("mlp.norm", "mlp.router")],
    "logits": [("logits_partial",), ("final_norm",)],
}
BLOCK_INPUTS = ("attn.residual", "mlp.residual")


def compare_bits(a, b, stop=None, forced=False):
    """Compare the steps of recording b with those of a, for the positions before `stop`.

    The recordings are of one model; if their numbers of ranks differ, terms of sums are not compared. If b is
    `forced`, its blocks had the inputs of a (see `forced`), and a change within a block may grow.

    Raises
    ------
    InputError
        If the recordings have nothing in common, or an array in two dtypes.
    """
    result = BitComparison()
    for name in a.others:
        if name in b and name.startswith(WEIGHTS):
            _compare_whole(result, name, a.read(name), b.read(name))
    pairs = _Pairs(a, b, stop, result, forced)
    for b_pass in b.passes:
        a_passes = [one for one in a.passes if one.start < b_pass.stop and b_pass.start < one.stop]
        for layer, step in pairs.steps:
            for a_pass in a_passes:
                pairs.compare(layer, step, a_pass, b_pass)
    for name in a.others:
        if name in b and not name.startswith(WEIGHTS):
            _compare_whole(result, name, *pairs.common_part(name, a.read(name), b.read(name)))
    result.positions = int(pairs.seen.sum())
    if a.passes and b.passes and not result.positions:
        _check_positions(a, b)
    if not result.arrays:
        raise InputError("the recordings have no step of the same position in common")
    return result


def _check_positions(a, b):
    """Raise InputError unless passes of the two recordings have a position in common."""
    if not any(one.start < other.stop and other.start < one.stop for one in a.passes for other in b.passes):
        starts = [min(one.start for one in each.passes) for each in (a, b)]
        lasts = [max(one.stop for one in each.passes) - 1 for each in (a, b)]
        texts = [f"{first} to {last}" for first, last in zip(starts, lasts, strict=True)]
        raise InputError(
            f"the recordings have no position in common: {texts[0]} in the first, {texts[1]} in the second; "
            "record the same tokens in both"
        )


def _compare_whole(result, name, a, b):
    """Compare two arrays that are not steps, if their shapes are the same."""
    if a.shape != b.shape:
        result.left_out.append(name)
        return
    _check_dtypes(name, a, b)
    result.arrays += 1
    if differing(a, b).any() and result.first is None:
        result.add(Change(None, name, None, None, (0,), bit_difference(a, b), a.shape, b.shape))


def _check_dtypes(name, a, b):
    if a.dtype != b.dtype:
        raise InputError(
            f"{name} is {a.dtype} in one recording and {b.dtype} in the other: bits can be compared only in "
            "one dtype"
        )


def other_ranks(a, b):
    """Return whether two recordings are of other numbers of ranks, or of ranks with other shares."""
    return a.tp != b.tp or other_shares(a.split, b.split)


class _Pairs:
    """The pairs of rows of two recordings, and the positions whose bits have changed in each step."""

    def __init__(self, a, b, stop, result, forced):
        self.a, self.b, self.stop, self.result, self.forced = a, b, stop, result, forced
        inner = [(layer, step) for layer in range(min(a.layers, b.layers)) for step in LAYER]
        steps = [*((None, step) for step in BEFORE), *inner, *((None, step) for step in AFTER)]
        left_out = PARTIAL if other_ranks(a, b) else ()
        self.steps = [
            (layer, step)
            for layer, step in steps
            if step not in left_out and _has(a, layer, step) and _has(b, layer, step)
        ]
        self.known = set(self.steps)
        self.seen = np.zeros(max((one.stop for one in b.passes), default=0), dtype=bool)  # [positions]
        self.changed, self.compared = {}, {}  # (layer, step) -> bool [positions]
        self.any_changed = np.zeros_like(self.seen)  # [positions]

    def compare(self, layer, step, a_pass, b_pass):
        """Compare the rows of a step that both passes have."""
        names = [full_name(one.name, layer, step) for one in (a_pass, b_pass)]
        if names[0] not in self.a or names[1] not in self.b:
            return
        a = step_array(self.a, a_pass, names[0])
        b = step_array(self.b, b_pass, names[1])
        found = common_rows(a, b, self.stop) if fits(a, b) else None
        if not fits(a, b):
            self.result.left_out.append(names[1])
        if found is None or not found[0].size:
            return
        _check_dtypes(names[1], *found[:2])
        self.result.arrays += 1
        rows, differs = found[2], differing(*found[:2])
        by_row = differs.any(axis=tuple(i for i in range(differs.ndim) if i != a.row_axis))  # [rows]
        begins = by_row & ~self._inputs_changed(layer, step, rows)  # [rows]
        self.seen[rows] = True
        for marks, value in ((self.changed, by_row), (self.compared, True)):
            marks.setdefault((layer, step), np.zeros_like(self.seen))[rows] = value
        self.any_changed[rows] |= by_row
        at = self.b.passes.index(b_pass), self.steps.index((layer, step))
        if begins.any():
            change = self._change(layer, step, a, b, found, begins, at)
            copies = self._only_copies(layer, step, np.asarray(change.positions))
            self.result.add(replace(change, copies=copies))
        if self.forced and (by_row & ~begins).any():
            change = self._change(layer, step, a, b, found, by_row, at)
            if not change.is_rounding:
                self.result.suspects.append(change)

    def common_part(self, name, a, b):
        """Return two arrays that are not steps; of batches and padded passes, only the rows in common."""
        pass_name = name.rpartition("/")[0] or FIRST_PASS[:-1]
        passes = [
            next((one for one in each.passes if one.name == pass_name), None) for each in (self.a, self.b)
        ]
        if None in passes or (a.shape == b.shape and passes[0] == passes[1]):
            return a, b
        parts = [other_array(array, pass_) for array, pass_ in zip((a, b), passes, strict=True)]
        found = None not in parts and fits(*parts) and common_rows(*parts, self.stop)
        return found[:2] if found else (a, b)

    def _change(self, layer, step, a, b, found, chosen, at):
        """Return the Change of the `chosen` rows, bool [rows], of the common rows of two StepArrays."""
        axis, start = a.row_axis, found[2].start
        pick = (slice(None),) * axis + (chosen,)
        terms = self._terms(layer, step, a.pass_) or found[0].shape[-1]
        difference = bit_difference(found[0][pick], found[1][pick], terms)
        positions = tuple(map(int, start + np.flatnonzero(chosen)))
        index = list(difference.index)
        index[axis] = positions[index[axis]]
        difference = replace(difference, index=tuple(index))
        shapes = a.array.shape, b.array.shape
        return Change(layer, step, a.pass_, b.pass_, positions, difference, *shapes, at)

    def _inputs_changed(self, layer, step, rows):
        """Return for which positions the bits of an input have changed: bool [rows]."""
        inputs = self._inputs(layer, step)
        if inputs is None:
            return np.logical_or.accumulate(self.any_changed)[rows]  # attention reads earlier positions
        found = np.zeros(rows.stop - rows.start, dtype=bool)  # [rows]
        for key in inputs:
            changed = self.changed.get(key)
            if changed is None or (self.forced and key[1] in BLOCK_INPUTS):
                continue
            if "T" in LETTERS[key[1]]:
                found |= changed[rows]
            else:  # a query reads the keys at its own position and before, within the window
                window = self.a.windows[layer]
                before = np.concatenate(([0], np.cumsum(changed)))  # [positions + 1]
                stops = np.arange(rows.start, rows.stop) + 1  # [rows]
                starts = np.zeros_like(stops) if window is None else np.maximum(0, stops - window)
                found |= before[stops] > before[starts]
        return found

    def _only_copies(self, layer, step, positions):
        """Return whether a step only copies inputs, of which both recordings have the rows at `positions`.

        The logits are the columns of all ranks, which the recording of one rank does not have.
        """
        if step not in COPIES or (step == "logits" and not self.a.has_all_ranks):
            return False
        inputs = [self.compared.get(self._key(layer, name)) for name in COPIES[step][0]]
        return all(rows is not None and rows[positions].all() for rows in inputs)

    def _inputs(self, layer, step):
        """Return the (layer, step) of each input of a step, or None if they are not all recorded."""
        tables = HEAD_NORMS, POST_NORMS, OWN_INPUTS, INPUTS
        for names in [names for table in tables for names in table.get(step, ())]:
            keys = [self._key(layer, name) for name in names]
            if all(key in self.known for key in keys):
                return keys
        return None

    def _key(self, layer, step):
        if step == STREAM:
            last = self.a.layers if layer is None else layer
            return (last - 1, "mlp.residual") if last else (None, "embed")
        return (None if step in BEFORE | AFTER else layer), step

    def _terms(self, layer, step, a_pass):
        """Return the number of terms in the sum that gives an element: the width of the first input."""
        inputs = self._inputs(layer, step)
        if not inputs or full_name(a_pass.name, *inputs[0]) not in self.a:
            return None
        array = self.a.read(full_name(a_pass.name, *inputs[0]))
        return array.shape[-1] if array.ndim > 1 else None


def _has(recording, layer, step):
    return any(full_name(one.name, layer, step) in recording for one in recording.passes)
