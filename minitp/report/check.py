"""The data of the page that `minitp check --report` writes."""

import re

from minitp.report.steps import explain
from minitp.trace.names import AFTER, BEFORE, BLOCK_TABLE, layer_steps
from minitp.util import this_run
from minitp.util.format import counted


def report_data(source, dtype, result, verdict, prompt=None, gpu=None):
    """Return the result of a check in the form that `report.page.render` expects.

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
    """
    plan = source.plan
    tokens = " ".join(map(str, result.sequences[0]))
    shown = [finding for finding in result.findings if finding.pass_name != "weights"]
    wrong = [f"{f.name}, rank {f.rank}: {f.note or f.local}" for f in result.findings if not f.ok]
    names = [pass_.name for pass_ in result.passes]
    return {
        "command": "check",
        "title": f"{source.name} on {counted(plan.tp, 'rank')}",
        "ok": result.ok,
        "verdict": verdict,
        "facts": [
            ["model", source.name],
            ["ranks", str(plan.tp)],
            ["dtype", dtype.name],
            *([["prompt", prompt]] if prompt is not None else []),
            ["token ids", tokens],
            ["weights", _weights(result)],
            *map(list, this_run.facts("check", plan.tp, gpu)),
        ],
        "problems": [
            *[f"plan, rank {rank}: {text}" for rank, text in result.problems],
            *[line for line in wrong if line.startswith("weights/")],
        ],
        "passes": names,
        "tp": plan.tp,
        "layers": plan.layers,
        "before": [*BEFORE, BLOCK_TABLE],
        "steps": list(layer_steps(plan)),
        "after": list(AFTER),
        "cells": [_cell(finding, names.index(finding.pass_name)) for finding in shown],
        "blamed": next((i for i, finding in enumerate(shown) if not finding.ok), None),
        "explained": explain([*BEFORE, *layer_steps(plan), *AFTER], source.config),
        "plan": _plan(source),
    }


def _weights(result):
    found = [finding for finding in result.findings if finding.pass_name == "weights"]
    wrong = sum(not finding.ok for finding in found)
    return f"{wrong} of {len(found)} slices wrong" if wrong else f"all {len(found)} slices exact"


def _cell(finding, pass_number):
    local = finding.local
    return {
        "pass": pass_number,
        "layer": finding.layer,
        "step": finding.step,
        "rank": finding.rank,
        "kind": finding.kind,
        "ok": finding.ok,
        "local": local and {**_error(local), "bound": finding.bounds[0], "absolute_bound": finding.bounds[1]},
        "total": finding.total and _error(finding.total),
        "worst": local.worst if local else [],
        "note": finding.note,
    }


def _error(difference):
    entries = {"relative": difference.relative, "absolute": difference.absolute}
    if difference.worst:
        index, value, expected = difference.worst[0]
        entries |= {"index": list(index), "value": value, "expected": expected}
    return entries


def _plan(source):
    """Return the plan as plain numbers, with a single entry for a tensor that every layer has."""
    plan, config = source.plan, source.config
    tensors = {}
    for name, shard in plan.tensors.items():
        general = re.sub(r"layers\.\d+\.", "layers.*.", name)
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
    }
