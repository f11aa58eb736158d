"""Data for tests of the reports: invented results of `check` and `compare`.

`python tests/support/report_data.py DIRECTORY` writes a page of each.
"""

import random
import sys
from pathlib import Path

from minitp.report.page import write_report
from minitp.report.steps import explain
from minitp.shard import split_evenly
from minitp.trace import names as steps

HOSTILE = (
    "</script><img src=x onerror=\"document.title='broken'\"><!-- <script> ' \" & \u2028 \u2029 "
    "\ud800 \u202e\u05d0\u05d1\u05d2 \x00\x1b \\ @@data@@ @@verdict@@"
)


def kind_of(step):
    """Return the kind of a step as in minitp.trace.names, without a plan."""
    if step in steps.PARTIAL:
        return "partial"
    letters = (steps.BEFORE | steps.LAYER | steps.AFTER)[step].split()
    return (
        "sharded"
        if step != "logits" and any(x in ("H", "K", "Hd", "F", "V") for x in letters)
        else "replicated"
    )


def made_error(rng, relative, bound=None):
    """Return a report's entries for one error, with one element that has this error."""
    expected = rng.gauss(0, 1)
    error = {
        "relative": relative,
        "absolute": relative * 3,
        "index": [0, rng.randrange(5), rng.randrange(64)],
    }
    error |= {"value": expected * (1 + relative), "expected": expected}
    return error if bound is None else error | {"bound": bound, "absolute_bound": bound * 30}


