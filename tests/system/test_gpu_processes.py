"""Tests of ranks as processes on GPUs, on the stand-in for CuPy: how they start, fail and end."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from on_gpu import ENVIRONMENT
from refusal import check_refusal
from running import (
    END_S,
    FAULTY_WORKER,
    START_S,
    WORKER,
    Running,
    faulty,
    under_launcher,
    under_mpirun,
)
from safetensors.numpy import load_file, save_file
from served import Served
from tiny import UNEVEN, write_tiny

from minitp import LLM, SamplingParams
from minitp.cli import main as cli
from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.errors import InputError
from minitp.generate import generate
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request

pytestmark = pytest.mark.mpi

SHAPE = UNEVEN | {"vocab_size": 258, "hidden_size": 40, "head_dim": 8, "num_hidden_layers": 1}
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A float16 model whose best logits stand out enough for all paths to choose the same tokens."""
    directory = write_tiny(tmp_path_factory.mktemp("models") / "model", **SHAPE)
    path = directory / "model.safetensors"
    save_file({key: x.astype(np.float16) for key, x in load_file(path).items()}, path)
    return directory


@pytest.fixture(scope="module")
def expected(model):
    """The model's tokens after "Hello", through the explicit path on a CPU."""
    return on_cpu(model, "Hello", max_new_tokens=NEW)


def on_cpu(model, prompt, **params):
    source = open_model(str(model), 1)
    ids = source.tokenizer().encode(prompt)
    request = Request(SamplingParams(**params), (), ids, 100, source.tokenizer())
    return list(generate(load_model(source, SingleRank(), open_device("float16")), ids, request))


def hello(model, *options):
    argv = ["generate", "Hello", "--model", model, "-n", NEW]
    return [*argv, "--device", "cuda", "--dtype", "float16", *options]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The arguments of a run that prints tokens for minutes."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    write_tiny(directory, tokenizer=False, **SHAPE | {"max_position_embeddings": 20_000})
    argv = ["generate", "--tokens", "1,2,3", "--model", directory, "-n", 19_000, "--ignore-eos"]
    return [*argv, "--device", "cuda", "--dtype", "float16"]


# --- successful runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "ranks", "transport"),
    [
        (under_launcher, 1, "auto"),
        (under_launcher, 4, "auto"),
        (under_launcher, 2, "shm"),
        (under_mpirun, 2, "mpi"),
        (under_mpirun, 3, "nccl"),
    ],
)
def test_the_same_tokens(model, expected, start, ranks, transport):
    argv = hello(model, "--comm", transport, "--json", "--stats")
    code, out, err = start(argv, ranks, **ENVIRONMENT).end(START_S)
    assert code == 0, err
    result = json.loads(out)
    assert result["token_ids"] == expected
    assert (result["stats"]["tp"], result["stats"]["dtype"]) == (ranks, "float16")
    assert re.match(rf"{ranks} ranks?, float16, ", err)
    assert err.count("\n") == 3
    used = result["stats"]["transport"]
    if transport == "auto" and ranks > 1:
        assert list(used["all_reduce_us"]) == ["peer", "nccl", "shm"]
        assert used["name"] in used["all_reduce_us"]
    else:
        assert (used["name"], used["all_reduce_us"]) == (None if ranks == 1 else transport, {})
    if used["name"] is not None:
        assert f"of the time in collectives through {used['name']}\n" in err


def test_check(model):
    argv = ["check", "Hello", "--model", model, "--device", "cuda", "--path", "fused"]
    code, out, err = under_launcher(argv, 3, **ENVIRONMENT).end(START_S)
    assert (code, err) == (0, "")
    assert re.search(r"\nall steps within bounds for the 1 layer \(\d+ arrays on \d ranks?\)\n$", out)


