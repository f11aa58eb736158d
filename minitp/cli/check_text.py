"""The results of `minitp check` as text; `judge_text` uses parts of it."""

from minitp.trace.names import AFTER, BEFORE, BLOCK_TABLE, LAYER
from minitp.util.format import aligned, counted

LINES = 20  # maximum number of wrong steps in the table
NEAR = 0.8  # a layer whose error exceeds this share of its bound always has a row
HEADER = ("step", "local error", "allowed", "share")
SIDES = "<>>><>>"


def table(result, every_layer=True):
    """Return the table: the wrong steps, worst first, or if there are none, a row per step and per layer.

    Unless `every_layer` is set, layers that are far from their bounds are only counted.
    """
    if result.problems:
        return [f"plan, rank {rank}: {text}" for rank, text in result.problems]
    wrong = sorted(result.blamed(), key=lambda finding: -finding.ratio)
    if wrong:
        rows = [(f.name, *errors(f), f"rank {f.rank}", *totals([f])) for f in wrong[:LINES]]
        more = [f"and {len(wrong) - LINES} more"] if len(wrong) > LINES else []
        return aligned([(*HEADER, "rank", "total error", "share"), *rows], SIDES) + more
    steps = {step: [] for step in ("weights", *BEFORE, BLOCK_TABLE, *LAYER, *AFTER)}
    layers = {f"layer {layer}": [] for layer in range(1 + max(f.layer or 0 for f in result.findings))}
    for finding in result.findings:
        steps["weights" if finding.pass_name == "weights" else finding.step].append(finding)
        if finding.layer is not None:
            layers[f"layer {finding.layer}"].append(finding)
    # A step that the run does not have, or that is inside a fused kernel, has no findings.
    rows = [row(name, findings) for name, findings in steps.items() if findings]
    shown = {
        name: findings
        for name, findings in layers.items()
        if findings and (every_layer or max(finding.ratio for finding in findings) > NEAR)
    }
    rows += [row(name, findings) for name, findings in shown.items()]
    lines = aligned([(*HEADER, "worst at", "total error", "share"), *rows], SIDES)
    return lines + not_shown(len(layers) - len(shown), len(shown))


def row(name, findings):
    """Return a row of the table for the worst of some findings."""
    worst = max(findings, key=lambda finding: finding.ratio)
    where = f"{worst.name} rank {worst.rank}" if worst.ratio else ""
    return name, *errors(worst), where, *totals(findings)


def not_shown(hidden, shown):
    """Return the line that counts the layers without a row."""
    if not hidden:
        return []
    which = f"the other {counted(hidden, 'layer')}" if shown else counted(hidden, "layer")
    return ["", f"{which}: at most {NEAR:.0%} of the error allowed; -v shows a row for each"]


def errors(finding):
    """Return a finding's local error, the error allowed, and their ratio, as text."""
    allowed = number(finding.bounds[0]) if finding.bounds[0] else "exact"
    return number(finding.local.relative) if finding.local else "-", allowed, percent(finding.ratio)


def totals(findings):
    """Return the largest total error, and the largest share of the bound of a total error, as text."""
    found = [finding for finding in findings if finding.total is not None]
    errors = [finding.total.relative for finding in found]
    ratios = [finding.total.relative / finding.total_bound for finding in found if finding.total_bound]
    return number(max(errors)) if errors else "", percent(max(ratios)) if ratios else ""


def percent(ratio):
    """Return the ratio of an error and its bound as a percentage, the text in the columns named share."""
    return f"{ratio:.0%}" if ratio < 1000 else "> 1000"


def number(x):
    return f"{x:.1e}" if x else "0"


def verdict(source, result, ranks=None):
    """Return the last line: that all steps are within bounds, or the first wrong one.

    `ranks` says where the arrays are from, by default the ranks of the result.
    """
    if result.problems:
        rank, text = result.problems[0]
        return f"first wrong step: the plan, rank {rank}: {text}"
    if result.ok:
        ranks = ranks or f"on {counted(result.tp, 'rank')}"
        arrays = f"{counted(len(result.findings), 'array')} {ranks}"
        layers = f"all {source.plan.layers} layers" if source.plan.layers > 1 else "the 1 layer"
        return f"all steps within bounds for {layers} ({arrays})"
    return f"first wrong step: {blame(result.blamed()[0])}"


def blame(first):
    """Return the name of a wrong finding, its layer and rank, and what is wrong, as text."""
    layer = "" if first.layer is None else f", layer {first.layer}"
    reasons = [first.note] if first.note else []
    if first.local is not None and first.ratio > 1:
        relative, absolute = first.bounds
        allowed = f"allowed {relative:.2g}, {absolute:.2g} absolute" if relative else "it must be exact"
        reasons.append(f"{first.local}; {allowed}")
    if first.ok:
        reasons.append(
            f"total error {first.total.relative:.2g}, allowed {first.total_bound:.2g}, although every step "
            "is right for its own inputs; an input of this step is not what the model should have had"
        )
    return f"{first.name}{layer}, rank {first.rank}: {'; '.join(reasons)}"
