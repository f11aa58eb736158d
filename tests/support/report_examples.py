"""Examples of reports; `python tests/support/report_examples.py DIRECTORY` writes a page of each."""

import sys
from pathlib import Path

from report_compare_data import compare_data, compare_layers_data, foreign_names
from report_data import check_data, many_passes, plan_data, spoilt_data, total_data

from minitp.report.page import write_report

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
    "spoilt": lambda: spoilt_data(),
    "mixture": lambda: spoilt_data(
        "model.layers.*.block_sparse_moe.experts.*.w2.weight", 20, 1, tp=2, layers=32, experts=8
    ),
    "total": lambda: total_data() | {"warnings": ["attn.q in layer 3 rounds more than once", "mlp.act too"]},
    "batch": lambda: check_data(
        tp=8, layers=16, passes=many_passes(), fault=(21, 3, "attn.k_cache", 6), heads=64, kv_heads=8
    ),
    "plan": lambda: plan_data(),
    "foreign": lambda: compare_data(foreign_names(), wrong=["block05/qkv", "block05/o", "block06/ffn"]),
    "compare": lambda: compare_layers_data(),
}

if __name__ == "__main__":
    for example, make in EXAMPLES.items():
        write_report(Path(sys.argv[1]) / f"{example}.html", make())