def made_plan(tp, heads=9, kv_heads=3, ffn=1536, vocab=49152, head_dim=64, layers=30):
    """Return the plan of a model in plain numbers."""
    head_ranges = split_evenly(heads, tp)
    group = heads // kv_heads
    kv_ranges = [(start // group, (stop - 1) // group + 1) for start, stop in head_ranges]
    hidden, ffn_ranges, vocab_ranges = heads * head_dim, split_evenly(ffn, tp), split_evenly(vocab, tp)
    wide = [(a * head_dim, b * head_dim) for a, b in head_ranges]
    narrow = [(a * head_dim, b * head_dim) for a, b in kv_ranges]
    table = [
        ("model.embed_tokens.weight", 1, [vocab, hidden], 0, vocab_ranges),
        ("model.norm.weight", 1, [hidden], None, []),
        ("model.layers.*.input_layernorm.weight", layers, [hidden], None, []),
        ("model.layers.*.self_attn.q_proj.weight", layers, [hidden, hidden], 0, wide),
        ("model.layers.*.self_attn.k_proj.weight", layers, [kv_heads * head_dim, hidden], 0, narrow),
        ("model.layers.*.self_attn.v_proj.weight", layers, [kv_heads * head_dim, hidden], 0, narrow),
        ("model.layers.*.self_attn.o_proj.weight", layers, [hidden, hidden], 1, wide),
        ("model.layers.*.post_attention_layernorm.weight", layers, [hidden], None, []),
        ("model.layers.*.mlp.gate_proj.weight", layers, [ffn, hidden], 0, ffn_ranges),
        ("model.layers.*.mlp.up_proj.weight", layers, [ffn, hidden], 0, ffn_ranges),
        ("model.layers.*.mlp.down_proj.weight", layers, [hidden, ffn], 1, ffn_ranges),
    ]
    held = [0] * tp
    tensors = []
    for name, count, shape, axis, ranges in table:
        tensors.append({"name": name, "count": count, "shape": shape, "axis": axis, "ranges": ranges})
        tensors[-1]["replicated"] = axis is None
        for rank in range(tp):
            part = [n if a != axis else ranges[rank][1] - ranges[rank][0] for a, n in enumerate(shape)]
            held[rank] += 4 * count * (part[0] * part[1] if len(part) == 2 else part[0])
    return {
        "tp": tp,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_ranges": head_ranges,
        "kv_head_ranges": kv_ranges,
        "ffn": ffn,
        "ffn_ranges": ffn_ranges,
        "vocab": vocab,
        "vocab_ranges": vocab_ranges,
        "head_dim": head_dim,
        "hidden": hidden,
        "tensors": tensors,
        "bytes_per_rank": held,
    }


def check_data(tp=4, layers=30, passes=3, fault=None, **sizes):
    """Return the result of a check; `fault` is None or (pass, layer, step, rank) of a wrong step."""
    rng = random.Random(0)
    every = [(None, s) for s in steps.BEFORE]
    every += [(i, s) for i in range(layers) for s in steps.LAYER] + [(None, s) for s in steps.AFTER]
    cells, blamed = [], None
    for passed in range(passes):
        grown = 2e-8  # the total error so far
        for layer, step in every:
            wrong = fault is not None and fault[:3] == (passed, layer, step)
            grown = min(0.9, grown * 10 ** rng.uniform(0, 4 / (len(every) + 90))) if not wrong else 0.13
            if fault is not None and passed > fault[0]:
                grown = max(grown, 0.2)
            exact = step in ("embed", "attn.out", "mlp.out", "attn.v_cache", "logits")
            for rank in range(tp):
                bound = 0.0 if exact else 4e-7
                local = made_error(rng, 0.0 if exact else bound * 10 ** rng.gauss(-1.4, 0.35), bound)
                here = wrong and rank == fault[3]
                if here:
                    local, blamed = made_error(rng, 0.31, bound), len(cells)
                cell = {"pass": passed, "layer": layer, "step": step, "rank": rank, "kind": kind_of(step)}
                cell |= {"ok": not here, "local": local, "note": ""}
                cell["total"] = made_error(rng, grown * rng.uniform(0.8, 1.25))
                worst = local if here else cell["total"]
                cell["worst"] = [[worst["index"], worst["value"], worst["expected"]]]
                cell["worst"] += [[[0, 1, i], rng.gauss(0, 1), rng.gauss(0, 1)] for i in range(2)]
                cells.append(cell)
    names = ["prefill", *(f"decode.{n}" for n in range(1, passes))]
    verdict = f"all {len(cells):,} steps within their bounds".replace(",", " ")
    if fault is not None:
        cells[blamed]["note"] = "position 3 holds what position 2 should: the cache is written one place late"
        where = fault[2] if fault[1] is None else f"layers.{fault[1]}.{fault[2]}"
        verdict = (
            f"first wrong step: {names[fault[0]]}/{where} on rank {fault[3]}: 0.31 where 4e-7 is the bound"
        )
    return {
        "command": "check",
        "title": f"smollm2 on {tp} ranks",
        "ok": fault is None,
        "verdict": verdict,
        "facts": [
            *(
                ["model", "smollm2"],
                ["ranks", str(tp)],
                ["dtype", "float32"],
                ["device", "cpu"],
                ["comm", "mpi"],
            ),
            *(["prompt", "The capital of France is"], ["token ids", "504 3575 282 4649 314"]),
            ["command", f"minitp check 'The capital of France is' --tp {tp} --report check.html"],
            ["machine", "AMD EPYC 7B13, 8 cores, Linux x86_64"],
            *(["minitp", "0.1.0"], ["date", "2026-11-28"]),
        ],
        "problems": [],
        "passes": names,
        "tp": tp,
        "layers": layers,
        "before": list(steps.BEFORE),
        "steps": list(steps.LAYER),
        "after": list(steps.AFTER),
        "cells": cells,
        "blamed": blamed,
        "explained": explain([*steps.BEFORE, *steps.LAYER, *steps.AFTER]),
        "plan": made_plan(tp, layers=layers, **sizes),
    }


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
    data["cells"] = [cell for cell in data["cells"] if cell["step"] not in left_out]
    for i, cell in enumerate(data["cells"]):
        bound = {"bound": 1e-3, "absolute_bound": 0.1}
        cell |= {"rank": None, "local": None, "total": cell["total"] | bound}
        cell["ok"] = cell["total"]["relative"] <= 1e-3
        if not cell["ok"] and data["blamed"] is not None:
            data |= {"blamed": None, "first": i}
    data["blamed"] = data.pop("first")
    verdict = f"first step that differs: decode.1/layers.{min(7, layers - 1)}.attn.k_rope"
    return data | {"command": "compare", "title": "a against b", "verdict": verdict, "tp": None, "plan": None}


def foreign_names(count=24):
    """Return names that another engine might use in its dumps."""
    return [
        "tok_embeddings.out",
        *(f"block{i // 3:02d}/{['qkv', 'o', 'ffn'][i % 3]}" for i in range(count)),
        "head",
    ]


EXAMPLES = {
    "ok": lambda: check_data(),
    "failing": lambda: check_data(fault=(1, 3, "attn.k_cache", 2)),
    "one": lambda: check_data(tp=1),
    "nine": lambda: check_data(tp=9, fault=(0, 12, "mlp.act", 7)),
    "large": lambda: check_data(
        tp=8,
        layers=80,
        fault=(2, 47, "mlp.gate", 5),
        heads=64,
        kv_heads=8,
        ffn=28672,
        vocab=128256,
        head_dim=128,
    ),
    "foreign": lambda: compare_data(foreign_names(), wrong=["block05/qkv", "block05/o", "block06/ffn"]),
    "compare": lambda: compare_layers_data(),
}

if __name__ == "__main__":
    for example, make in EXAMPLES.items():
        write_report(Path(sys.argv[1]) / f"{example}.html", make())