def test_llm(model, expected, monkeypatch):
    """Check several prompts at once, and a sampled one."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    for folder in ENVIRONMENT["PYTHONPATH"].split(os.pathsep):
        monkeypatch.syspath_prepend(folder)
    drawn = {"max_new_tokens": 6, "temperature": 0.9, "seed": 3}
    with LLM(str(model), tp=2, device="cuda", dtype="float16", cache_tokens=256) as llm:
        assert llm.description["dtype"] == "float16"
        found = llm.generate(["Hello", "Good", "Hello"], max_new_tokens=NEW)
        sampled = llm.generate("Hello", **drawn)
        assert [one["comm_seconds"] for one in llm.ranks] == [None, None]  # the host only launches them
    good = on_cpu(model, "Good", max_new_tokens=NEW)
    assert [result.token_ids for result in found] == [expected, good, expected]
    assert sampled.token_ids == on_cpu(model, "Hello", **drawn)


@pytest.mark.parametrize(("transport", "start"), [("nccl", under_mpirun), ("auto", under_launcher)])
def test_replicas_have_their_own_gpus_and_nccl(model, transport, start):
    argv = ["check", "Hello", "--model", model, "--device", "cuda", "--path", "fused", "--comm", transport]
    ranks = 4 if start is under_mpirun else 2
    code, out, err = start([*argv, "--replicas", 2], ranks, **ENVIRONMENT, STAND_IN_GPUS="4").end(START_S)
    assert (code, err) == (0, "")
    assert re.search(r"on 2 ranks\); 2 replicas with the same bits\n$", out)
    code, _, err = start([*argv, "--replicas", 2], ranks, **ENVIRONMENT, STAND_IN_GPUS="3").end(START_S)
    assert code == 2
    assert err.startswith("minitp: --device cuda: rank 3 of this host has no GPU: there are only 3; ")


def test_llm_of_replicas(model, expected, monkeypatch):
    """Start each replica as a job of its own: the second one uses the GPUs after those of the first."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    monkeypatch.setenv("STAND_IN_GPUS", "4")
    for folder in ENVIRONMENT["PYTHONPATH"].split(os.pathsep):
        monkeypatch.syspath_prepend(folder)
    options = {"tp": 2, "replicas": 2, "device": "cuda", "dtype": "float16", "cache_tokens": 256}
    with LLM(str(model), **options) as llm:
        found = llm.generate(["Hello", "Hello"], max_new_tokens=NEW)
    assert [result.token_ids for result in found] == [expected] * 2
    monkeypatch.setenv("STAND_IN_GPUS", "3")
    with pytest.raises(InputError, match="rank 3 of this host has no GPU: there are only 3"):
        LLM(str(model), **options)


def test_serve(model, expected):
    served = Served(
        model, "--device", "cuda", "--dtype", "float16", "--tp", 2, "--cache-tokens", 256, **ENVIRONMENT
    )
    answer = served.client().completions.create(model="model", prompt="Hello", max_tokens=NEW, temperature=0)
    assert answer.choices[0].text == open_model(str(model), 1).tokenizer().decode(expected)
    served.stop()


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [under_launcher, under_mpirun])
def test_more_ranks_than_gpus(model, start):
    check_refusal_of(
        start(hello(model), 3, **ENVIRONMENT, STAND_IN_GPUS="2"),
        "--device cuda: rank 2 of this host has no GPU: there are only 2; use at most 2 ranks on "
        "this host, or --share-gpu (results are correct but slow), or --device cpu",
    )


def check_refusal_of(running, message):
    code, out, err = running.end(START_S)
    check_refusal(code, out, err)
    assert err == f"minitp: {message}\n"


def test_ranks_that_share_a_gpu(model, expected):
    argv = hello(model, "--json", "--share-gpu")
    code, out, err = under_launcher(argv, 2, **ENVIRONMENT, STAND_IN_GPUS="1").end(START_S)
    assert (code, err) == (0, "minitp: warning: several ranks share a GPU: results are correct but slow\n")
    assert json.loads(out)["token_ids"] == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_gpu(model, ranks):
    code, out, err = under_launcher(hello(model), ranks, **ENVIRONMENT, STAND_IN_GPUS="0").end(START_S)
    assert (code, out) == (3, "")
    assert err == (
        "minitp: rank 0 failed: --device cuda: CUDA finds no GPU; nvidia-smi shows what the driver sees\n"
    )


