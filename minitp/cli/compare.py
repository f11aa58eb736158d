"""`minitp compare`: compare two files of steps, from any engine."""

import re
import sys

from minitp.cli.color import judged
from minitp.cli.command import OneProcess
from minitp.cli.options import add_report
from minitp.util.format import aligned
from minitp.util.stdout import write_out

BEFORE_FIRST, AFTER_FIRST, WORST = 3, 6, 10  # lines of the tables of a failure
NAMES_SHOWN = 3
BESIDE = 30  # a longer note gets its own line


class CompareCommand(OneProcess):
    """The command `minitp compare`."""

    name = "compare"
    inputs = "A B"
    summary = "compare two files of steps, from any engine"
    description = (
        "Compare the arrays of B with those of A, step by step. The exit code is 1 if a step differs by more "
        "than the tolerance, and the last line names the first one."
    )
    examples = (
        ("minitp compare minitp.safetensors mine.npz", "compare your engine's arrays with a minitp trace"),
        (
            "minitp compare a.safetensors b.npz --map names.json --report difference.html",
            "other names in B; a report",
        ),
    )

    def add_options(self, parser):
        group = parser.groups["input"]
        group.add_argument("a", metavar="A", help="the reference, a .safetensors or .npz file")
        group.add_argument("b", metavar="B", help="the file to compare with it")
        group = parser.groups["comparison"]
        group.add_argument(
            "--map",
            metavar="NAMES.json",
            help="a JSON object from names in A to names in B (default: equal names)",
        )
        group.add_argument(
            "--tolerance",
            type=float,
            metavar="X",
            help="largest relative error that passes (default: by the dtypes of the files)",
        )
        add_report(parser)

    def run(self, args):
        """Print the table and the verdict; the exit code is 1 if a step departs."""
        from tqdm import tqdm

        from minitp.cli.inputs import check_output
        from minitp.compare.run import compare_files
        from minitp.report.compare import report_data
        from minitp.report.page import write_report

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
            judged(said, not result.departing, sys.stdout),
        ]
        write_out("\n".join(lines) + "\n")
        if args.report is not None:
            write_report(args.report, report_data(args.a, args.b, result, said))
            write_out(f"report: {args.report}\n")
        return 1 if result.departing else 0


def names_of_one(result):
    """Return (side, names) for each file that has steps which the other lacks."""
    return [(side, names) for side, names in (("A", result.only_a), ("B", result.only_b)) if names]


def some(names):
    """Return the number of names, and the first few."""
    shown = ", ".join(names[:NAMES_SHOWN]) + (", .." if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} ({shown})"


def departed(result):
    """Return the tables of a failure: the steps around the first departure, and the worst steps."""
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
    """Return the last line: the tolerance that all steps meet, or the first step that does not."""
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
    """Return the table of a success: for each step in each layout the worst over layers and passes."""
    groups = {}
    for step in result.steps:
        groups.setdefault((re.sub(r"\d+", "*", step.name), step.layout), []).append(step)
    worst = [max(steps, key=lambda step: step.relative) for steps in groups.values()]
    return ["The worst of each step over layers and passes:", *table(worst)]


def table(steps):
    """Return a line for each step, and another for a long note, which names a cause."""
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
