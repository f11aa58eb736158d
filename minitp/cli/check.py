"""`minitp check`: compare every step of every rank with the oracle."""

import sys

from minitp.cli.color import judged
from minitp.cli.command import OnRanks
from minitp.cli.options import PROMPT_OR_TOKENS, add_decode, add_device, add_model, add_prompt, add_report
from minitp.trace.names import AFTER, BEFORE, LAYER
from minitp.util.format import aligned, counted
from minitp.util.stdout import write_out

LINES = 20  # maximum number of wrong steps in the table
NEAR = 0.8  # a layer whose error exceeds this share of its bound always has a row
HEADER = ("step", "local error", "allowed", "share")
SIDES = "<>>><>"


class CheckCommand(OnRanks):
    """The command `minitp check`."""

    name = "check"
    inputs = PROMPT_OR_TOKENS
    summary = "check every step of every rank against a float64 reference"
    description = (
        "Run a prompt and compare every step (intermediate array) of every rank with the oracle, an "
        "independent float64 implementation of the model. If the error of a step exceeds its bound, the exit "
        "code is 1, and the last line names the first wrong step, its layer and its rank."
    )
    examples = (
        ('minitp check "The capital of France is" --tp 4', "check the demo model on four ranks"),
        (
            'minitp check "Once upon a time" --tp 2 --device cuda --path fused --report check.html',
            "check the GPU kernels, and write a page that shows every step",
        ),
    )
    verbose = "show a row for each layer, Python tracebacks, and what every rank wrote to stderr"

    def add_options(self, parser):
        add_prompt(parser)
        add_decode(parser, default=2)
        parser.groups["steps"].add_argument(
            "--path",
            choices=["explicit", "fused"],
            default="explicit",
            help="explicit: every operation by itself; fused: the fused GPU kernels where they exist, which "
            "needs --device cuda (default: explicit)",
        )
        add_model(parser)
        add_device(parser)
        add_report(parser)

    def prepare(self, args, source):
        """Return the prompt's tokens and the passes."""
        from minitp.cli.inputs import check_output, passes_wanted, prompt_tokens

        ids = prompt_tokens(args, source)
        if args.report is not None:
            check_output(args.report, ".html")
        return ids, passes_wanted(args, source, ids)

    def run(self, args, comm, source, prepared):
        """Print the table and the verdict; return 1 if a step is wrong, else 0."""
        from tqdm import tqdm

        from minitp.check.run import check_model
        from minitp.cli.load_progress import load
        from minitp.report.check import report_data
        from minitp.report.page import write_report

        ids, passes = prepared
        model, _ = load(args, comm, source, args.path)
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(
            total=2 * source.plan.layers, desc="checking", unit="layer", leave=False, disable=hidden
        ) as bar:
            result = check_model(source, model, ids, passes, bar.update)
        if comm.rank == 0:
            said = verdict(source, result)
            lines = [title(source, model, result), "", *table(result, args.verbose), ""]
            write_out("\n".join([*lines, judged(said, result.ok, sys.stdout)]) + "\n")
        with comm.agreed():
            if comm.rank == 0 and args.report is not None:
                gpu = model.device.name if model.device.is_gpu else None
                data = report_data(source, model.device.dtype, result, said, args.prompt, gpu)
                write_report(args.report, data)
                write_out(f"report: {args.report}\n")
        return 0 if result.ok else 1


def title(source, model, result):
    """Return the heading: the model, the ranks, the dtype and the tokens."""
    tokens = len(result.token_ids)
    decoded = len(result.passes) - 1
    ranks = counted(model.comm.size, "rank")
    return (
        f"{source.name} on {ranks}, {model.device.dtype.name}: a prompt of {tokens - decoded} tokens and "
        f"{decoded} decoded ones, {source.plan.layers} layers"
    )


def table(result, every_layer=True):
    """Return the table: the wrong steps, worst first, or if there are none, a row per step and per layer.

    Unless `every_layer` is set, layers that are far from their bounds are only counted.
    """
    if result.problems:
        return [f"plan, rank {rank}: {text}" for rank, text in result.problems]
    wrong = sorted(result.blamed(), key=lambda finding: -finding.ratio)
    if wrong:
        rows = [(f.name, *errors(f), f"rank {f.rank}", total([f])) for f in wrong[:LINES]]
        more = [f"and {len(wrong) - LINES} more"] if len(wrong) > LINES else []
        return aligned([(*HEADER, "rank", "total error"), *rows], SIDES) + more
    steps = {step: [] for step in ("weights", *BEFORE, *LAYER, *AFTER)}
    layers = {f"layer {layer}": [] for layer in range(1 + max(f.layer or 0 for f in result.findings))}
    for finding in result.findings:
        steps["weights" if finding.pass_name == "weights" else finding.step].append(finding)
        if finding.layer is not None:
            layers[f"layer {finding.layer}"].append(finding)
    # A step that is inside a fused kernel has no findings.
    rows = [row(name, findings) for name, findings in steps.items() if findings]
    shown = {
        name: findings
        for name, findings in layers.items()
        if findings and (every_layer or max(finding.ratio for finding in findings) > NEAR)
    }
    rows += [row(name, findings) for name, findings in shown.items()]
    lines = aligned([(*HEADER, "worst at", "total error"), *rows], SIDES)
    return lines + not_shown(len(layers) - len(shown), len(shown))


def row(name, findings):
    """Return a row of the table for the worst of some findings."""
    worst = max(findings, key=lambda finding: finding.ratio)
    where = f"{worst.name} rank {worst.rank}" if worst.ratio else ""
    return name, *errors(worst), where, total(findings)


def not_shown(hidden, shown):
    """Return the line that counts the layers without a row."""
    if not hidden:
        return []
    which = f"the other {counted(hidden, 'layer')}" if shown else counted(hidden, "layer")
    return ["", f"{which}: at most {NEAR:.0%} of the error allowed; -v shows a row for each"]


def errors(finding):
    """Return a finding's local error, the error allowed, and their ratio, as text."""
    allowed = number(finding.bounds[0]) if finding.bounds[0] else "exact"
    share = f"{finding.ratio:.0%}" if finding.ratio < 1000 else "> 1000"
    return number(finding.local.relative) if finding.local else "-", allowed, share


def total(findings):
    """Return the largest total error, as text."""
    totals = [finding.total.relative for finding in findings if finding.total is not None]
    return number(max(totals)) if totals else ""


def number(x):
    return f"{x:.1e}" if x else "0"


def verdict(source, result):
    """Return the last line: that all steps are within bounds, or the first wrong one."""
    if result.problems:
        rank, text = result.problems[0]
        return f"first wrong step: the plan, rank {rank}: {text}"
    if result.ok:
        arrays = f"{len(result.findings)} arrays on {counted(result.tp, 'rank')}"
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