@pytest.fixture
def without_cupy(tmp_path):
    """The environment of processes that cannot import CuPy, even if it is installed."""
    (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError(\"No module named 'cupy'\")\n")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_cupy(model, without_cupy, ranks):
    """The launcher finds a CuPy that the ranks cannot import."""
    code, out, err = under_launcher(hello(model), ranks, **without_cupy).end(START_S)
    assert (code, out) == (2, "")
    assert err.startswith("minitp: --device cuda needs CuPy: pip install 'minitp[cuda12]' (or ")
    assert err.count("\n") == 1


def test_auto_uses_the_cpu_without_a_gpu(model, without_cupy):
    argv = ["generate", "Hello", "--model", model, "-n", 2, "--json"]
    code, out, err = under_launcher(argv, 1, **without_cupy).end(START_S)
    assert (code, err) == (0, "")
    assert json.loads(out)["stats"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--comm", "nccl"], "--comm nccl needs GPUs; omit it, or add --device cuda"),
        (["--comm", "peer"], "--comm peer needs GPUs; omit it, or add --device cuda"),
        (["--share-gpu"], "--share-gpu needs GPUs; omit it, or add --device cuda"),
    ],
)
def test_options_for_gpus_are_rejected_on_a_cpu(model, capsys, options, message):
    argv = ["generate", "Hello", "--model", model, "--device", "cpu", "--tp", 1, *options]
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    check_refusal(code, out, err)
    assert err == f"minitp: {message}\n"


def test_a_model_without_a_fused_path_is_rejected(model):
    argv = ["check", "Hello", "--model", model, "--device", "cuda", "--path", "fused", "--dtype", "float32"]
    check_refusal_of(
        under_launcher(argv, 2, **ENVIRONMENT),
        "--path fused: its kernels compute in 16 bits, not in float32; use --path explicit",
    )


# --- failures -------------------------------------------------------------------------------------------


def pid_of(running, rank):
    """Return the process id of a rank."""
    for pid, command in running.processes().items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"PMI_RANK={rank}".encode() in variables and "generate" in command:
            return pid
    return pytest.fail(f"no process of rank {rank}")


def test_a_rank_is_killed(endless):
    running = under_launcher(endless, 3, **ENVIRONMENT)
    running.wait_for_output()
    os.kill(pid_of(running, 1), signal.SIGKILL)
    code, _, err = running.end(END_S)
    assert code == 3
    assert re.fullmatch(r"minitp: rank 1 \(pid \d+\) died: killed, out of memory, or crashed\n", err)


def test_a_rank_is_stuck(endless):
    """Check that the watchdog of one of the other ranks reports it; any of them may be first."""
    running = under_launcher([*endless, "--comm", "nccl"], 3, **ENVIRONMENT, **faulty("stick launch 2"))
    running.wait_for_output()
    code, _, err = running.end(END_S)
    assert code == 3
    assert re.fullmatch(
        r"minitp: rank [01] failed: stuck in a collective for 1 s: rank 2 did not arrive\n", err
    )


def test_a_rank_raises(endless):
    """Check that the rank aborts NCCL, in which the others wait, before it ends the job."""
    argv, fault = [*endless, "--comm", "nccl"], faulty("raise launch 1")
    running = under_mpirun(argv, 3, worker=FAULTY_WORKER, **ENVIRONMENT, **fault)
    running.wait_for_output()
    code, _, err = running.end(END_S)
    assert code == 3
    assert err.count("minitp: rank 1 failed: ZeroDivisionError: a fault for the test\n") == 1
    assert "Traceback" not in err


def test_nccl_fails_on_a_rank(model):
    """Check a failure for which the other ranks wait inside NCCL."""
    running = under_launcher(hello(model), 3, **ENVIRONMENT, STAND_IN_NCCL_FAILS="1")
    code, out, err = running.end(START_S)
    assert (code, out) == (3, "")
    error = "NcclError: NCCL_ERROR_SYSTEM_ERROR: the stand-in fails"
    assert err == f"minitp: rank 1 failed: NCCL failed to start: {error}\n"


def test_ctrl_c(endless):
    running = under_launcher(endless, 2, **ENVIRONMENT)
    running.wait_for_output()
    os.killpg(running.process.pid, signal.SIGINT)
    code, _, err = running.end(END_S)
    assert (code, err) == (130, "")


def test_a_closed_pipe_ends_the_run_quietly(endless):
    """Check this while the GPU is still computing."""
    command = ["/bin/sh", "-c", '"$@" | head -c 20', "sh", *WORKER, *endless, "--tp", 2]
    code, out, err = Running(command, **ENVIRONMENT).end(START_S)
    assert (code, err, len(out)) == (0, "", 20)
