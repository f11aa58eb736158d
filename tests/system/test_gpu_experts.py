"""Tests of mixtures of experts on the fused path, on the stand-in's GPUs."""

from dataclasses import replace

import numpy as np
import pytest
from on_gpu import model_on_gpu, run_on_gpus
from paths import GOLDENS
from tiny import write_tiny

from minitp.check.run import check_model
from minitp.cuda.kernels.expert_linear import ExpertLinear
from minitp.cuda.kernels.expert_sum import ExpertSum
from minitp.cuda.kernels.route import Route
from minitp.generate import prefill
from minitp.loading.source import open_model

pytestmark = pytest.mark.usefixtures("cupy")

GOLDEN = GOLDENS / "mixtral-window"  # 4 experts, 3 per token; 10 FFN columns
PROMPT = [3, 40, 60, 80, 15]


def check(tp, dtype, batch=0, directory=GOLDEN):
    """Return what `check` blames, and the names of all findings."""
    source = open_model(str(directory), tp)

    def rank(comm):
        model = model_on_gpu(directory, comm, dtype, path="fused")
        result = check_model(source, model, PROMPT, 2, batch)
        found = [(finding.name, finding.rank) for finding in result.blamed()]
        return found, {finding.name for finding in result.findings}

    return run_on_gpus(tp, rank)[0]


def test_check_passes_for_a_batch():
    blamed, steps = check(1, "float16", 3)
    assert blamed == []
    for name in ("prefill", "decode.2"):
        assert {f"{name}/layers.1.mlp.router", f"{name}/layers.1.mlp.experts"} <= steps


def test_check_passes_with_more_ranks_than_columns(tmp_path):
    mixtral = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 2}
    assert check(3, "bfloat16", directory=write_tiny(tmp_path, **mixtral))[0] == []


def test_check_passes_with_many_tokens_per_expert(monkeypatch):
    """Check the products of cuBLAS, expert by expert."""
    monkeypatch.setattr("minitp.cuda.experts.CUBLAS_ROWS", 0)
    assert check(2, "bfloat16")[0] == []


def replaced(kind, method, monkeypatch, number, change):
    """Make `kind.method` receive change(argument) instead of the argument with this number."""
    original = getattr(kind, method)

    def call(self, *args):
        return original(self, *args[:number], change(args[number]), *args[number + 1 :])

    monkeypatch.setattr(kind, method, call)


@pytest.mark.parametrize(
    ("kind", "method", "number", "change", "step"),
    [
        (Route, "__call__", 0, lambda router: -router, "experts"),
        (ExpertLinear, "swiglu", 1, lambda w: replace(w, offsets=w.offsets[::-1].copy()), "experts"),
        (ExpertLinear, "down", 1, lambda w: replace(w, offsets=w.offsets[::-1].copy()), "out_partial"),
        (ExpertSum, "__call__", 1, lambda r: replace(r, weights=r.weights * 1.1), "out_partial"),
    ],
)
def test_a_wrong_kernel_is_blamed(monkeypatch, kind, method, number, change, step):
    replaced(kind, method, monkeypatch, number, change)
    assert check(1, "bfloat16")[0][0] == (f"prefill/layers.0.mlp.{step}", 0)


def test_a_tokens_logits_do_not_depend_on_the_rest_of_the_batch():
    """Check the bits for batches of which some rows are padding."""

    def rank(comm):
        model = model_on_gpu(GOLDEN, comm, "bfloat16", path="fused")
        found = []
        for rows in ([0], [0, 1, 2], [4, 0, 3, 2, 1]):
            pool = model.new_pool(len(rows))
            parts = []
            for block, row in enumerate(rows):
                cache = model.new_cache(16)
                cache.pool, cache.block_table = pool, [block]
                prefill(model, cache, [row + 1, 7])
                parts.append(([PROMPT[row]], cache))
            logits = model.device.to_host(model.forward_batch(parts))
            found.append(logits[rows.index(0)])
            (graph,) = pool.graphs.values()
            chosen = model.device.to_host(graph.experts.routing.chosen)
            assert (chosen[: len(rows)] >= 0).all()
            assert (chosen[len(rows) :] == -1).all(), "padding must not read any expert"
        return found

    for first, *others in run_on_gpus(2, rank):
        for other in others:
            np.testing.assert_array_equal(other, first)
