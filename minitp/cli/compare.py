"""`minitp compare`."""

import re
import sys

from tqdm import tqdm

from minitp.cli.inputs import check_output
from minitp.compare.run import compare_files
from minitp.report.compare import report_data
from minitp.report.page import write_report
from minitp.util.format import aligned
from minitp.util.stdout import write_out

BEFORE_FIRST, AFTER_FIRST, WORST = 3, 6, 10  # lines of the tables of a failure
NAMES_SHOWN = 3
BESIDE = 30  # a longer note gets a line of its own


def run(args, tp):
    """Print the table of two files; 1 if a step departs."""
    if args.report is not None:
        check_output(args.report, ".html")
    with tqdm(desc="comparing", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
        result = compare_files(args.a, args.b, args.map, args.tolerance, bar.update)
    said = verdict(result)
    lines = [
        f"A, the reference: {args.a}",
        f"B:                {args.b}",
        *[f"only in {side}: {some(names)}" for side, names in names_of_one(result)],
        *result.remarks,
        "",
        *(departed(result) if result.departing else agreed(result)),
        "",
        said,
    ]
    write_out("\n".join(lines) + "\n")
    if args.report is not None:
        write_report(args.report, report_data(args.a, args.b, result, said))
        write_out(f"report: {args.report}\n")
    return 1 if result.departing else 0


def names_of_one(result):
    return [(side, names) for side, names in (("A", result.only_a), ("B", result.only_b)) if names]


def some(names):
    """How many names, and a few of them."""
    shown = ", ".join(names[:NAMES_SHOWN]) + (", .." if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} ({shown})"


def departed(result):
    """The tables of a failure: how it begins, the worst of it, and the verdict."""
    steps, departing = result.steps, result.departing
    first = departing[0]
    i = steps.index(first)
    lines = ["Where it begins (! departs):", *table(steps[max(0, i - BEFORE_FIRST) : i + AFTER_FIRST])]
    worst = sorted(departing, key=lambda step: -step.relative)
    if len(departing) > 1:
        lines += [
            "",
            f"The worst of {len(departing)} departing steps, of {len(steps)}:",
            *table(worst[:WORST]),
        ]
    if len(departing) > WORST:
        lines.append(f"  and {len(departing) - WORST} more")
    return lines


def verdict(result):
    """The last line."""
    if not result.departing:
        count, others = len(result.steps), sum(step.layout != "" for step in result.steps)
        what = f"all {count} common steps" if count > 1 else "the one common step"
        laid_out = f", {others} of them in another layout" if others else ""
        return f"{what} within {result.tolerance:g} ({result.why}){laid_out}"
    step = result.departing[0]
    error = f"relative error {step.relative:.2g} (tolerance {step.tolerance:g})"
    where = f"largest difference at {list(step.index)}: {step.a_value:.6g} in A, {step.b_value:.6g} in B"
    note = f" ({step.note})" if step.note else ""
    return f"first departing step: {step.name}: {error}; {where}{note}"


def agreed(result):
    """The table of a success, a line for all layers of a step that lie alike: the worst of them."""
    groups = {}
    for step in result.steps:
        groups.setdefault((re.sub(r"\d+", "*", step.name), step.layout), []).append(step)
    worst = [max(steps, key=lambda step: step.relative) for steps in groups.values()]
    return ["The worst of each step over layers and passes:", *table(worst)]


def table(steps):
    """A line for each step, and one more for a long note, which tells a cause."""
    rows = [("", "step", "error", "differs most at", "A", "B", "note")]
    for step in steps:
        mark = "!" if step.departs else ""
        note = step.note if len(step.note) <= BESIDE else ""
        values = ("", "", "")
        if step.absolute > 0:
            values = (str(list(step.index)), f"{step.a_value:.5g}", f"{step.b_value:.5g}")
        rows.append((mark, step.name, f"{step.relative:.1e}", *values, note))
    lines = aligned(rows, "<<><>><")
    for place, step in reversed(list(enumerate(steps, start=2))):
        if len(step.note) > BESIDE:
            lines.insert(place, f"     {step.note}")
    return lines
