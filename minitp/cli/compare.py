"""`minitp compare`: compare two traces, from any engine."""

import sys

from minitp.cli.color import judged
from minitp.cli.command import OneProcess
from minitp.cli.options import SHARES, add_report, add_split
from minitp.compare.result import count_and_first, without_numbers
from minitp.util.format import aligned, counted
from minitp.util.shares import numbers_only
from minitp.util.stdout import write_out

BEFORE_FIRST, AFTER_FIRST = 3, 6  # number of steps to show before and from the first that differs
WORST = 10  # number of steps in the table of the worst
NOTE_WIDTH = 30  # a longer note gets its own line


class CompareCommand(OneProcess):
    """The command `minitp compare`."""

    name = "compare"
    inputs = "A B"
    summary = "compare two traces, from any engine"
    description = (
        "Compare the arrays in B with those in A, step by step. If a step differs by more than the "
        "tolerance, the exit code is 1, and the last line names the first such step. In 16 bits, a step also "
        "differs if its error is much larger than rounding and the errors of its inputs explain. Arrays that "
        "do not fit are listed, and the rest is compared."
    )
    examples = (
        ("minitp compare minitp.safetensors mine.npz", "compare your engine's arrays with a minitp trace"),
        (
            "minitp compare a.safetensors b.npz --map names.json --report difference.html",
            "B uses other names; write a report",
        ),
        (
            "minitp compare minitp.safetensors dumps --map megatron",
            "the ranks' files dumps/rank0.npz, dumps/rank1.npz, .. have the names of Megatron's modules",
        ),
        (
            "minitp compare minitp.safetensors mine.npz --rope interleaved",
            "your engine rotates neighboring dimensions, as Meta's code and GGUF files do",
        ),
    )

    def add_options(self, parser):
        group = parser.groups["input"]
        group.add_argument("a", metavar="A", help="the reference, a .safetensors or .npz file")
        group.add_argument(
            "b", metavar="B", help="the file to compare with it, or a folder with a file for each rank"
        )
        group = parser.groups["comparison"]
        group.add_argument(
            "--map",
            metavar="ENGINE|NAMES.json",
            help="the engine whose names B has: hf, llama.cpp, megatron, vllm or mlx; or a JSON file that "
            "maps names in A to names in B (default: equal names)",
        )
        group.add_argument(
            "--tolerance",
            type=float,
            metavar="X",
            help="maximum relative error; if given, nothing else counts (default: depends on the dtypes "
            "in the files)",
        )
        group.add_argument(
            "--rope",
            choices=("interleaved", "half"),
            help="the RoPE layout of B's heads; interleaved heads are converted to A's half-split layout "
            "(default: half)",
        )
        add_split(parser, f"{SHARES}, if B is a folder of unequal ranks' files (default: equal shares)")
        add_report(parser)

    def run(self, args):
        """Print the tables and the verdict; return 1 if a step differs, else 0."""
        from tqdm import tqdm

        from minitp.cli.inputs import check_output
        from minitp.compare.picture import Pictures
        from minitp.compare.run import compare_files
        from minitp.report.compare import report_data
        from minitp.report.page import write_report

        split = numbers_only(args.split, "depends on devices, which compare does not know")
        if args.report is not None:
            check_output(args.report, ".html")
        pictures = None if args.report is None else Pictures()
        with tqdm(desc="comparing", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
            options = args.map, args.tolerance, bar.update, pictures, args.rope, split
            result = compare_files(args.a, args.b, *options)
        said, left_out = verdict(result), left_out_counts(result)
        lines = [
            f"A, the reference: {args.a}",
            f"B:                {args.b}",
            *[f"only in {side}: {count_and_first(names)}" for side, names in names_of_one(result)],
            *result.left_out,
            *result.remarks,
            "",
            *(failure_lines(result) if result.departing else success_lines(result)),
            "",
            *([f"{left_out}, see above"] if result.departing and left_out else []),
            judged(said, not result.departing, sys.stdout),
        ]
        write_out("\n".join(lines) + "\n")
        if args.report is not None:
            write_report(args.report, report_data(args.a, args.b, result, said, pictures.by_name()))
            write_out(f"report: {args.report}\n")
        return 1 if result.departing else 0


def names_of_one(result):
    """Return (side, names) for each file that has steps which the other file lacks."""
    return [(side, names) for side, names in (("A", result.only_a), ("B", result.only_b)) if names]


def left_out_counts(result):
    """Return the numbers of common arrays that were not compared, and only in part, or the empty string."""
    compared = (f"{len(result.not_compared)} not compared", f"{len(result.partial)} compared only in part")
    return ", ".join(text for text in compared if not text.startswith("0 "))


def failure_lines(result):
    """Return the tables for a failure: the steps around the first that differs, and the worst steps."""
    steps, departing = result.steps, result.departing
    first = departing[0]
    i = steps.index(first)
    lines = ["Where it begins (! differs):", *table(steps[max(0, i - BEFORE_FIRST) : i + AFTER_FIRST])]
    worst = sorted(departing, key=lambda step: -step.relative)
    if len(departing) > 1:
        lines += [
            "",
            f"The worst of the {len(departing)} differing steps ({len(steps)} compared):",
            *table(worst[:WORST]),
        ]
    if len(departing) > WORST:
        lines.append(f"  and {len(departing) - WORST} more")
    return lines


def verdict(result):
    """Return the last line: the tolerance that all steps meet, or the first step that does not."""
    if not result.departing:
        count, left_out = len(result.steps), left_out_counts(result)
        what = f"all {count} common steps" if count > 1 else "the one common step"
        what = counted(count, "common step") if result.not_compared else what
        explained = [step for step in result.steps if step.relative > result.tolerance]
        largest = max((step.tolerance for step in explained), default=0)
        special = (
            (len(explained), f"up to {largest:g} as their inputs explain"),
            (sum(step.layout != "" for step in result.steps), "in another layout"),
            (sum(step.both_nan > 0 for step in result.steps), "with NaN in both files"),
        )
        parts = [f"{what} within {result.tolerance:g} ({result.why})"]
        parts += [f"{number} of them {text}" for number, text in special if number]
        return ", ".join(parts) + (f"; {left_out}" if left_out else "")
    step = result.departing[0]
    a, b = (shown(value, 6, step.exact) for value in (step.a_value, step.b_value))
    if step.exact:
        error, where = "integers must be equal", f"first difference at {list(step.index)}: {a} in A, {b} in B"
    else:
        error = f"relative error {step.relative:.2g} (tolerance {step.tolerance:g})"
        if step.relative <= step.tolerance:
            error += ", too large for its inputs"
        where = f"largest difference at {list(step.index)}: {a} in A, {b} in B"
    note = f" ({step.note})" if step.note else ""
    return f"first differing step: {step.name}: {error}; {where}{note}"


def success_lines(result):
    """Return the table for a success: the worst of each step and layout over all layers and passes."""
    groups = {}
    for step in result.steps:
        groups.setdefault((without_numbers(step.name), step.layout, step.rest), []).append(step)
    worst = [max(steps, key=lambda step: step.relative) for steps in groups.values()]
    return ["The worst of each step over layers and passes:", *table(worst)]


def table(steps):
    """Return a line for each step, and a separate line for a long note about its cause."""
    rows = [("", "step", "error", "differs most at", "A", "B", "note")]
    # The rest of an array that is compared in part is described above the table.
    notes = {step.name: step.note.replace(step.rest, "in part") if step.rest else step.note for step in steps}
    for step in steps:
        mark = "!" if step.departs else ""
        note = notes[step.name] if len(notes[step.name]) <= NOTE_WIDTH else ""
        values = ("", "", "")
        if step.absolute > 0:
            found = (shown(value, 5, step.exact) for value in (step.a_value, step.b_value))
            values = (str(list(step.index)), *found)
        rows.append((mark, step.name, f"{step.relative:.1e}", *values, note))
    lines = aligned(rows, "<<><>><")
    for place, step in reversed(list(enumerate(steps, start=2))):
        if len(notes[step.name]) > NOTE_WIDTH:
            lines.insert(place, f"     {notes[step.name]}")
    return lines


def shown(value, digits, exact):
    """Return a number as text, with this number of significant digits unless it is an exact integer."""
    return f"{value:.0f}" if exact else f"{value:.{digits}g}"
