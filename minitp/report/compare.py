"""The data of the page that `minitp compare --report` writes."""

from minitp.report.steps import explain
from minitp.trace.names import AFTER, BEFORE, LAYER, split_name
from minitp.util import this_run


def report_data(a_path, b_path, comparison, verdict):
    """Return the result of a comparison in the form that `report.page.render` expects.

    Parameters
    ----------
    a_path, b_path : str
        The paths of the two files.
    comparison : Comparison
    verdict : str
        The last line of the command's output.
    """
    places = [_place(step.name) for step in comparison.steps]  # (pass, layer, step) of each
    passes = list(dict.fromkeys(name for name, _, _ in places if name is not None)) or ["prefill"]
    foreign = [step for name, _, step in places if name is None]
    layers = [layer for _, layer, _ in places if layer is not None]
    found = {step for _, _, step in places}
    cells = [
        _cell(step, 0 if name is None else passes.index(name), layer, called)
        for step, (name, layer, called) in zip(comparison.steps, places, strict=True)
    ]
    return {
        "command": "compare",
        "title": f"{b_path} against {a_path}",
        "ok": not comparison.departing,
        "verdict": verdict,
        "facts": [
            ["A, the reference", str(a_path)],
            ["B", str(b_path)],
            ["tolerance", f"{comparison.tolerance:g} {comparison.why}"],
            ["only in A", str(len(comparison.only_a))],
            ["only in B", str(len(comparison.only_b))],
            *map(list, this_run.facts("compare")),
        ],
        "problems": list(comparison.remarks),
        "passes": passes,
        "tp": None,
        "layers": max(layers, default=-1) + 1,
        "before": [*[step for step in BEFORE if step in found], *foreign],
        "steps": [step for step in LAYER if step in found],
        "after": [step for step in AFTER if step in found],
        "cells": cells,
        "blamed": next((i for i, cell in enumerate(cells) if not cell["ok"]), None),
        "explained": explain(filter(found.__contains__, BEFORE | LAYER | AFTER), per_rank=False),
        "plan": None,
    }


def _place(name):
    """Return (pass, layer, step) for a step name of minitp, and (None, None, name) for any other name."""
    pass_name, layer, step = split_name(name)
    if step in (LAYER if layer is not None else BEFORE | AFTER):
        return pass_name or "prefill", layer, step
    return None, None, name


def _cell(step, pass_number, layer, called):
    farthest = {}  # an empty array has no farthest element
    if step.worst:
        farthest = {"index": list(step.index), "value": step.b_value, "expected": step.a_value}
    return {
        "pass": pass_number,
        "layer": layer,
        "step": called,
        "rank": None,
        "kind": None,
        "ok": not step.departs,
        "local": None,
        "total": {
            "relative": step.relative,
            "bound": step.tolerance,
            "absolute": step.absolute,
            **farthest,
        },
        "worst": [[list(index), b, a] for index, a, b in step.worst],
        "note": step.note,
    }
