"""Data for tests of the reports: invented results of `check`."""

import random

from minitp.report import weights
from minitp.report.steps import explain
from minitp.trace import names as steps
from minitp.util.shares import split_evenly

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


def made_plan(tp, heads=9, kv_heads=3, ffn=1536, vocab=49152, head_dim=64, layers=30, experts=0):
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
    ]
    moe, mlp = "model.layers.*.block_sparse_moe", "model.layers.*.mlp"
    table += [(f"{moe}.gate.weight", layers, [experts, hidden], None, [])] if experts else []
    names = [f"{moe}.experts.*.w{n}" for n in (1, 3, 2)]
    if not experts:
        names = [f"{mlp}.{part}_proj" for part in ("gate", "up", "down")]
    table += [(f"{name}.weight", layers, [ffn, hidden], 0, ffn_ranges) for name in names[:2]]
    table += [(f"{names[2]}.weight", layers, [hidden, ffn], 1, ffn_ranges)]
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


def weight_cells(plan, spoilt=None):
    """Return the cells of a plan's tensors; `spoilt` is None, or a wrong one: (general name, layer, rank)."""
    cells = []
    for tensor in plan["tensors"]:
        layers = range(tensor["count"]) if "layers.*" in tensor["name"] else [None]
        for layer in layers:
            for rank in range(plan["tp"]):
                wrong = spoilt == (tensor["name"], layer, rank)
                error = {"relative": 0.0, "absolute": 0.0, "bound": 0.0, "absolute_bound": 0.0}
                if wrong:
                    error |= {"relative": 3.9e-5, "absolute": 4.7e-4, "index": [3, 28]}
                    error |= {"value": 0.469219, "expected": 0.46875}
                cell = {"pass": None, "layer": layer, "step": tensor["name"], "rank": rank, "kind": "sharded"}
                cell |= {"ok": not wrong, "local": error, "total": None, "worst": [], "note": ""}
                name = tensor["name"].replace("*", str(layer), 1).replace("*", "5")
                cells.append(cell | {"name": name})
    return cells


def spoilt_data(tensor="model.layers.*.mlp.down_proj.weight", layer=1, rank=1, **more):
    """Return the result of a check in which one tensor of one rank is wrong."""
    data = check_data(**{"layers": 3, "passes": 2, **more})
    weights = weight_cells(data["plan"], (tensor, layer, rank))
    data["cells"][: len(weights)] = weights
    data["blamed"] = next(i for i, cell in enumerate(weights) if not cell["ok"])
    verdict = f"first wrong step: weights/{weights[data['blamed']]['name']}, rank {rank}: it must be exact"
    return data | {"ok": False, "verdict": verdict}


def total_data():
    """Return the result of a check in which only total errors are out of bounds."""
    data = check_data(layers=3, passes=2)
    wrong = [cell for cell in data["cells"] if (cell["pass"], cell["layer"]) == (1, 2)]
    for cell in data["cells"]:
        if cell["total"]:
            cell["total"]["bound"] = 1e-5
    for cell in wrong:
        cell["total"] |= {"relative": 0.99}
        cell["ok"] = False
    data["blamed"] = data["cells"].index(wrong[0])
    verdict = "first wrong step: decode.1/layers.2.attn.norm, rank all: total error 0.99, allowed 1e-05"
    return data | {"ok": False, "verdict": verdict, "everywhere": True}


def check_data(tp=4, layers=30, passes=3, fault=None, **sizes):
    """Return the result of a check; `fault` is None or (pass, layer, step, rank) of a wrong step.

    `passes` is a number or a list of names.
    """
    rng = random.Random(0)
    plan = made_plan(tp, layers=layers, **sizes)
    names = passes
    if isinstance(passes, int):
        names = ["prefill", *(f"decode.{n}" for n in range(1, passes))]
    every = [(None, s) for s in steps.BEFORE]
    every += [(i, s) for i in range(layers) for s in steps.LAYER] + [(None, s) for s in steps.AFTER]
    cells, blamed = weight_cells(plan), None
    for passed in range(len(names)):
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
        "weights": weights.columns(tensor["name"] for tensor in plan["tensors"]),
        "beside": weights.beside([tensor["name"] for tensor in plan["tensors"]]),
        "readers": weights.readers(
            [tensor["name"] for tensor in plan["tensors"]], {*steps.BEFORE, *steps.LAYER, *steps.AFTER}
        ),
        "explained": explain([*steps.BEFORE, *steps.LAYER, *steps.AFTER, "weights"]),
        "plan": plan,
    }


def many_passes():
    """Return the names of the passes of a check with --batch."""
    batches = [f"batch.{n}.seq{i}" for n in range(1, 11) for i in range(3) if n % 4 or i]
    return ["prefill", "prefill.0", "prefill.1", "decode.1", "decode.2", *batches]


def plan_data():
    """Return the result of a check that ran nothing because the plan is wrong."""
    data = check_data(layers=2, passes=1) | {"ok": False, "cells": [], "blamed": None, "passes": []}
    plan = data["plan"]
    plan["ffn_ranges"] = [*plan["ffn_ranges"][:2], (770, 1152), *plan["ffn_ranges"][3:]]
    plan["wrong"] = [["ffn", 2], ["model.layers.*.mlp.up_proj.weight", 2]]
    plan["kv_head_ranges"] = [*plan["kv_head_ranges"][:2], (1, 2), *plan["kv_head_ranges"][3:]]
    verdict = "first wrong step: the plan, rank 2: ffn 770 to 1152, expected to begin at 768"
    problems = ["plan, rank 2: tensor model.layers.0.mlp.up_proj.weight: 768 to 1152, expected (770, 1152)"]
    return data | {"verdict": verdict, "problems": problems}
