"""benchmarks/gpu.py on the stand-in for CuPy, with steps that are quickly done: outcomes, table and file."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from on_gpu import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"gpu": "A GPU 80GB", "date": "2030-01-02", "versions": {"cupy": "14.2.0"}}


@pytest.fixture(scope="module")
def benchmark():
    """The modules gpu and gpu_steps."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu
    import gpu_steps

    yield gpu, gpu_steps
    sys.path.remove(str(ROOT / "benchmarks"))


def python(text):
    return [sys.executable, "-c", text]


def later(seconds=60):
    return time.monotonic() + seconds


@pytest.mark.parametrize("together", [False, True])
def test_steps_end_in_their_own_ways(benchmark, together):
    _, steps = benchmark
    wanted = [
        steps.Step("fine", python("print('first'); print('12 passed')"), 20),
        steps.Step("object", python("print('{\"a\": 1}')"), 20),
        steps.Step("bad", python("import sys; print('why', file=sys.stderr); sys.exit(3)"), 20),
        steps.Step("slow", python("import time; time.sleep(60)"), 2),
        steps.Step("elsewhere", python("1/0"), 20, lambda: "no such thing here"),
    ]
    outcomes = steps.run_group(wanted, later(), together)
    found = {one["name"]: (one["status"], one["said"], one["result"]) for one in outcomes}
    assert found == {
        "fine": ("ok", "12 passed", None),
        "object": ("ok", '{"a": 1}', {"a": 1}),
        "bad": ("failed", "exit code 3: why", None),
        "slow": ("failed", "took longer than 2 s", None),
        "elsewhere": ("skipped", "no such thing here", None),
    }


def test_a_step_that_comes_too_late_is_not_run(benchmark):
    _, steps = benchmark
    (one,) = steps.run_group([steps.Step("late", python("1/0"), 20)], later(0))
    assert (one["status"], one["said"]) == ("failed", "no time was left for it")


def test_reasons(benchmark, monkeypatch):
    gpu, _ = benchmark
    assert gpu.missing("json")() is None
    assert gpu.missing("json", "no_such_package")() == "no_such_package not installed"
    assert gpu.no_mpirun() is None
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu.no_mpirun().startswith("no mpirun found")


def test_every_step_is_a_command_that_minitp_has(benchmark):
    from minitp.cli import parser

    gpu, _ = benchmark
    for step in [*gpu.checks(), *gpu.measurements()]:
        command = [str(part) for part in step.command]
        if command[1:3] == ["-m", "minitp"]:
            parser().parse_args(command[3:])
        elif command[1] != "-m":
            assert Path(command[1]).exists()
        assert step.limit_s <= 200


@pytest.mark.mpi
def test_table_and_file(benchmark, tiny, tmp_path, monkeypatch):
    """Real steps in small: their figures are found under the names that the table wants."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    gpu, steps = benchmark
    bench = ["bench", "--json", "--model", tiny, "--prompt-tokens", 8, "-n", 4, "--rounds", 1]
    monkeypatch.setattr(gpu, "MODEL", tiny)
    wanted = [
        steps.Step("NCCL, one rank", gpu.this("nccl"), 60),
        steps.Step("decode", gpu.minitp(*bench, "--tp", 1, "--profile"), 60),
        steps.Step("prefill", gpu.minitp(*bench, "--tp", 1), 60),
        steps.Step("rank 0 of 4, decode", gpu.minitp(*bench, "--as-rank", 0, "--of", 4), 60),
        steps.Step("loading", gpu.minitp(*bench, "--tp", 1), 60),
        steps.Step("four ranks on one GPU", gpu.minitp("check", "--tokens", "1,2,3", "--model", tiny,
                   "--tp", 4, "--share-gpu", "--path", "fused", "--comm", "nccl"), 60, gpu.no_mpirun),
        steps.Step("transformers", python(
            "print('{\"decode_tokens_per_s\": 2.0, \"prefill_tokens_per_s\": 3.0}')"), 20),
        steps.Step("a failure", python("1/0"), 20),
    ]  # fmt: skip
    monkeypatch.setenv("STAND_IN_GPUS", "1")
    outcomes = steps.run_group(wanted, later(300))
    assert [one["status"] for one in outcomes] == ["ok"] * 7 + ["failed"]
    text = "\n".join(gpu.table(FACTS, outcomes))
    for words in (
        "A GPU 80GB, 2030-01-02; cupy 14.2.0",
        "exit code 1: ZeroDivisionError",
        "of the copy",
        "of the matrix rate",
        "14 launches",
        "with 5 all-reduces, not run here",
        "of reading that file",
        "times as fast",
    ):
        assert words in text
    path = gpu.write(FACTS, outcomes, tmp_path / "results")
    assert os.path.basename(path) == "a-gpu-80gb-2030-01-02.json"
    read = json.loads(Path(path).read_text())
    assert [one["name"] for one in read["steps"]] == [step.name for step in wanted]
    assert read["steps"][1]["result"]["profile"]["launches"] == 14


def test_the_table_of_nothing(benchmark):
    gpu, _ = benchmark
    outcome = {"name": "decode", "status": "failed", "seconds": 1.0, "said": "no", "result": None}
    assert gpu.table(FACTS, [outcome])[-1].split() == ["decode", "failed", "1", "s", "no"]
