"""Runs of the same tokens, compared bit by bit: the first step that changes in each, and why."""

from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from minitp.bits.compare import compare_bits, other_ranks
from minitp.bits.copies import reason_of_copy
from minitp.bits.difference import differing
from minitp.bits.exact import ExactCheck
from minitp.bits.forced import PREFIX, run_forced
from minitp.bits.placing import placed
from minitp.bits.reasons import reason, reason_of_shares
from minitp.bits.recording import FileRecording, common_positions
from minitp.bits.rows import StepArray
from minitp.bits.variants import Variants
from minitp.check.step_file import StepFile
from minitp.errors import InputError
from minitp.trace.names import LAYER, full_name
from minitp.util.format import counted

SAME, ROUNDING, LARGER, RACE = "same", "rounding", "larger", "race"


@dataclass(frozen=True)
class Row:
    """The result of a run: a row of the table, with plain values.

    Attributes
    ----------
    title : str
        The run that is compared with the reference.
    outcome : str
        `SAME`, `ROUNDING` (another order of a sum explains the change), `LARGER` (it does not), or `RACE`
        (the same run differs from itself).
    step : str
        The full name of the first step whose bits change; empty if none does.
    rank : int or None
        The rank whose array it is; None if the arrays of all ranks are joined.
    elements, size : int
        The number of elements that differ in the rows of the step in which the change begins, and of all
        elements of these rows.
    largest : str
        The largest difference.
    why : list of str
        The reason, and what confirms it.
    arrays, positions : int
        The number of arrays that were compared, and of positions.
    """

    title: str
    outcome: str
    step: str = ""
    rank: int | None = None
    elements: int = 0
    size: int = 0
    largest: str = ""
    why: tuple = ()
    arrays: int = 0
    positions: int = 0


def bits_of_model(source, model, ids, batch, repeats, progress=None):
    """Run the variants of a prompt and compare their bits; all ranks call this and get the same list of Row.

    Parameters
    ----------
    source : ModelSource
    model : Model
    ids : list of int
        The prompt.
    batch : int
        The number of sequences in a batch; 1 for no batches.
    repeats : int
        The number of times that the same run is repeated.
    progress : tqdm or None
        A progress bar, which shows the title of each run and counts its layers.
    """
    rows, steps = [], StepFile()
    progress = tqdm(disable=True) if progress is None else progress
    with np.errstate(all="ignore"):  # a row reports what is not finite
        exact = ExactCheck(source, model, ids, steps)
        for variant in Variants(model, ids, steps, progress).run(batch, repeats):
            row = _row_of_variant(model, variant, exact)
            if rows and rows[-1].title == row.title:  # another repetition of the same run
                before = rows.pop()
                row = row if before.outcome == SAME else before
            rows.append(row)
    return rows


def bits_of_files(paths, titles=None):
    """Compare the recordings in files with the first one; return a list of Row.

    Raises
    ------
    InputError
        If a file cannot be read, or the recordings are of different models, dtypes or prompts.
    """
    first, rows = FileRecording(paths[0]), []
    for path, title in zip(paths[1:], titles or paths[1:], strict=True):
        other = FileRecording(path)
        stop, common = common_positions(first, other)
        try:
            a, other, why = placed(first, other)
            result = compare_bits(a, other, stop)
        except InputError as error:
            raise InputError(f"{first.path} and {path}: {error}") from error
        if stop != common:
            why.append(f"positions from {stop} on are not compared: the tokens differ")
        if result.left_out:
            count = counted(len(result.left_out), "array")
            why.append(f"not compared, because the shapes differ: {count}, such as {result.left_out[0]}")
        outcome = SAME
        if result.first is not None:
            if first.tp == other.tp and other_ranks(first, other):
                why.append(reason_of_shares(first.split, other.split))
            else:
                why.append(reason(result.first, first.tp, other.tp))
            outcome, found = _by_size(result)
            why += found + _also(result.first, result.begins)
            if first.tp != other.tp and None not in (first.tp, other.tp):
                terms = " or ".join(counted(each.tp, "rounded term") for each in (first, other))
                why.append(f"in any case attn.out and mlp.out are sums over the ranks, of {terms}")
        row = _row(title, outcome, result, None, why)
        rows.append(replace(row, step=other.own_name(row.step)))
    return rows


