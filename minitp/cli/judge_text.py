"""The results of `minitp judge` as text."""

from minitp.cli.check_text import LINES, NEAR, blame, number, verdict
from minitp.compare.inputs import INPUTS
from minitp.judge.names import unknown_text
from minitp.judge.run import first_wrong
from minitp.trace.names import AFTER, BEFORE, LAYER, PARTIAL, split_name
from minitp.util.format import aligned, counted

SHOWN = 4  # number of layers, shapes or steps in a line
MOST_EXPERTS = 8  # number of experts of a layer in a line
OF_SEVERAL_RANKS = (*PARTIAL, "logits_partial")  # steps that one process has no arrays of
HEADER = ("step", "error", "allowed", "share of allowed")


def table(result, every_layer):
    """Return the table: the wrong steps in their order, or if there are none, a row per step and per layer.

    Unless `every_layer` is set, layers that are far from their bounds are only counted. Ranks are named if
    there are several.
    """
    wrong, several = result.blamed(), result.tp > 1
    if wrong:
        rows = [(f.name, *errors(f), f"rank {f.rank}") for f in wrong[:LINES]]
        more = [f"and {len(wrong) - LINES} more"] if len(wrong) > LINES else []
        return without_empty([(*HEADER, "rank" if several else ""), *rows], "<>>><") + more
    steps = {step: [] for step in (*BEFORE, *LAYER, *AFTER)}
    layers = {}
    for finding in result.findings:
        steps[finding.step].append(finding)
        if finding.layer is not None:
            layers.setdefault(f"layer {finding.layer}", []).append(finding)
    ratios = {name: max(finding.ratio for finding in findings) for name, findings in layers.items()}
    shown = {name: findings for name, findings in layers.items() if every_layer or ratios[name] > NEAR}
    rows = [row(name, findings, several) for name, findings in (steps | shown).items() if findings]
    lines = without_empty([(*HEADER, "largest at"), *rows], "<>>><")
    hidden = [ratio for name, ratio in ratios.items() if name not in shown]
    if hidden:
        which = f"the other {counted(len(hidden), 'layer')}" if shown else counted(len(hidden), "layer")
        lines += ["", f"{which}: at most {max(hidden):.0%} of the error allowed; -v shows a row for each"]
    return lines


def without_empty(rows, sides):
    """Return rows as aligned lines, without the columns that have no header or no content."""
    columns = list(zip(*rows, strict=True))
    kept = [n for n, column in enumerate(columns) if column[0] and any(column[1:])]
    return aligned([tuple(row[n] for n in kept) for row in rows], "".join(sides[n] for n in kept))


def row(name, findings, several):
    """Return a row of the table for the worst of some findings."""
    worst = max(findings, key=lambda finding: finding.ratio)
    where = f"{worst.name} rank {worst.rank}" if several else worst.name
    return name, *errors(worst), where if worst.ratio else ""


def errors(finding):
    """Return a finding's error, the error allowed, and their ratio, as text."""
    allowed = number(finding.bounds[0]) if finding.bounds[0] else "exact"
    if finding.local is None or finding.ratio == float("inf"):
        return number(finding.local.relative) if finding.local else "", allowed, ""
    return number(finding.local.relative), allowed, share(finding.ratio)


def share(ratio):
    """Return the ratio of an error and its bound as a percentage, or as a factor if it is large."""
    return f"{ratio:.0%}" if ratio < 10 else f"{ratio:.0f} times" if ratio < 1000 else "> 1000 times"


def judgement_text(source, recording, judgement, result, ranks):
    """Return the last lines: the verdict, and if a step is wrong, the mistake and errors that are hardly one.

    Parameters
    ----------
    source : ModelSource
    recording : EngineRecording
    judgement : Judgement
    result : CheckResult
        The result as it is shown.
    ranks : str
        The ranks that the arrays are from.
    """
    first, slight = first_wrong(result)
    if first is None:
        return [verdict(source, result, ranks)]
    lines = [f"first wrong operation: {blame(first)}"]
    if slight:
        listed = [f"{f.name}, rank {f.rank} ({share(f.ratio)})" for f in slight[:SHOWN]]
        more = f"; and {len(slight) - SHOWN} more" if len(slight) > SHOWN else ""
        lines.append(f"also slightly above its bound: {'; '.join(listed)}{more}")
    if first.local is not None:
        lines.append(mistake(first, recording, judgement))
    return lines


