"""Tests of benchmarks/gpu on the stand-in for CuPy: commands, parts, table, reasons to skip a task."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from on_gpu import ENVIRONMENT
from paths import ROOT, SUPPORT
from tiny import CONFIG, write_tiny

from minitp import ops
from minitp.errors import InputError
from minitp.launch.mpirun import find_mpirun
from minitp.loading.source import open_model

MATRICES = 32 * 64 + 32 * 32 + 3 * 32 * 48  # elements of a layer of the tiny model
LM_HEAD = 258 * 32
POSITION = 2 * 2 * 8  # elements of the cache per position and layer: k and v, KV heads, head_dim
FACTS = {"gpu": "A GPU 80GB", "date": "2030-01-02", "versions": {"cupy": "14.2.0"}}
MODULES = ("commands", "goals", "graphs", "mpich", "parts", "results", "serving", "table", "tasks")


@pytest.fixture(scope="module")
def gpu():
    """Import the modules of benchmarks/gpu."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(ROOT / "benchmarks" / "gpu"))


def python(text):
    return [sys.executable, "-c", text]


def all_tasks(gpu):
    return [*gpu.commands.checks(), *gpu.commands.measurements(), *gpu.commands.peers()]


# --- the tasks ------------------------------------------------------------------------------------------


def test_every_task_runs_an_existing_command(gpu):
    from minitp.cli.arguments import parser

    for task in all_tasks(gpu):
        command = [str(part) for part in task.command]
        if command[1:3] == ["-m", "minitp"]:
            parser().parse_args(command[3:])
        elif command[1:3] == ["-m", "pytest"]:
            assert all((ROOT / file).exists() for file in command if file.startswith("tests/"))
        else:
            assert Path(command[1]).exists()
            assert not command[1].endswith("parts.py") or command[2] in gpu.parts.PARTS
            if command[1].endswith("graphs.py"):
                gpu.graphs.arguments().parse_args(command[2:])
        assert task.least_s < task.limit_s <= 200
    slugs = [gpu.tasks.slug(task.name) for task in all_tasks(gpu)]
    assert len(set(slugs)) == len(slugs)


def test_checks_are_required_and_measurements_are_not(gpu):
    assert all(task.required for task in gpu.commands.checks())
    assert not any(task.required for task in [*gpu.commands.measurements(), *gpu.commands.peers()])


def test_every_test_for_a_gpu_runs_there(gpu):
    """Check also the tests of kernels, except all_reduce and tensor_cores, which have separate GPU tests."""
    tests = {
        path.stem.removeprefix("test_"): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")
    }
    on_gpu = {name for name, text in tests.items() if "\npytestmark = NEEDS_GPU" in text}
    assert on_gpu == set(gpu.commands.GPU_TESTS)
    kernels = {name for name, text in tests.items() if "\nfrom cuda_on_cpu import CpuCompiler" in text}
    expected = {"all_reduce", "tensor_cores", *gpu.commands.KERNEL_TESTS}
    assert kernels == expected


