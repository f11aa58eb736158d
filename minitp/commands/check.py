"""`minitp check`."""

import sys

from tqdm import tqdm

from minitp.check import check_model
from minitp.commands.loading import load
from minitp.commands.prompt import check_output, passes_wanted, prompt_tokens
from minitp.output import write_out
from minitp.steps import AFTER, BEFORE, LAYER
from minitp.table import aligned

LINES = 20  # of wrong steps that are shown
HEADER = ("step", "local error", "allowed", "share", "worst at", "total error")
SIDES = "<>>><>"


class Check:
    """`minitp check`."""

    @staticmethod
    def prepare(args, source):
        """Check the options and the prompt; its tokens and the passes."""
        ids = prompt_tokens(args, source)
        if args.report is not None:
            check_output(args.report, ".html")
        return ids, passes_wanted(args, source, ids)

    @staticmethod
    def run(args, comm, source, job):
        """Print the table and the verdict; 1 if a step is wrong."""
        ids, passes = job
        model, _ = load(args, comm, source)
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(
            total=2 * source.plan.layers, desc="checking", unit="layer", leave=False, disable=hidden
        ) as bar:
            result = check_model(source, model, ids, passes, bar.update)
        if comm.rank == 0:
            lines = [title(source, model, result), "", *table(result), "", *verdict(source, result)]
            write_out("\n".join(lines) + "\n")
        return 0 if result.ok else 1


def title(source, model, result):
    """What has been run."""
    tokens = len(result.token_ids)
    decoded = len(result.passes) - 1
    ranks = f"{model.comm.size} ranks" if model.comm.size > 1 else "1 rank"
    return (
        f"{source.name} on {ranks}, {model.device.dtype.name}: a prompt of {tokens - decoded} tokens and "
        f"{decoded} decoded ones, {source.plan.layers} layers"
    )


def table(result):
    """A line for each kind of step and each layer; or the wrong steps alone, if there are, worst first."""
    wrong = sorted(result.blamed(), key=lambda finding: -finding.share)
    if result.problems:
        return [f"plan, rank {rank}: {text}" for rank, text in result.problems]
    if wrong:
        lines = aligned([HEADER, *[row(finding.name, [finding]) for finding in wrong[:LINES]]], SIDES)
        return lines + ([f"and {len(wrong) - LINES} more"] if len(wrong) > LINES else [])
    by_step, by_layer = {}, {}
    for finding in result.findings:
        step = "weights" if finding.pass_name == "weights" else finding.step
        by_step.setdefault(step, []).append(finding)
        if finding.layer is not None:
            by_layer.setdefault(finding.layer, []).append(finding)
    rows = [row(step, by_step[step]) for step in ("weights", *BEFORE, *LAYER, *AFTER)]
    rows += [row(f"layer {layer}", found) for layer, found in sorted(by_layer.items())]
    return aligned([HEADER, *rows], SIDES)


def row(called, findings):
    """One line: the finding that is nearest its bound, and the largest total error of all."""
    worst = max(findings, key=lambda finding: finding.share)
    totals = [finding.total.relative for finding in findings if finding.total is not None]
    return (
        called,
        number(worst.local.relative) if worst.local is not None else "-",
        f"{worst.bounds[0]:.1e}" if worst.bounds[0] else "exact",
        f"{worst.share:.0%}" if worst.share < 1000 else "> 1000",
        place(worst) if worst.bounds[0] else "",
        number(max(totals)) if totals else "",
    )


def number(x):
    return f"{x:.1e}" if x else "0"


def place(finding):
    """Where a finding is: its step unless that is said already, pass and rank."""
    layer = "" if finding.layer is None else f"layers.{finding.layer}."
    return f"{finding.pass_name}/{layer}{finding.step} rank {finding.rank}"


def verdict(source, result):
    """The last lines: all is well, or who is to blame."""
    if result.problems:
        rank, text = result.problems[0]
        return [f"first wrong step: the plan, rank {rank}: {text}"]
    blamed = result.blamed()
    if not blamed:
        arrays = f"{len(result.findings)} arrays on {result.tp} ranks"
        return [f"all steps within bounds for all {source.plan.layers} layers ({arrays})"]
    first = blamed[0]
    layer = "" if first.layer is None else f", layer {first.layer}"
    reasons = [first.note] if first.note else []
    if first.local is not None and first.share > 1:
        allowed = f"{first.bounds[0]:.2g}" if first.bounds[0] else "none: it must be exact"
        reasons.append(f"{first.local} (relative error allowed: {allowed})")
    return [f"first wrong step: {first.name}{layer}, rank {first.rank}: {'; '.join(reasons)}"]
