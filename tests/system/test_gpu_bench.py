"""Tests that the figures of `minitp bench --device cuda` agree with the shapes, on the stand-in for CuPy."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from on_gpu import ENVIRONMENT, model_on_gpu, run_on_gpus

from minitp.bench.gpu_profile import gpu_profile
from minitp.bench.gpu_roofline import GpuRoofline
from minitp.bench.measure import measure
from minitp.bench.table import lines
from minitp.cli.bench import Job
from minitp.comm.single import ShardOnly
from minitp.cuda.comm import LocalComm
from minitp.launch.transport import select_comm
from minitp.loading.source import open_model

MATRICES = 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48)  # elements of both layers of the tiny model
LM_HEAD = 258 * 32
POSITION = 2 * 2 * 2 * 8  # elements of the cache per position: layers, k and v, KV heads, head_dim


def bench(*argv):
    """Run `minitp bench --json` in separate processes and return its result."""
    command = [sys.executable, "-m", "minitp", "bench", "--json", "--device", "cuda", *map(str, argv)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **ENVIRONMENT}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", [{}, {"requests": 2}, {"sweep": "context", "points": (8, 20)}])
def test_graphs_are_captured_before_the_first_round(tiny, cupy, monkeypatch, kind):
    """Check that no capture of a decode pass is timed, even if the new tokens need more blocks.

    The points of a sweep have prompts of several sizes. A prompt is captured while the GPU computes it.
    """
    from minitp.cuda.decode_graph import DecodeGraph

    captured, capture, rounds = [], DecodeGraph._captured, []
    monkeypatch.setattr(DecodeGraph, "_captured", lambda graph: captured.append(graph) or capture(graph))
    monkeypatch.setattr("minitp.cuda.fused.KEPT_BLOCKS", 1)
    job = Job(prompt_tokens=20, new_tokens=20, rounds=2, profile=False, **{"sweep": None, **kind})

    def progress(words):
        if "round" in words:
            rounds.append(len(captured))

    def rank(comm):
        model, source = model_on_gpu(tiny, comm), open_model(str(tiny), 1)
        measure(
            model, source, job, 1.0, lambda words: "round" in words and rounds.append(len(captured)), print
        )

    run_on_gpus(1, rank)
    assert len(rounds) >= 2
    assert rounds[0] > 0
    assert {len(captured)} == set(rounds)


@pytest.mark.mpi
@pytest.mark.parametrize(("tp", "transport", "dtype"), [(1, "auto", "bfloat16"), (2, "peer", "float16")])
def test_figures_agree_with_the_shapes(tiny, tp, transport, dtype):
    result = bench(
        *("--model", tiny, "--tp", tp, "--comm", transport, "--dtype", dtype),
        *("--rounds", 2, "--prompt-tokens", 20, "-n", 8, "--profile"),
    )
    assert (result["device"], result["machine"], result["tp"]) == ("cuda", "a stand-in for a GPU", tp)
    assert result["as_rank"] is None
    limits, decode, prefill = result["limits"], result["decode"], result["prefill"]
    assert limits["bytes_per_token"] == 2 * (MATRICES + LM_HEAD)
    assert limits["bandwidth_gb_per_s"] == limits["read_gb_per_s"] > 0
    assert limits["copy_gb_per_s"] > 0
    assert limits["matrix_rows"] == 20
    sizes = [one["bytes"] for one in limits["all_reduce"]]
    assert sizes == ([] if tp == 1 else [4, 64, 4096, 65536, 1 << 20])
    assert decode["bytes_per_token"] == 2 * (MATRICES + LM_HEAD + POSITION * 24)
    gigabytes = decode["bytes_per_token"] * decode["tokens_per_s"]["median"] / 1e9
    assert decode["gb_per_s"]["median"] == pytest.approx(gigabytes)
    for what in ("read", "copy"):
        share = decode["gb_per_s"]["median"] / limits[f"{what}_gb_per_s"]
        assert decode[f"share_of_{what.replace('read', 'reads')}"]["median"] == pytest.approx(share)
    flops = 2 * (20 * MATRICES + LM_HEAD)
    rate = flops / prefill["ttft_s"]["max"] / limits["matrix_gflop_per_s"] / 1e9
    assert prefill["share_of_matrix_rate"]["min"] == pytest.approx(rate)
    for name in ("device_bytes_per_rank", "device_peak_bytes_per_rank"):
        held = result["memory"][name]
        assert len(held) == tp
        assert all(n > weights for n, weights in zip(held, result["weight_bytes_per_rank"], strict=True))
    assert result["loading"]["file_gb_per_s"] > 0
    text = "\n".join(lines(result))
    for words in ("of the memory's speed", "linear swiglu", "as one graph", "on the GPU"):
        assert words in text


@pytest.mark.parametrize(("rank", "dtype"), [(0, "float16"), (2, "float16"), (1, "float32")])
def test_one_rank_alone(tiny, rank, dtype):
    result = bench(
        *("--model", tiny, "--as-rank", rank, "--of", 3, "--dtype", dtype),
        *("--rounds", 1, "--prompt-tokens", 4, "-n", 4),
    )
    assert (result["tp"], result["as_rank"], result["comm"]) == (3, rank, "LocalComm")
    source = open_model(str(tiny), 3)
    elements = sum(np.prod(shard.shape_on(rank)) for shard in source.plan.tensors.values())
    assert result["weight_bytes_per_rank"] == [np.dtype(dtype).itemsize * elements]
    assert result["limits"]["all_reduce"] == []
    assert result["decode"]["all_reduce_share_per_rank"] == [0.0]


def test_concurrent_requests(tiny):
    result = bench(
        "--model", tiny, "--tp", 1, "--requests", 3, "--prompt-tokens", 9, "-n", 7, "--rounds", 1
    )  # fmt: skip
    assert (result["requests"]["count"], result["requests"]["steps"]) == (3, 7)
    assert "for the same batches" in "\n".join(lines(result))


@pytest.mark.parametrize("over", ["batch", "context"])
def test_a_sweep(tiny, over):
    more = ["--max-context", 80] if over == "context" else ["--prompt-tokens", 8]
    result = bench("--model", tiny, "--tp", 1, "--sweep", over, "-n", 8, "--rounds", 1, *more)
    points = result["sweep"]["points"]
    assert [p[over] for p in points] == ([32, 64, 72] if over == "context" else [1, 2, 4, 8, 16, 32])
    assert all(p["tokens_per_s"] > 0 and p["limit_tokens_per_s"] > 0 for p in points)


def test_a_profile_of_the_explicit_path_is_rejected(tiny):
    command = [sys.executable, "-m", "minitp", "bench", "--model", tiny, "--tp", "1", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--profile"],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 2
    assert "--profile needs the fused path" in done.stderr


def test_the_limit_is_the_longer_of_reading_and_computing(cupy, tiny):
    limits = GpuRoofline(model_on_gpu(tiny, select_comm(ShardOnly(0, 1), "cuda")))
    limits.reads, limits.rate = 1e9, 1e30
    token = 2 * (MATRICES + LM_HEAD + 10 * POSITION)
    prompt = 2 * (MATRICES + 16 * POSITION)  # without logits
    passes = [([(1, 10)], 1), ([(16, 16)], 0)]
    assert limits.seconds(passes) == pytest.approx((token + prompt) / 1e9)
    limits.reads, limits.rate = 1e30, 1e9
    assert limits.seconds(passes) == pytest.approx(2 * (17 * MATRICES + LM_HEAD) / 1e9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_has_every_launch(cupy, tiny, ranks):
    """Check the launches of a decode pass of two layers, and the bytes of the weights and the cache."""
    found = run_on_gpus(ranks, lambda comm: gpu_profile(model_on_gpu(tiny, comm), keys=24))
    assert all(one == found[0] for one in found)
    kernels = {one["name"]: one for one in found[0]["kernels"]}
    counts = {name: one["count"] for name, one in kernels.items()}
    common = {"begin_decode": 1, "sample": 1, "end_decode": 1, "linear logits": 1}
    common |= dict.fromkeys(["linear qkv", "attention_decode", "linear swiglu"], 2)
    if ranks == 1:
        assert counts == common | {"linear residual": 4}
    else:
        joins = {"all-reduce": 5, "rms_norm": 5, "all-gather": 1, "join_columns": 1}
        assert counts == common | joins | {"linear store": 4}
    assert found[0]["launches"] == sum(counts.values())
    weights = sum(one["bytes"] for name, one in kernels.items() if name.startswith("linear"))
    assert weights == 2 * (MATRICES + LM_HEAD) // ranks
    assert kernels["attention_decode"]["bytes"] == 2 * POSITION * 24 // ranks


def test_the_shard_of_a_single_rank_needs_no_other_ranks(cupy):
    assert isinstance(select_comm(ShardOnly(0, 4), "cuda"), LocalComm)
