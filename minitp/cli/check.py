"""`minitp check`."""

import sys

from tqdm import tqdm

from minitp.bench.measure import gpu_name
from minitp.check.run import check_model
from minitp.cli.inputs import check_output, passes_wanted, prompt_tokens
from minitp.cli.load_progress import load
from minitp.report.check import report_data
from minitp.report.page import write_report
from minitp.trace.names import AFTER, BEFORE, LAYER
from minitp.util.format import aligned, counted
from minitp.util.stdout import write_out

LINES = 20  # of wrong steps that are shown
HEADER = ("step", "local error", "allowed", "share", "worst at", "total error")
SIDES = "<>>><>"


def prepare(args, source):
    """Check the options and the prompt; its tokens and the passes."""
    ids = prompt_tokens(args, source)
    if args.report is not None:
        check_output(args.report, ".html")
    return ids, passes_wanted(args, source, ids)


def run(args, comm, source, job):
    """Print the table and the verdict; 1 if a step is wrong."""
    ids, passes = job
    model, _ = load(args, comm, source, args.path)
    hidden = comm.rank != 0 or not sys.stderr.isatty()
    with tqdm(
        total=2 * source.plan.layers, desc="checking", unit="layer", leave=False, disable=hidden
    ) as bar:
        result = check_model(source, model, ids, passes, bar.update)
    if comm.rank == 0:
        said = verdict(source, result)
        write_out("\n".join([title(source, model, result), "", *table(result), "", said]) + "\n")
    with comm.agreed():
        if comm.rank == 0 and args.report is not None:
            gpu = gpu_name(model.device) if model.device.is_gpu else None
            data = report_data(source, model.device.dtype, result, said, args.prompt, gpu)
            write_report(args.report, data)
            write_out(f"report: {args.report}\n")
    return 0 if result.ok else 1


def title(source, model, result):
    """What has been run."""
    tokens = len(result.token_ids)
    decoded = len(result.passes) - 1
    ranks = counted(model.comm.size, "rank")
    return (
        f"{source.name} on {ranks}, {model.device.dtype.name}: a prompt of {tokens - decoded} tokens and "
        f"{decoded} decoded ones, {source.plan.layers} layers"
    )


def table(result):
    """A line for each kind of step and each layer; or the wrong steps alone, if there are, worst first."""
    if result.problems:
        return [f"plan, rank {rank}: {text}" for rank, text in result.problems]
    wrong = sorted(result.blamed(), key=lambda finding: -finding.ratio)
    if wrong:
        rows = [(f.name, *errors(f), f"rank {f.rank}", total([f])) for f in wrong[:LINES]]
        more = [f"and {len(wrong) - LINES} more"] if len(wrong) > LINES else []
        return aligned([HEADER, *rows], SIDES) + more
    groups = {step: [] for step in ("weights", *BEFORE, *LAYER, *AFTER)}
    groups |= {f"layer {layer}": [] for layer in range(1 + max(f.layer or 0 for f in result.findings))}
    for finding in result.findings:
        groups["weights" if finding.pass_name == "weights" else finding.step].append(finding)
        if finding.layer is not None:
            groups[f"layer {finding.layer}"].append(finding)
    rows = []
    for name, findings in groups.items():
        if not findings:  # inside a fused operation
            continue
        worst = max(findings, key=lambda finding: finding.ratio)
        where = f"{worst.name} rank {worst.rank}" if worst.ratio else ""
        rows.append((name, *errors(worst), where, total(findings)))
    return aligned([HEADER, *rows], SIDES)


def errors(finding):
    """A finding's local error, what is allowed, and the one as a share of the other."""
    allowed = number(finding.bounds[0]) if finding.bounds[0] else "exact"
    share = f"{finding.ratio:.0%}" if finding.ratio < 1000 else "> 1000"
    return number(finding.local.relative) if finding.local else "-", allowed, share


def total(findings):
    """The largest total error."""
    totals = [finding.total.relative for finding in findings if finding.total is not None]
    return number(max(totals)) if totals else ""


def number(x):
    return f"{x:.1e}" if x else "0"


def verdict(source, result):
    """The last line: all is well, or who is to blame."""
    if result.problems:
        rank, text = result.problems[0]
        return f"first wrong step: the plan, rank {rank}: {text}"
    if result.ok:
        ranks = "1 rank" if result.tp == 1 else f"{result.tp} ranks"
        arrays = f"{len(result.findings)} arrays on {ranks}"
        layers = f"all {source.plan.layers} layers" if source.plan.layers > 1 else "the 1 layer"
        return f"all steps within bounds for {layers} ({arrays})"
    first = result.blamed()[0]
    layer = "" if first.layer is None else f", layer {first.layer}"
    reasons = [first.note] if first.note else []
    if first.local is not None and first.ratio > 1:
        relative, absolute = first.bounds
        allowed = f"allowed {relative:.2g}, {absolute:.2g} absolute" if relative else "it must be exact"
        reasons.append(f"{first.local}; {allowed}")
    return f"first wrong step: {first.name}{layer}, rank {first.rank}: {'; '.join(reasons)}"
