"""Tests of `minitp info`, also where a package or program is missing, broken or does not answer."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import STAND_IN

from minitp import __version__
from minitp.cli import info, info_text
from minitp.cli.main import main
from minitp.errors import RankError
from minitp.util.environment import BLAS_THREADS

BROKEN = {
    "missing": "raise ModuleNotFoundError('no such thing')",
    "another error": "raise OSError('libmpi.so.12: cannot open shared object file')",
    "crash": "import os; print('last words', flush=True); os.abort()",
}


def run(*argv, path=(), **variables):
    """Run `minitp info` in a process, with `path` added to Python's path; return its output."""
    already = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, already)])}
    command = [sys.executable, "-m", "minitp", "info", *argv]
    done = subprocess.run(
        command, env={**environment, **variables}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) if "--json" in argv else done.stdout


def test_facts_of_this_machine():
    started = time.monotonic()
    found = run("--json")
    assert time.monotonic() - started < 5, "about 2 s, or more on a busy machine"
    import mpi4py
    import numpy as np

    assert found["minitp"] == {"version": __version__, "path": str(Path(info.__file__).parent.parent)}
    assert found["python"]["executable"] == sys.executable
    assert found["numpy"]["version"] == np.__version__
    assert found["numpy"]["blas"]
    assert found["mpi"]["mpi4py"] == mpi4py.__version__
    assert found["packages"]["tokenizers"]
    assert found["system"]["cores"] >= 1
    assert found["system"]["memory_bytes"] > 1e8
    assert found["mpirun_matches"] is True
    assert not [name for name, part in found.items() if name not in ("cuda", "nvidia_smi") and error_of(part)]


def error_of(part):
    return isinstance(part, dict) and "error" in part


def test_text_has_the_same_facts():
    text = run()
    for words in (__version__, sys.executable, "BLAS", "mpi4py", "matches this MPI", "CuPy", "cores"):
        assert words.replace("cores", "core") in text
    assert "{" not in text
    assert "None" not in text


def test_gpus():
    found = run("--json", path=[STAND_IN], STAND_IN_GPUS="3")
    assert len(found["cuda"]["gpus"]) == 3
    assert found["cuda"]["gpus"][0]["memory_bytes"] == 1 << 33
    assert (found["cuda"]["driver"], found["cuda"]["out_of_reach"]) == (12090, [])
    text = run(path=[STAND_IN], STAND_IN_GPUS="2")
    assert "CUDA driver 12090, runtime 12090, NCCL 2" in text
    assert "(9.0, 8.59 GB)" in text
    assert "all have peer access to each other" in text


def test_gpus_that_cannot_access_each_other():
    found = run("--json", path=[STAND_IN], STAND_IN_GPUS="2", STAND_IN_PEERS="0")
    assert found["cuda"]["out_of_reach"] == [[0, 1], [1, 0]]
    assert "NO PEER ACCESS: GPU 0 to 1, GPU 1 to 0" in run(
        path=[STAND_IN], STAND_IN_GPUS="2", STAND_IN_PEERS="0"
    )


@pytest.mark.parametrize("how", BROKEN)
def test_broken_modules(tmp_path, how):
    """Break several modules at once, and check that everything else is still reported."""
    for module in ("numpy", "mpi4py", "cupy", "tokenizers", "safetensors", "ml_dtypes", "tqdm"):
        if (module, how) == ("numpy", "crash"):  # the command itself imports numpy
            continue
        (tmp_path / f"{module}.py").write_text(BROKEN[how])
    found, text = run("--json", path=[tmp_path]), run(path=[tmp_path])
    reason = {"missing": "no such thing", "another error": "libmpi.so.12", "crash": "ended with code -6"}[how]
    for name in ("mpi", "cuda", *(["numpy"] if how != "crash" else [])):
        assert reason in found[name]["error"]
    assert text.count(reason) >= (3 if how != "crash" else 2)
    assert found["mpirun_matches"] is None
    assert found["system"]["cores"] >= 1


