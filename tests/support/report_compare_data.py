"""Data for tests of the reports: invented results of `compare`."""

import random

from report_data import check_data, made_error


def compare_data(names, passes=("",), wrong=()):
    """Return the result of comparing two dumps without layers; the names in `wrong` differ."""
    rng = random.Random(1)
    cells = []
    for passed in range(len(passes)):
        for i, name in enumerate(names):
            relative = 0.4 if name in wrong else 10 ** rng.gauss(-6.2 + i / len(names), 0.3)
            cell = {"pass": passed, "layer": None, "step": name, "rank": None, "kind": ""}
            cell |= {"ok": name not in wrong, "local": None, "note": "", "worst": []}
            cells.append(cell | {"total": made_error(rng, relative, 1e-4)})
    blamed = next((i for i, cell in enumerate(cells) if not cell["ok"]), None)
    verdict = f"all {len(cells)} tensors are close"
    if blamed is not None:
        verdict = f"first that differs: {cells[blamed]['step']}"
    return {
        "command": "compare",
        "title": "mine.npz against theirs.safetensors",
        "ok": blamed is None,
        "verdict": verdict,
        "facts": [["A", "mine.npz"], ["B", "theirs.safetensors"], ["tolerance", "1e-4"]],
        "problems": [],
        "passes": list(passes),
        "tp": None,
        "layers": 0,
        "before": list(names),
        "steps": [],
        "after": [],
        "cells": cells,
        "blamed": blamed,
        "plan": None,
    }


def compare_layers_data(layers=12):
    """Return the result of comparing two traces in which some steps are missing."""
    data = check_data(tp=1, layers=layers, passes=2, fault=(1, min(7, layers - 1), "attn.k_rope", 0))
    left_out = ("attn.scores", "attn.probs", "attn.q_rope", "mlp.act", "logits_partial", "embed_partial")
    data["cells"] = [
        cell for cell in data["cells"] if cell["step"] not in left_out and cell["pass"] is not None
    ]
    for i, cell in enumerate(data["cells"]):
        bound = {"bound": 1e-3, "absolute_bound": 0.1}
        cell |= {"rank": None, "local": None, "total": cell["total"] | bound}
        cell["ok"] = cell["total"]["relative"] <= 1e-3
        if not cell["ok"] and data["blamed"] is not None:
            data |= {"blamed": None, "first": i}
    data["blamed"] = data.pop("first")
    verdict = f"first step that differs: decode.1/layers.{min(7, layers - 1)}.attn.k_rope"
    more = {"tp": None, "plan": None, "weights": [], "beside": {}, "readers": {}}
    return data | {"command": "compare", "title": "a against b", "verdict": verdict, **more}


def foreign_names(count=24):
    """Return names that another engine might use in its dumps."""
    return [
        "tok_embeddings.out",
        *(f"block{i // 3:02d}/{['qkv', 'o', 'ffn'][i % 3]}" for i in range(count)),
        "head",
    ]
