"""The data of the page that `minitp compare --report` writes."""

from pathlib import Path

from minitp.report import weights
from minitp.report.steps import explain
from minitp.trace.names import AFTER, BEFORE, LAYER, WEIGHTS, split_name
from minitp.util import this_run


def report_data(a_path, b_path, comparison, verdict, pictures=None):
    """Return the result of a comparison in the form that `report.page.render` expects.

    Parameters
    ----------
    a_path, b_path : str
        The paths of the two files.
    comparison : Comparison
    verdict : str
        The last line of the command's output.
    pictures : dict or None
        Pictures by the step's name in A, from `compare.picture.Pictures`.
    """
    tensors = _tensors(comparison.steps)
    groups = weights.grouped([step for step in comparison.steps if step.name in tensors], _tensor)
    shown = [_first_or_worst(group) for group in groups]
    names = [_tensor(step) for step in shown]
    cells = [_weight_cell(step, name) for step, name in zip(shown, names, strict=True)]
    steps = [step for step in comparison.steps if step.name not in tensors]
    places = [_place(step.name) for step in steps]  # (pass, layer, step) of each
    passes = list(dict.fromkeys(name for name, _, _ in places if name is not None)) or ["prefill"]
    foreign = [step for name, _, step in places if name is None]
    found = {step for _, _, step in places}
    layers = [layer for _, layer, _ in places] + [cell["layer"] for cell in cells]
    cells += [
        _cell(step, 0 if name is None else passes.index(name), layer, called)
        for step, (name, layer, called) in zip(steps, places, strict=True)
    ]
    shown += steps
    known = [step for step in BEFORE | LAYER | AFTER if step in found]
    first = next(iter(comparison.departing), None)
    pictures = pictures or {}
    return {
        "command": "compare",
        "title": _title(a_path, b_path),
        "ok": not comparison.departing,
        "verdict": verdict.removesuffix(f" ({first.note})") if first else verdict,
        "diagnosis": _without_layout(first) if first else "",
        "facts": [
            ["A, the reference", str(a_path)],
            ["B", str(b_path)],
            ["tolerance", f"{comparison.tolerance:g} {comparison.why}"],
            ["only in A", _listed(comparison.only_a)],
            ["only in B", _listed(comparison.only_b)],
            *map(list, this_run.facts("compare")),
        ],
        "problems": [],
        "warnings": [*comparison.left_out, *comparison.remarks],
        "passes": passes,
        "tp": None,
        "layers": max((layer for layer in layers if layer is not None), default=-1) + 1,
        "before": [*[step for step in BEFORE if step in found], *foreign],
        "steps": [step for step in LAYER if step in found],
        "after": [step for step in AFTER if step in found],
        "weights": weights.columns(names),
        "beside": weights.beside(names),
        "readers": weights.readers(names, found),
        "cells": cells,
        "compared": len(comparison.steps),
        "blamed": next((i for i, step in enumerate(shown) if step is first), None) if first else None,
        "explained": explain([*known, "weights"], per_rank=False),
        "pictures": {i: pictures[step.name] for i, step in enumerate(shown) if step.name in pictures},
        "plan": None,
    }


def _title(a_path, b_path):
    a, b = Path(a_path), Path(b_path)
    return f"{b.name} against {a.name}" if a.name != b.name else f"{b} against {a}"


def _listed(names):
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def _tensors(steps):
    """Return the names of the steps that are tensors with a place on the map."""
    found = {split_name(step.name)[2] for step in steps}
    names = {step.name: _tensor(step) for step in steps if step.name.startswith(WEIGHTS)}
    inside = {name for name, tensor in names.items() if weights.layer_of(tensor) is not None}
    if not inside or found.isdisjoint(LAYER):
        return inside
    beside = {tensor for step, tensor in weights.BESIDE.items() if step in found}
    return inside | {name for name, tensor in names.items() if tensor in beside}


def _tensor(step):
    return step.name.removeprefix(WEIGHTS)


def _first_or_worst(group):
    """Return the first differing step of the experts that share a cell, or the one with the largest error."""
    return next((step for step in group if step.departs), max(group, key=lambda step: step.relative))


def _weight_cell(step, name):
    cell = _cell(step, None, weights.layer_of(name), weights.general_name(name))
    return cell | {"name": name}


def _place(name):
    """Return (pass, layer, step) for a step name of minitp, and (None, None, name) for any other name."""
    pass_name, layer, step = split_name(name)
    if step in (LAYER if layer is not None else BEFORE | AFTER):
        return pass_name or "prefill", layer, step
    return None, None, name


def _without_layout(step):
    """Return the remarks about a step without the description of its layout."""
    return step.note.removeprefix(step.layout).removeprefix("; ")


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