def mistake(first, recording, judgement):
    """Return the line about what the first wrong step seems to compute."""
    text = judgement.explanation
    if text:
        line = f"what it seems to compute: {text}"
    else:
        line = "no common mistake explains it: compare the operation, its weight and its settings"
        before = unrecorded_inputs(first.step, judgement.missing, len(recording.passes))
        line += f"; {', '.join(before)}, which it includes, would tell more if recorded" if before else ""
    interleaved = "rotated in pairs" in text or "interleaved, not half-split" in text
    if interleaved and recording.rope == "half" and not recording.is_trace:
        line += "; if your engine does so by design, add --rope interleaved"
    if first.step == "attn.residual" and recording.reads_stream_from_norm:
        line += "; attn.residual is recorded as the input of the next norm, which may read another array"
    return line


def unrecorded_inputs(step, missing, passes):
    """Return the inputs of a step that were not recorded, and theirs, through which it was computed."""
    found = []
    for name in INPUTS.get(step, [()])[0]:
        if name in missing:
            found += [*unrecorded_inputs(name, missing, passes), name]
    # Partial sums of one rank are sums, and the cache of one pass has its keys and values.
    known = OF_SEVERAL_RANKS + (("attn.k_cache", "attn.v_cache") if passes == 1 else ())
    return [name for name in dict.fromkeys(found) if name not in known]


def remarks(recording, judgement):
    """Return lines about what was not judged, and about arrays that are stored in an unusual way."""
    several = len(recording.ranks) > 1
    missing = [step for step in judgement.missing if several or step not in OF_SEVERAL_RANKS]
    lines = [f"not recorded: {', '.join(missing)}"] if missing else []
    if judgement.unjudged:
        lines.append(f"not judged, because they are computed in 8 bits: {', '.join(judgement.unjudged)}")
    if judgement.unfit:
        lines.append(unfit_text(judgement.unfit))
        lines += nothing_left(judgement)
    if judgement.vague:
        first, *others = judgement.vague
        more = f" and {counted(len(others), 'other array')}" if others else ""
        lines.append(
            f"not judged, because too many steps before were not recorded: {first}{more} (an error of "
            f"{max(judgement.vague.values()):.0%} could be rounding)"
        )
    if recording.attention not in ("", "eager"):
        lines.append(f"recorded with eager attention; the model's own, {recording.attention}, is not judged")
    if recording.unknown:
        lines.append(unknown_text(recording.unknown))
    if recording.unused:
        lines.append(f"not judged, because the model has no such steps: {', '.join(recording.unused)}")
    if judgement.idle:
        lines.append(idle_text(judgement.idle))
    lines += judgement.notes
    if not recording.has_end:
        layers = counted(recording.plan.layers, "layer")
        lines.append(f"only the first {layers} of the model: final_norm and logits are not judged")
    return lines


def unfit_text(unfit):
    """Return the line about arrays whose shapes fit no layout of their steps."""
    names = {}
    for name, (shape, expected) in unfit.items():
        step = split_name(name)[2]
        repeated = LAYER.get(step, "")[:1] == "K" and shape[1:] == expected[1:] and shape[0] > expected[0]
        hint = "; repeated KV heads that are not equal?" if repeated else ""
        names.setdefault(f"{step} is {shape}, expected {expected}{hint}", []).append(name)
    listed = [f"{text} ({counted(len(found), 'array')})" for text, found in names.items()]
    more = f"; and {counted(len(listed) - SHOWN, 'other shape')}" if len(listed) > SHOWN else ""
    return f"not judged, because of their shapes: {'; '.join(listed[:SHOWN])}{more}"


def nothing_left(judgement):
    """Return lines about the blocks of which no array could be judged because of the shapes."""
    judged = {(f.layer, f.step.partition(".")[0]) for f in judgement.result.findings}
    blocks = dict.fromkeys(
        (layer, step.partition(".")[0]) for _, layer, step in map(split_name, judgement.unfit)
    )
    left = [
        f"{block[1]} of layer {block[0]}" for block in blocks if block not in judged and block[0] is not None
    ]
    return [f"no array is left to judge of {', '.join(left)}"] if left else []


def idle_text(idle):
    """Return the line about the experts of each layer that no token chose."""
    listed = []
    for layer, experts in list(idle.items())[:SHOWN]:
        more = f" and {len(experts) - MOST_EXPERTS} more" if len(experts) > MOST_EXPERTS else ""
        listed.append(f"layer {layer}: {', '.join(map(str, experts[:MOST_EXPERTS]))}{more}")
    more = f"; and in {counted(len(idle) - SHOWN, 'other layer')}" if len(idle) > SHOWN else ""
    return f"experts that no token chose, so that their weights are not judged: {'; '.join(listed)}{more}"