def test_without_packages(monkeypatch, capsys):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "pip install mpi4py" in out
    assert "pip install 'minitp[cuda12]'" in out
    assert "nvidia-smi not found" in out


def test_no_answer_in_time(monkeypatch):
    monkeypatch.setattr(info, "LIMIT_S", 0.3)
    probe = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert info.answer(probe) == {"error": "no answer within 0.3 s"}
    assert probe.poll() is not None


def test_no_mpirun(monkeypatch):
    def none():
        raise RankError("no mpirun found; ..")

    monkeypatch.setattr(info, "find_mpirun", none)
    found = info.facts()
    assert found["mpirun"]["error"].startswith("no mpirun found")
    assert "no mpirun found" in info_text.text(found)
    assert "unknown whether it matches" in info_text.text(found)


SAID = {
    "mpich": "MPICH Version: 4.1 MPICH Release date: Fri Jan 27 13:54:44 CST 2023",
    "hydra": "HYDRA build details: Version: 4.1 Release Date: ..",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.10 Build 20230619",
    "open library": "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022",
    "open mpirun": "mpirun (Open MPI) 4.1.4 Report bugs to http://www.open-mpi.org/community/help/",
    "unknown": "somebody's MPI 1.0",
}


@pytest.mark.parametrize(
    ("library", "mpirun", "expected"),
    [
        ("mpich", "hydra", True),
        ("mpich", "intel", True),
        ("open library", "open mpirun", True),
        ("mpich", "open mpirun", False),
        ("open library", "hydra", False),
        ("unknown", "hydra", None),
        ("mpich", "unknown", None),
    ],
)
def test_match_of_mpirun_and_the_mpi_library(library, mpirun, expected):
    assert info.matches(SAID[library], SAID[mpirun]) is expected


def test_mpirun_of_another_mpi_is_shown_in_capitals(monkeypatch):
    found = info.facts()
    found["mpirun_matches"] = False
    assert "BELONGS TO ANOTHER MPI" in info_text.text(found)
    assert info_text.short(SAID["open library"]) == "Open MPI v4.1.4"
    assert info_text.short(SAID["intel"]) == "Intel(R) MPI Library for Linux* OS, Version 2021.10"


def test_environment_variables_without_secrets(monkeypatch):
    for name in BLAS_THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MINITP_API_KEY", "do not tell")
    found = info.variables()
    assert (found["OMP_NUM_THREADS"], found["NCCL_DEBUG"]) == ("3", "INFO")
    assert "do not tell" not in json.dumps(info.facts())
    assert "OMP_NUM_THREADS=3" in info_text.text(info.facts())


def test_hugging_face(tmp_path):
    home = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://hub.example", "HF_TOKEN": "hf_do_not_tell"}
    found = run("--json", HF_HUB_OFFLINE="1", **home)
    assert found["hugging_face"] == {
        "HF_ENDPOINT": "https://hub.example",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN": True,
        "HF_HUB_OFFLINE": True,
    }
    assert found["environment"]["HF_TOKEN"] == "(set)"
    assert "do_not_tell" not in json.dumps(found)
    expected = f"https://hub.example, cache {tmp_path / 'hub'}, HF_TOKEN set, HF_HUB_OFFLINE is set"
    assert f"Hugging Face  {expected}" in info_text.text(found)
    assert "HF_TOKEN not set" in info_text.hugging_face(found["hugging_face"] | {"HF_TOKEN": False})


def test_demo_model(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert info.demo_model()["bytes"] is None
    assert "not downloaded yet" in info_text.text(info.facts())
    folder = tmp_path / "minitp" / info.demo.NAME
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"12345")
    assert info.demo_model() == {"path": str(folder), "bytes": 5}


@pytest.mark.mpi
def test_one_rank_under_mpirun_prints():
    done = subprocess.run(
        [info.find_mpirun(), "-n", "2", sys.executable, "-m", "minitp", "info", "--json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["environment"]["(ranks of this MPI world)"] == "2"
    assert "library" in found["mpi"]


def test_output_into_a_closed_pipe():
    done = subprocess.run(
        f"{sys.executable} -m minitp info | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
