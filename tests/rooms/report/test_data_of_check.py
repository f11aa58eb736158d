"""Tests of the data that `minitp check --report` writes: the cells, and what is wrong and blamed."""

from types import SimpleNamespace

import numpy as np
import pytest
from paths import GOLDENS

from minitp.check.difference import Difference, difference_of
from minitp.check.passes import RecordedPass
from minitp.check.result import CheckResult, Finding
from minitp.loading.source import open_model
from minitp.report.check import report_data
from minitp.report.page import render
from minitp.trace import names

EXACT = difference_of(np.zeros(3), np.zeros(3))
OFF = difference_of(np.array([0, 2.0, 1]), np.array([0, 2.5, 1]))


def found(pass_name, step, rank=0, layer=None, local=EXACT, **more):
    """Return a Finding; its bounds are 1e-3 unless `more` has others."""
    return Finding(pass_name, layer, step, rank, "sharded", local, **{"bounds": (1e-3, 1e-3), **more})


def weight(name, rank=0, layer=0, local=EXACT):
    return found("weights", name, rank, layer, local, bounds=(0.0, 0.0))


def data_of(*findings, model="mixtral", problems=(), passes=("prefill",), **more):
    """Return the data of a check with these findings, which must have places on the page."""
    source = open_model(str(GOLDENS / model), 2)
    recorded = [RecordedPass(name, 0, 0, 3) for name in passes]
    made = CheckResult(list(findings), list(problems), [[1, 2, 3]], recorded, 2, **more)
    data = report_data(source, np.dtype(np.float32), made, "the verdict")
    render(data)
    return data


def test_weights_are_cells_and_one_of_them_can_be_blamed():
    down = "model.layers.1.block_sparse_moe.gate.weight"
    fine = [weight("model.embed_tokens.weight", rank, None) for rank in (0, 1)]
    data = data_of(*fine, weight(down, 0, 1), weight(down, 1, 1, OFF), found("prefill", "attn.q", layer=0))
    blamed = data["cells"][data["blamed"]]
    assert (blamed["pass"], blamed["layer"], blamed["rank"], blamed["name"]) == (None, 1, 1, down)
    assert blamed["step"] == "model.layers.*.block_sparse_moe.gate.weight"
    assert blamed["step"] in data["weights"]
    assert blamed["worst"] == [((1,), 2.0, 2.5), ((0,), 0.0, 0.0), ((2,), 1.0, 1.0)]
    assert data["beside"]["embed_partial"] == "model.embed_tokens.weight"
    assert data["readers"][blamed["step"]] == "mlp.router"
    assert data["problems"] == []  # the verdict names it
    assert [cell["ok"] for cell in data["cells"]] == [True, True, True, False, True]


def test_the_experts_of_a_layer_share_a_cell():
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    experts = [weight(name.format(n), local=OFF if n in (1, 3) else EXACT) for n in range(4)]
    others = [weight(name.format(n), rank=1) for n in range(4)]
    data = data_of(*experts, *others)
    first, second = data["cells"]
    assert (first["name"], first["ok"]) == (name.format(1), False)  # the first wrong one
    assert first["note"] == "2 of the 4 experts differ"
    assert (second["ok"], second["note"]) == (True, "")
    assert data["compared"] == 8
    assert data["blamed"] == 0


def test_every_tensor_of_a_layer_has_a_reader_and_a_column():
    post_normed = "gemma2", "gemma3"
    for golden in (*post_normed, "mixtral", "qwen2", "qwen3", "qwen3-moe", "llama-bias", "phi3", "granite"):
        source = open_model(str(GOLDENS / golden), 2)
        data = data_of(model=golden)
        steps = {*names.BEFORE, *names.layer_steps(source.plan), *names.AFTER}
        for tensor in data["weights"]:
            assert data["readers"][tensor] in steps, (golden, tensor)
        after_attention = data["readers"]["model.layers.*.post_attention_layernorm.weight"]
        assert after_attention == ("attn.post_norm" if golden in post_normed else "mlp.norm")
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= {*data["beside"].values()}