def test_tests_of_kernels_run_through_cupy():
    tests = "tests/rooms/cuda/test_linear.py::test_a_fused_norm_gives_the_same_bits_as_a_separate_one"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(SUPPORT), ENVIRONMENT["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "kernels_on_gpu", tests],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_reasons(gpu, monkeypatch):
    assert gpu.commands.missing("json")() is None
    assert gpu.commands.missing("json", "no_such_package")() == "no_such_package not installed"
    assert gpu.commands.no_mpirun() is None
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu.commands.no_mpirun().startswith("no mpirun found; MINITP_MPICH=WHEEL ")


def test_a_missing_demo_model_is_not_downloaded(gpu, tmp_path, monkeypatch):
    def no_process(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "minitp"
    assert gpu.commands.no_demo() == f"the demo model is not in {folder}"
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else there(name))
    assert gpu.commands.no_demo() == f"the demo model is not in {folder}, and gguf not installed"
    (folder / gpu.commands.NAME).mkdir(parents=True)
    assert gpu.commands.no_demo() is None


# --- mpirun from a wheel --------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    """A wheel with the layout of mpich's, alone in a folder."""
    path = tmp_path / "wheels" / "mpich-5.0.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("bin/mpirun", "bin/hydra_pmi_proxy"):
            archive.writestr(f"mpich-5.0.2.data/data/{name}", "#!/bin/sh\necho this is ${0##*/}\n")
        archive.writestr("mpich-5.0.2.data/data/lib/libmpi.so.12", "")
    return path


@pytest.mark.parametrize("form", ["wheel", "folder", "unpacked"])
def test_mpirun_comes_from_a_wheel(gpu, wheel, tmp_path, monkeypatch, form):
    source = {"wheel": wheel, "folder": wheel.parent, "unpacked": tmp_path / "by hand"}[form]
    if form == "unpacked":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(source)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.chdir(tmp_path)
    gpu.mpich.use_mpich(os.path.relpath(source), tmp_path / "unpacked")
    data = (source if form == "unpacked" else tmp_path / "unpacked") / "mpich-5.0.2.data" / "data"
    assert Path(os.environ["PATH"].split(os.pathsep)[0]) == data / "bin"
    assert find_mpirun() == str(data / "bin" / "mpirun")
    assert (os.environ["LD_LIBRARY_PATH"], os.environ["MPI4PY_MPIABI"]) == (str(data / "lib"), "mpich")
    for name in ("mpirun", "hydra_pmi_proxy"):
        said = subprocess.run([data / "bin" / name], capture_output=True, text=True, check=True).stdout
        assert said == f"this is {name}\n"


def test_an_mpirun_that_would_be_found_first_is_named(gpu, wheel, tmp_path, monkeypatch):
    mpirun = tmp_path / "python" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.touch()
    monkeypatch.setattr(sys, "executable", str(mpirun.with_name("python")))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(InputError, match=f"{mpirun} is next to this Python"):
        gpu.mpich.use_mpich(str(wheel), tmp_path / "unpacked")


# --- the parts ------------------------------------------------------------------------------------------


def part(name, *argv, **variables):
    """Run a script of benchmarks/gpu; return (exit code, lines of stdout and stderr)."""
    paths = os.pathsep.join([str(ROOT), ENVIRONMENT["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu" / name, *argv],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


def test_families_on_the_fused_path(gpu):
    code, lines = part("parts.py", "goldens", "fused", "float16", "gemma2", "tinyllama")
    assert code == 0
    for line, name, layers in zip(lines, ("gemma2", "tinyllama"), (3, 2), strict=False):
        assert re.fullmatch(rf"{name}: all steps within bounds for all {layers} layers \(\d+ arrays .*", line)
    assert lines[2:] == ["right: 2 of 2 families"]


def test_no_family_on_the_fused_path_is_a_failure(gpu):
    code, lines = part("parts.py", "goldens", "fused", "float32", "tinyllama")
    assert code == 1
    assert lines == [
        "tinyllama: not on the fused path: its kernels compute in 16 bits, not in float32",
        "none of the families can use the fused path (1 checked)",
    ]


@pytest.mark.usefixtures("cupy")
def test_a_wrong_family_is_a_failure_but_the_others_still_run(gpu, capsys, monkeypatch):
    right = ops.soft_cap
    monkeypatch.setattr(ops, "soft_cap", lambda xp, x, cap: right(xp, x, cap) * np.float32(1.01))
    with pytest.raises(SystemExit, match="wrong: 2 of 3 families: nowhere, gemma2"):
        gpu.parts.goldens("explicit", "float32", "nowhere", "gemma2", "tinyllama")
    nowhere, gemma2, tinyllama = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"nowhere: .*: no such directory.*", nowhere)
    assert re.match(r"gemma2: first wrong step: prefill/layers.0.attn.scores, layer 0, rank 0: ", gemma2)
    assert re.match(r"tinyllama: all steps within bounds ", tinyllama)


# --- graphs ---------------------------------------------------------------------------------------------


@pytest.fixture
def quick_timer(gpu, cupy, monkeypatch):
    """Launch what is timed once, because the kernels are slow on a CPU."""
    from minitp.bench.gpu_roofline import Timer

    monkeypatch.setattr(Timer, "seconds", lambda timer, launch: launch() or 1e-3)
    monkeypatch.setattr(gpu.graphs, "LEAST_LAUNCHES", 1)
    monkeypatch.setattr(gpu.graphs, "REPLAYS", 1)


@pytest.mark.usefixtures("quick_timer")
@pytest.mark.parametrize(("tp", "rows"), [(1, (1, 64)), (2, (1, 8))])
def test_each_kernel_is_timed_with_its_bytes(gpu, tiny, tp, rows):
    """Check that the kernels are those of the pass, and that their bytes add up to those of the pass."""
    model = gpu.graphs.open_rank(str(tiny), 1, tp, dtype="float16")
    found = gpu.graphs.measure(model, [], rows, keys=24)
    assert [one["rows"] for one in found["points"]] == list(rows)
    for point in found["points"]:
        kernels = {one["name"]: one for one in point["kernels"]}
        assert not any("failed" in one for one in [point, *kernels.values()])
        assert point["launches"] == sum(one["count"] for one in kernels.values()) > 7
        assert {"linear qkv, w_qkv", "attention_decode", "linear swiglu, w_gate_up"} <= set(kernels)
        assert sum(one["count"] for name, one in kernels.items() if name.endswith(("w_o", "w_down"))) == 2
        total = sum(one["count"] * (one["bytes"] or 0) for one in kernels.values())
        assert total == point["bytes"] == 2 * (MATRICES + LM_HEAD + point["rows"] * 24 * POSITION) // tp
        for one in kernels.values():
            assert one["us"] > 0
            floor = None if one["bytes"] is None else one["bytes"] / found["read_gb_per_s"] / 1e3
            assert one["floor_us"] == (floor and pytest.approx(floor))
    assert ("all-reduce" in kernels, "rms_norm" in kernels) == (False, True)
    lines = gpu.table.kernel_lines("TP", found["points"])
    assert len(lines) == 1 + len({one["name"] for point in found["points"] for one in point["kernels"]})


@pytest.mark.usefixtures("quick_timer")
def test_the_kernels_of_a_mixture_are_timed(gpu, tmp_path):
    mixtral = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}  # 2 of 8 experts per token
    model = gpu.graphs.open_rank(str(write_tiny(tmp_path, num_hidden_layers=1, **mixtral)), dtype="float16")
    (point,) = gpu.graphs.measure(model, [], [1], keys=24)["points"]
    names = {one["name"] for one in point["kernels"]}
    assert {"linear store, w_router", "route", "expert_swiglu", "expert_down", "expert_sum"} <= names
    router, expert = 32 * 8, 3 * 32 * 48
    assert point["bytes"] == 2 * (MATRICES + router + expert + LM_HEAD + 24 * POSITION)


@pytest.mark.usefixtures("quick_timer")
def test_a_point_or_a_kernel_that_fails_does_not_stop_the_others(gpu, tiny, monkeypatch):
    model = gpu.graphs.open_rank(str(tiny), dtype="float16")
    right = gpu.graphs.time_of_launches

    def time_of_launches(device, timer, repeats):
        if len(repeats) == 1:
            raise RuntimeError("an illegal address")
        return right(device, timer, repeats)

    monkeypatch.setattr(gpu.graphs, "time_of_launches", time_of_launches)
    found = gpu.graphs.measure(model, [1, 128], [1], keys=24)
    first, second = found["points"]
    failed = {one["name"] for one in first["kernels"] if "failed" in one}
    assert failed == {"begin_decode", "linear logits", "sample", "end_decode"}
    assert "supports up to 64" in second["failed"]
    outcome = {"name": gpu.goals.ONE, "status": "ok", "said": "", "result": found}
    rows = {row["name"]: row for row in gpu.goals.rows("H200", [outcome])}
    assert rows["decode, 512 keys, TP=1"]["limit"] > 0
    assert rows["batch of 8"]["failed"] == "not measured"


@pytest.mark.usefixtures("quick_timer")
def test_requests_in_the_engine_and_over_http(gpu, tiny, monkeypatch):
    found = gpu.serving.engine(2, str(tiny), prompt_tokens=9, new_tokens=4)
    assert (found["requests"], found["new_tokens"]) == (2, 4)
    assert found["tokens_per_s"] > 0 < found["graph_tokens_per_s"]
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (point,) = gpu.serving.serve(str(tiny), 2, prompt_tokens=9, new_tokens=4)["points"]
    assert point["tokens_per_s"] > 0 < point["streamed_tokens_per_s"]


def test_a_model_file_is_written(gpu, tmp_path, monkeypatch):
    """Check the file with the smallest shapes; the loading of a model is measured by `minitp bench`."""
    monkeypatch.setattr(gpu.parts, "random_config", lambda name: CONFIG | {"vocab_size": 1000})
    gpu.parts.write(tmp_path / "model", "tiny", "1")
    source = open_model(str(tmp_path / "model"), 1)
    assert (source.config.num_hidden_layers, source.config.vocab_size) == (1, 1000)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    with pytest.raises(SystemExit, match="the model was not written"):
        gpu.parts.loading(str(tmp_path))


def test_four_processes_on_one_gpu():
    code, lines = part("ipc.py", STAND_IN_GPUS="1")
    said = "20 sums, and 20 with the norm, of 4 processes are equal to NumPy's in float16 and bfloat16"
    assert (code, lines) == (0, [said])


# --- the table ------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_table_and_file(gpu, tiny, tmp_path, monkeypatch):
    """Check with small real tasks that the table contains their figures."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    commands, task = gpu.commands, gpu.tasks.Task
    bench = ["bench", "--json", "--model", tiny, "--prompt-tokens", 8, "-n", 4, "--rounds", 1]
    shared = ["check", "--tokens", "1,2,3", "--model", tiny, "--tp", 4, "--share-gpu", "--path", "fused"]
    outputs = tmp_path / "results" / "a-gpu-80gb-2030-01-02"
    again = python(f"print(open({str(outputs / 'decode.txt')!r}).read())")  # has what three others measure
    tasks = [
        task("NCCL, one rank", commands.script("parts.py", "nccl"), 60),
        task("decode", commands.minitp(*bench, "--tp", 1, "--profile"), 60),
        task("prefill", again, 20),
        task("rank 0 of 4, decode", commands.minitp(*bench, "--as-rank", 0, "--of", 4), 60),
        task("16 tokens", again, 20),
        task("16 requests", commands.minitp(*bench, "--tp", 1, "--requests", 2), 60),
        task("batches", python(
            "print('{\"sweep\": {\"points\": [{\"batch\": 1, \"step_s\": 0.0042}]}}')"), 20),
        task("loading", again, 20),
        task("four ranks on one GPU", commands.minitp(*shared, "--comm", "nccl"), 60, commands.no_mpirun),
        task("transformers", python(
            "print('{\"decode_tokens_per_s\": 2.0, \"prefill_tokens_per_s\": 3.0}')"), 20),
        task("a failure", python("1/0"), 20),
    ]  # fmt: skip
    monkeypatch.setenv("STAND_IN_GPUS", "1")
    results = gpu.results.Results(FACTS, [s.name for s in reversed(tasks)], tmp_path / "results")
    outcomes = gpu.tasks.Runner(results.outputs, 300, results.add).run(tasks)
    assert [one["status"] for one in outcomes] == ["ok"] * 10 + ["failed"]
    text = "\n".join(gpu.table.table(FACTS, outcomes))
    for words in (
        "A GPU 80GB, 2030-01-02; cupy 14.2.0",
        "exit code 1: ZeroDivisionError",
        "reads of the GPU's memory",
        "of the reads",
        "of the matrix rate",
        "14 launches",
        "with 5 all-reduces, not run here",
        "4 tokens of each of 1 calls",
        "2 requests of 8 + 4 tokens at once",
        "of their batches' limit",
        "1: 4.20",
        "of reading that file",
        "times as fast",
    ):
        assert words in text
    assert results.path.name == "a-gpu-80gb-2030-01-02.json"
    assert results.outcomes() == outcomes[::-1]
    again = gpu.results.Results(FACTS, [], tmp_path / "results")
    assert again.outcomes() == outcomes[::-1]
    assert again.outcomes()[-2]["result"]["profile"]["launches"] == 14


def test_a_table_without_results(gpu):
    assert gpu.table.table(FACTS, []) == ["A GPU 80GB, 2030-01-02; cupy 14.2.0", ""]
    outcome = {
        "name": "decode",
        "status": "failed",
        "at": "12:30",
        "seconds": 1.0,
        "said": "no",
        "result": None,
    }
    assert gpu.table.table(FACTS, [outcome])[2].split() == ["12:30", "decode", "failed", "1", "s", "no"]


# --- the goals ------------------------------------------------------------------------------------------


def outcome(name, result=None, said="", status="ok"):
    return {"name": name, "status": status, "at": "12:30", "seconds": 1.0, "said": said, "result": result}


def bench(ttft_s=0.01, share=0.5, **more):
    prefill = {
        "prompt_tokens": 32,
        "tokens_per_s": {"median": 1.0},
        "ttft_s": {"median": ttft_s},
        "limit_s": {"median": 0.003},
        "share_of_matrix_rate": {"median": share},
    }
    return {"prefill": prefill, "limits": {"matrix_gflop_per_s": 8e5}, **more}


def measured_rows(gpu, name="NVIDIA H200", us=3400.0, read_ms=3.11):
    """Return the rows of the goals by name, with results for all kinds of tasks."""
    nbytes = int(read_ms * 4.59e9)
    points = [
        {"rows": n, "us": us, "bytes": nbytes, "share_of_reads": nbytes / 4.59e6 / us} for n in (1, 8, 16, 64)
    ]
    attention = [{"name": "attention_decode, new", "us": 20.0, "floor_us": 15.0}]
    engine = {"tokens_per_s": 2600.0, "graph_tokens_per_s": 3000.0}
    served = {"requests": 16, "tokens_per_s": 2500.0, "streamed_tokens_per_s": 2000.0}
    loading = {"gb_per_s": 4.0, "file_gb_per_s": 5.0, "seconds": 3.6}
    outcomes = [
        outcome("graphs, TP=1", {"read_gb_per_s": 4590.0, "points": points}),
        outcome("graphs, rank 0 of 4", said="took longer than 50 s", status="failed"),
        outcome("attention, 16384 keys", {"points": [{"rows": 1, "kernels": attention}]}),
        outcome("engine, 16 requests", engine),
        outcome("serve", {"points": [served]}),
        outcome("prompt of 32", bench(ttft_s=0.0049)),
        outcome("prefill", bench(share=0.67)),
        outcome("prompt of 8192", {}),
        outcome("loading", bench(loading=loading)),
        outcome(gpu.goals.FUSED, said="right: 7 of 25 families; not on the fused path: 18"),
        outcome("NCCL, one rank", said="NCCL 22809: all-reduce"),
    ]
    return {row["name"]: row for row in gpu.goals.rows(name, outcomes)}, outcomes


def test_figures_are_compared_with_the_goals(gpu):
    rows, outcomes = measured_rows(gpu)
    assert len(rows) == len(gpu.goals.GOALS)
    assert {name for name, row in rows.items() if row.get("reached")} == {
        "decode, 512 keys, TP=1",
        *(f"batch of {n}" for n in (8, 16, 64)),
        "engine, 16 requests, of the graph",
        "serve, 16 requests, of the engine",
        "prompt of 32 tokens",
        "loading, of reading the file",
        "loading 14 GB, at that rate",
        "NCCL, one rank",
    }
    assert {name: row["failed"] for name, row in rows.items() if "failed" in row} == {
        "one rank of TP=4, without its sums": "took longer than 50 s",
        "batch of 32": "not measured",
        "engine, 64 requests, of the graph": "not run",
        "serve, 64 requests, of the engine": "not measured",
        "serve, 64 requests, streamed, of the engine": "not measured",
        "prompt of 8192 tokens, of cuBLAS": "its result lacks a figure: KeyError: 'limits'",
        "four ranks on one GPU, host memory": "not run",
        "four ranks on one GPU, NCCL": "not run",
        "four processes, sums in peer memory": "not run",
    }
    assert rows["attention, 16384 keys, Llama 3 8B"]["share"] == 0.75
    assert rows["families on the fused path"]["share"] == 7 / 25
    lines = [" ".join(line.split()) for line in gpu.table.goal_lines("NVIDIA H200", outcomes)]
    assert "decode, 512 keys, TP=1 3.4 ms 3.11 ms 91% 90% or 3.45 ms yes" in lines
    name = "one rank of TP=4, without its sums"
    assert f"{name} 68% or 1.15 ms failed: took longer than 50 s" in lines


@pytest.mark.parametrize(("name", "us", "read_ms", "reached"), [
    ("NVIDIA H200", 3450.0, 3.0, True), ("NVIDIA H200", 3460.0, 3.0, False),
    ("NVIDIA H200", 3460.0, 3.12, True), ("NVIDIA H100", 3450.0, 3.0, False),
    ("NVIDIA H100", 3450.0, 3.12, True),
])  # fmt: skip
def test_a_time_is_a_goal_only_on_the_gpu_that_it_is_for(gpu, name, us, read_ms, reached):
    """Check shares below and above 90%; other GPUs have only the share."""
    rows, _ = measured_rows(gpu, name, us, read_ms)
    row = rows["decode, 512 keys, TP=1"]
    assert row["reached"] == reached
    assert ("3.45 ms" in row["goal"]) == ("H200" in name)


def test_every_goal_has_a_task(gpu):
    names = {task.name for task in all_tasks(gpu)}
    assert {goal.task for goal in gpu.goals.GOALS} <= names
    assert len({goal.name for goal in gpu.goals.GOALS}) == len(gpu.goals.GOALS)


def test_the_tables_of_a_file_are_printed_again(gpu, tmp_path):
    _, outcomes = measured_rows(gpu)
    results = gpu.results.Results(FACTS | {"gpu": "NVIDIA H200"}, [], tmp_path)
    for one in outcomes:
        results.add(one)
    saved = json.loads(results.path.read_text())
    assert saved["goals"] == gpu.goals.rows("NVIDIA H200", results.outcomes())
    code, lines = part("table.py", str(results.path))
    expected = gpu.table.table(results.facts, results.outcomes())
    assert (code, lines) == (0, [line.rstrip("\n") for line in expected])
