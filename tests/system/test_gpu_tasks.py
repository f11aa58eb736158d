"""Tests of how benchmarks/gpu runs its tasks: time limits, signals, and the one file of results."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from on_gpu import ENVIRONMENT
from paths import GPU_BENCHMARK as GPU
from paths import ROOT


@pytest.fixture(scope="module")
def tasks():
    """Import the module `tasks`."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    import tasks

    yield tasks
    sys.path.remove(str(ROOT / "benchmarks" / "gpu"))


def python(text):
    return [sys.executable, "-c", text]


# --- one task -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_outcomes_of_tasks(tasks, tmp_path, monkeypatch, together):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    listed = [
        tasks.Task("fine", python("print('first'); print('12 passed')"), 20),
        tasks.Task("object", python("import sys; print('{\"a\": 1}'); print('bye', file=sys.stderr)"), 20),
        tasks.Task("bad", python("import sys; print('out'); print('why', file=sys.stderr); sys.exit(3)"), 20),
        tasks.Task("slow, very", python("import time; print('begun'); time.sleep(20)"), 1),
        tasks.Task("elsewhere", python("1/0"), 20, lambda: "not available"),
    ]
    done = []
    outcomes = tasks.Runner(tmp_path, 60, done.append).run(listed, together)
    found = {one["name"]: (one["status"], one["said"], one["result"]) for one in outcomes}
    assert found == {
        "fine": ("ok", "12 passed", None),
        "object": ("ok", "bye", {"a": 1}),
        "bad": ("failed", "exit code 3: why", None),
        "slow, very": ("failed", "took longer than 1 s", None),
        "elsewhere": ("skipped", "not available", None),
    }
    assert sorted(done, key=lambda one: one["name"]) == sorted(outcomes, key=lambda one: one["name"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "fine.txt": "first\n12 passed\n",
        "object.txt": '{"a": 1}\nbye\n',
        "bad.txt": "out\nwhy\n",
        "slow-very.txt": "begun\n",
    }


@pytest.mark.parametrize(("required", "status"), [(True, "failed"), (False, "skipped")])
def test_a_task_without_enough_time_left(tasks, tmp_path, required, status):
    """Check that a check counts as failed if it did not run, and a measurement as skipped."""
    sleep = python("import time; time.sleep(60)")
    listed = [
        tasks.Task("cut", sleep, 20, required=required),
        tasks.Task("late", sleep, 20, required=required),
    ]
    outcomes = tasks.Runner(tmp_path, 1.1, lambda outcome: None).run(listed)
    said = ["stopped after 1 s: no time was left for it", "no time was left for it"]
    assert [(one["status"], one["said"]) for one in outcomes] == [(status, text) for text in said]


def test_a_task_does_not_start_without_the_time_that_it_needs(tasks, tmp_path):
    listed = [tasks.Task("long", python("1/0"), 80, least_s=30), tasks.Task("short", python(""), 20)]
    outcomes = tasks.Runner(tmp_path, 15, lambda outcome: None).run(listed)
    assert [(one["status"], one["said"]) for one in outcomes] == [
        ("skipped", "no time was left for it"),
        ("ok", ""),
    ]


def test_as_many_tasks_run_at_once_as_there_are_cores(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "cores", lambda: 2)
    text = (
        "import json, os, time; begun = time.time(); time.sleep(0.2); "
        "print(json.dumps([begun, time.time(), os.environ['OPENBLAS_NUM_THREADS']]))"
    )
    listed = [tasks.Task(f"task {n}", python(text), 20) for n in range(5)]
    outcomes = tasks.Runner(tmp_path, 60, lambda outcome: None).run(listed, together=True)
    times = [json.loads(one["said"]) for one in outcomes]
    at_once = [sum(begun <= start < ended for begun, ended, _ in times) for start, _, _ in times]
    assert max(at_once) == 2
    assert {threads for _, _, threads in times} == {"2"}


# --- a run ----------------------------------------------------------------------------------------------


def start(folder, *options, **variables):
    return subprocess.Popen(
        [*GPU, str(folder), *options],
        env={**os.environ, **ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *options, **variables):
    """Run the benchmark to its end; return (exit code, stdout)."""
    process = start(folder, *options, **variables)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out


def written(folder):
    """Return {name: status} of the tasks in the only file, in order."""
    (path,) = folder.glob("*.json")
    return {one["name"]: one["status"] for one in json.loads(path.read_text())["steps"]}


def test_partial_runs_share_one_file(tmp_path):
    """Check that a new outcome replaces an old one, unless the task is now skipped."""
    code, out = run(tmp_path, "--only", "speed", FIGURE="1")
    assert (code, written(tmp_path)) == (0, {"figure": "ok", "long figure": "ok"})
    assert "12 passed" not in out
    code, out = run(tmp_path, "--only", "checks")
    every = {"tests": "ok", "check, long": "ok", "figure": "ok", "long figure": "ok"}
    assert (code, list(written(tmp_path).items())) == (0, list(every.items()))
    assert [word in out for word in ("12 passed", "figure  ", "no peer here")] == [True, True, False]
    code, _ = run(tmp_path, "--only", "speed", "--budget", "4", FIGURE="2")
    assert (code, written(tmp_path)) == (0, every)
    (path,), (outputs,) = tmp_path.glob("*.json"), [one for one in tmp_path.iterdir() if one.is_dir()]
    assert path.stem == outputs.name
    assert outputs.name.startswith("a-stand-in-for-a-gpu-2")
    assert json.loads(path.read_text())["steps"][2]["result"] == {"figure": 2}
    assert {one.stem for one in outputs.iterdir()} == {"tests", "check-long", "figure", "long-figure"}
    code, out = run(tmp_path, "--budget", "1.5", WAIT_S="20")
    assert (code, written(tmp_path)) == (1, every | {"check, long": "failed", "peer": "skipped"})
    assert "no peer here" in out


@pytest.mark.parametrize(
    ("number", "group", "expected"),
    [
        (signal.SIGINT, "checks", {"tests": "ok", "check, long": "failed"}),
        (signal.SIGTERM, "speed", {"figure": "ok", "long figure": "skipped"}),
    ],
)
def test_a_signal_ends_the_tasks_but_the_table_is_printed(tmp_path, number, group, expected):
    process = start(tmp_path, "--only", group, WAIT_S="15")
    until(lambda: ['"ok"' in path.read_text() for path in tmp_path.glob("*.json")])
    (pid,) = until(lambda: [path.read_text().strip() for path in tmp_path.glob("*/*long*.txt")])
    process.send_signal(number)
    out, _ = process.communicate(timeout=4)  # the tasks would get SIGKILL only later
    assert process.returncode == 128 + number
    assert written(tmp_path) == expected
    for name, status in expected.items():
        (line,) = [line for line in out.splitlines() if f"  {name}  " in line]
        assert status in line
        assert ("interrupted" in line) == (status != "ok")
    assert out.splitlines()[-1].startswith("written: ")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def until(function, seconds=10):
    """Wait until function() returns a list of one or more true values, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = function()
        if found and all(found):
            return found
        time.sleep(0.05)
    return pytest.fail(f"the condition was not met within {seconds} s")


@pytest.mark.parametrize("number", [0, 1])
def test_run_sh_passes_its_arguments_on(number):
    options = [["--only", "nothing"], ["--budget", "0"]][number]
    done = subprocess.run(
        [ROOT / "run.sh", "gpu", *options],
        env={**os.environ, **ENVIRONMENT, "MINITP_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert f"{options[0]}: invalid" in done.stderr


def test_a_missing_wheel_ends_the_run_at_once(tmp_path):
    process = start(tmp_path, MINITP_MPICH="/nowhere/mpich.whl")
    assert process.communicate(timeout=60) == (
        "",
        "minitp: MINITP_MPICH=/nowhere/mpich.whl: expected an mpich wheel, a folder that holds one, or an "
        "unpacked one\n",
    )
    assert process.returncode == 2