def test_a_total_error_can_be_what_is_wrong():
    close = Difference(1e-9, 1e-9, [((0,), 1.0, 1.0)])
    findings = [
        found("prefill", "attn.q", 1, 0, total=EXACT, total_bound=1e-5),
        found("decode.1", "attn.q", 1, 0, local=close, total=OFF, total_bound=1e-5),
        found("decode.1", "attn.k", 1, 0, total=OFF, total_bound=1e-5),  # a consequence
        found("decode.1", "attn.v", 1, 0, total=OFF),
    ]
    data = data_of(*findings, passes=("prefill", "decode.1"))
    assert [cell["ok"] for cell in data["cells"]] == [True, False, True, True]
    assert data["blamed"] == 1
    cell = data["cells"][1]
    assert cell["total"]["bound"] == 1e-5
    assert cell["worst"] == OFF.worst  # of the error that is out of bounds
    assert data["cells"][3]["total"]["bound"] is None
    local = found("prefill", "attn.q", 0, 0, OFF)  # explains them all
    assert [cell["ok"] for cell in data_of(local, *findings[1:])["cells"]] == [False, True, True, True]


def test_warnings_are_listed():
    assert data_of()["warnings"] == []
    assert data_of(warnings=["mlp.act rounds more than once"])["warnings"] == [
        "mlp.act rounds more than once"
    ]


def test_a_collective_is_blamed_on_all_ranks():
    findings = [found("prefill", "attn.out", rank, 0, OFF) for rank in (0, 1)]
    assert data_of(*findings)["everywhere"]
    assert not data_of(findings[0], found("prefill", "attn.out", 1, 0))["everywhere"]


def test_passes_and_steps_that_the_tables_lack_have_places():
    findings = [
        found("prefill", "embed"),
        found("batch.2.seq1", "block_table"),
        found("batch.2.seq1", "embed"),
    ]
    data = data_of(*findings)
    assert data["passes"] == ["prefill", "batch.2.seq1"]
    assert data["before"][0] == "block_table"
    assert data["explained"]["block_table"][0] == "[B]"
    assert [cell["pass"] for cell in data["cells"]] == [0, 1, 1]


@pytest.mark.parametrize(
    ("rank", "problem", "part"),
    [
        (1, "ffn 38 to 80, expected to begin at 40", ["ffn", 1]),
        ("all", "heads: 3 ranges for 2 ranks", ["heads", None]),
        (
            0,
            "tensor model.layers.1.mlp.x.weight: 0 to 3, expected (0, 4)",
            ["model.layers.*.mlp.x.weight", 0],
        ),
        ("all", "tensor lm_head.weight is not in the plan", ["lm_head.weight", None]),
    ],
)
def test_a_wrong_plan_is_located(rank, problem, part):
    data = data_of(problems=[(rank, problem), (1, "another one")])
    assert data["plan"]["wrong"][0] == part
    assert data["problems"] == ["plan, rank 1: another one"]  # the verdict has the first one
    assert data["blamed"] is None


def test_the_facts_of_a_run_on_several_ranks_repeat_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["minitp", "check", "Hello", "--model", "m"])
    facts = dict(data_of()["facts"])
    assert facts["command"] == "minitp check Hello --model m --tp 2"
    assert facts["ranks"] == "2"
    assert {"machine", "minitp", "date"} <= facts.keys()


def test_many_cells_are_packed_without_the_worst_elements_of_those_within_bounds(monkeypatch):
    monkeypatch.setattr("minitp.report.page.MANY", 3)
    finding = found("prefill", "attn.q", layer=0, local=OFF, bounds=(9.0, 9.0))
    wrong = found("prefill", "attn.k", layer=0, local=OFF)
    few, many = (SimpleNamespace(text=render(data_of(*[finding] * n, wrong))) for n in (1, 3))
    element, index = "[[1],2,2.5]", ",[1]]"
    assert few.text.count(element) == 2
    assert many.text.count(element) == 1
    assert many.text.count(index) == 1
