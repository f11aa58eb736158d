"""The data of the page that `minitp check --report` writes."""

import re

from minitp.report import weights
from minitp.report.steps import explain
from minitp.trace.names import AFTER, BEFORE, layer_steps
from minitp.util import this_run
from minitp.util.format import counted

WEIGHTS = "weights"  # the pass name of findings about tensors of the checkpoint
ALL = "all"  # the rank of a finding, or of a problem of the plan, for which no single rank is to blame


def report_data(source, dtype, result, verdict, prompt=None, gpu=None, command="check", engine=None):
    """Return the result of `minitp check` or `minitp judge` in the form that `report.page.render` expects.

    Parameters
    ----------
    source : ModelSource
    dtype : numpy.dtype
        The dtype in which the ranks computed.
    result : CheckResult
    verdict : str
        The last line of the command's output.
    prompt : str or None
        The text, or None if the run was given token ids.
    gpu : str or None
        The name of the GPU, or None if the ranks computed on CPUs.
    command : str
        check or judge.
    engine : str or None
        The engine that was judged; None if it is minitp.
    """
    plan = source.plan
    passes = _passes(result)
    inner = list(layer_steps(plan))
    before = [*_more_before(result), *BEFORE]
    cells, blamed = _cells(result, passes)
    batched = len(result.sequences) - 1
    return {
        "command": command,
        "title": f"{source.name} on {source.ranks}",
        "ok": result.ok,
        "verdict": verdict,
        "facts": [
            *([["engine", engine]] if engine is not None else []),
            ["model", source.name],
            ["ranks", str(plan.tp)],
            *([["split", source.split]] if source.split else []),
            ["dtype", dtype.name],
            *([["prompt", prompt]] if prompt is not None else []),
            ["token ids", " ".join(map(str, result.sequences[0]))],
            *([["in batches", counted(batched, "sequence")]] if batched else []),
            *([["weights", _weights(result)]] if command == "check" else []),
            *map(list, this_run.facts(command, plan.tp if command == "check" else None, gpu, source.split)),
        ],
        # The verdict names the first one.
        "problems": [f"plan, rank {rank}: {text}" for rank, text in result.problems[1:]],
        "warnings": list(result.warnings),
        "passes": passes,
        "tp": plan.tp,
        "layers": plan.layers,
        "before": before,
        "steps": inner,
        "after": list(AFTER),
        "weights": weights.columns(plan.tensors),
        "beside": weights.beside(plan.tensors),
        "readers": weights.readers(plan.tensors, {*before, *inner, *AFTER}),
        "cells": cells,
        "compared": len(result.findings),
        "blamed": blamed,
        "everywhere": bool(result.findings) and not result.ok and result.blamed()[0].rank == ALL,
        "explained": explain([*before, *inner, *AFTER, "weights"], source.config),
        "plan": _plan(source, result.problems),
    }


def _passes(result):
    """Return the names of the passes, in order."""
    found = [finding.pass_name for finding in result.findings if finding.pass_name != WEIGHTS]
    return list(dict.fromkeys([*(pass_.name for pass_ in result.passes), *found]))


def _more_before(result):
    """Return the steps outside the layers that are not in the tables of `trace.names`."""
    known = BEFORE | AFTER
    steps = [f.step for f in result.findings if f.layer is None and f.pass_name != WEIGHTS]
    return [step for step in dict.fromkeys(steps) if step not in known]


def _cells(result, passes):
    """Return the cells of the map, weights first, and the index of the one that is blamed, or None."""
    wrong = {(finding.name, finding.rank) for finding in result.blamed()}

    def ok(finding):
        return finding.ok and not wrong & {(finding.name, finding.rank), (finding.name, ALL)}

    loaded = [finding for finding in result.findings if finding.pass_name == WEIGHTS]
    steps = [finding for finding in result.findings if finding.pass_name != WEIGHTS]
    groups = weights.grouped(loaded, lambda finding: finding.step, lambda finding: finding.rank)
    number = {name: i for i, name in enumerate(passes)}
    cells = [_weight_cell(group) for group in groups]
    cells += [_cell(finding, number[finding.pass_name], ok(finding)) for finding in steps]
    return cells, next((i for i, cell in enumerate(cells) if not cell["ok"]), None)


def _weight_cell(group):
    """Return the cell of a tensor, or of all experts of a layer: of the first wrong one, if there is one."""
    wrong = [finding for finding in group if not finding.ok]
    shown = (wrong or group)[0]
    cell = _cell(shown, None, shown.ok) | {"step": weights.general_name(shown.step), "name": shown.step}
    if len(group) > 1:
        of_experts = f"{len(wrong) or 'none'} of the {counted(len(group), 'expert')} differ"
        cell["note"] = "; ".join(filter(None, (shown.note, of_experts))) if wrong else ""
    if not wrong:  # the slices are equal, so no element is the worst
        cell["worst"] = []
        cell["local"] = dict.fromkeys(("relative", "absolute", "bound", "absolute_bound"), 0.0)
    return cell


def _weights(result):
    found = [finding for finding in result.findings if finding.pass_name == WEIGHTS]
    wrong = sum(not finding.ok for finding in found)
    return f"{wrong} of {len(found)} slices wrong" if wrong else f"all {len(found)} slices exact"


def _cell(finding, pass_number, ok):
    local, total = finding.local, finding.total
    only_total = not ok and finding.ratio <= 1 and finding.unexplained
    return {
        "pass": pass_number,
        "layer": finding.layer,
        "step": finding.step,
        "rank": finding.rank,
        "kind": finding.kind,
        "ok": ok,
        "local": local and {**_error(local), "bound": finding.bounds[0], "absolute_bound": finding.bounds[1]},
        "total": total and {**_error(total), "bound": finding.total_bound},
        "worst": total.worst if only_total else local.worst if local else [],
        "note": finding.note,
    }


def _error(difference):
    entries = {"relative": difference.relative, "absolute": difference.absolute}
    if difference.worst:
        index, value, expected = difference.worst[0]
        entries |= {"index": list(index), "value": value, "expected": expected}
    return entries


def _plan(source, problems):
    """Return the plan as plain numbers, with a single entry for a tensor that every layer or expert has."""
    plan, config = source.plan, source.config
    tensors = {}
    for name, shard in plan.tensors.items():
        general = weights.general_name(name)
        entry = tensors.setdefault(general, {"name": general, "count": 0})
        entry["count"] += 1
        entry |= {"shape": list(shard.shape), "axis": shard.axis, "ranges": [list(r) for r in shard.ranges]}
        entry["replicated"] = shard.axis is None
    return {
        "tp": plan.tp,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "vocab": config.vocab_size,
        "head_ranges": plan.head_ranges,
        "kv_head_ranges": plan.kv_head_ranges,
        "ffn_ranges": plan.ffn_ranges,
        "vocab_ranges": plan.vocab_ranges,
        "tensors": list(tensors.values()),
        "wrong": [_wrong_part(rank, text) for rank, text in problems],
    }


def _wrong_part(rank, problem):
    """Return what a problem of the plan is about, as [part, rank or None]: a tensor, or "heads", "ffn", .."""
    tensor = re.match(r"tensor (\S+?):? ", problem)
    part = weights.general_name(tensor[1]) if tensor else problem.split()[0].rstrip(":")
    return [part, None if rank == ALL else rank]