def _by_size(result):
    """Return whether a change seems to be larger than rounding, as an outcome and lines for the reasons."""
    if not result.suspects:
        return ROUNDING, []
    larger = result.suspects[0]
    where = "" if larger is result.first else f"{larger.name}: "
    if larger.copies:
        return LARGER, [where + reason_of_copy(larger.step)]
    if not np.isfinite(larger.difference.excess):
        return LARGER, []
    times = f"{larger.difference.excess:.2g} times as large as another order of a sum explains"
    return LARGER, [f"{where}not rounding: the difference is {times}"]


def _row_of_variant(model, variant, exact):
    """Return the Row of a Variant; of several ranks whose bits change, the first in the forward pass."""
    comm, a, b = model.comm, variant.a, variant.b
    results = comm.allgather_object(compare_bits(a, b))
    changed = [rank for rank, result in enumerate(results) if result.first]
    if not changed:
        return _row(variant.title, SAME, results[0], None, [])
    rank = min(changed, key=lambda rank: results[rank].first.at)
    change = results[rank].first
    if model.fused:  # its kernels join steps, so that blocks cannot be run by themselves
        outcome, found = _by_size(results[rank])
    else:
        outcome, found = _judged_by_blocks(model, variant, exact, results, rank)
    if variant.repeated:
        outcome = RACE
    why = [reason(change, comm.size, comm.size, variant.repeated), *found]
    return _row(variant.title, outcome, results[rank], rank, why)


def _judged_by_blocks(model, variant, exact, results, rank):
    """Run the blocks of a Variant by themselves; return the outcome and lines for the reasons.

    `results` are the BitComparisons of all ranks, of which that of `rank` has the first change.
    """
    a, b, change = variant.a, variant.b, results[rank].first
    forced = run_forced(model, a, b)
    own = compare_bits(a, forced, forced=True), _repeats(forced, b, change)
    alone, repeats = zip(*model.comm.allgather_object(own), strict=True)
    suspects = [one for found in (*results, *alone) for one in found.suspects]
    copied = next((one for found in results for one in found.suspects if one.copies), None)
    wrong = exact.first_wrong(b, [(one.at[0], one.layer, one.step) for one in suspects])
    why = []
    if copied is not None:
        why.append(("" if copied == change else f"{copied.name}: ") + reason_of_copy(copied.step))
    elif wrong is not None:
        why.append(
            f"{wrong.name} on rank {wrong.rank} is not rounding: its error is {wrong.ratio:.2g} times what "
            "`minitp check` allows"
        )
    if not variant.repeated:
        if repeats[rank]:
            why.append("confirmed: the block by itself, with the same inputs and shapes, repeats the bits")
        elif repeats[rank] is False:
            why.append(
                "not confirmed: the block by itself, with the same inputs and shapes, gives other bits; it "
                "may be a race"
            )
        begins = {step for found in alone for step in found.begins}
        why += _also(change, sorted(begins, key=list(LAYER).index))
    return LARGER if copied or wrong else ROUNDING, why


def _repeats(forced, b, change):
    """Return whether the block of a Change repeats the bits of b; None for a step outside the layers."""
    name = full_name(change.b_pass.name, change.layer, change.step)
    if PREFIX + name not in forced:
        return None
    recorded, again = (
        StepArray(change.b_pass, one.read(each), one.letters(each))
        for one, each in ((b, name), (forced, PREFIX + name))
    )
    axis = recorded.row_axis
    rows = [position - recorded.first(axis) for position in change.positions]
    return not differing(again.array.take(rows, axis), recorded.array.take(rows, axis)).any()


def _also(change, begins):
    """Return a line, in a list, with other steps in which changes begin."""
    others = [step for step in begins if step != change.step]
    return [f"bits also change for equal inputs in {', '.join(others)}"] if others else []


def _row(title, outcome, result, rank, why):
    """Return the Row of a BitComparison."""
    counts = dict(why=tuple(why), arrays=result.arrays, positions=result.positions)
    if result.first is None:
        return Row(title, outcome, **counts)
    difference = result.first.difference
    largest = f"at {list(difference.index)}: {difference.a_value:.9g} and {difference.b_value:.9g}"
    if difference.ulps is not None:
        largest = f"{difference.ulps} ulp {largest}" if difference.ulps else f"the sign of zero {largest}"
    elements = difference.elements, difference.size
    return Row(title, outcome, result.first.name, rank, *elements, largest, **counts)
