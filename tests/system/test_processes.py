"""Processes of real jobs: both ways to start ranks give the same tokens, and if a rank fails, all end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from running import (
    END_S,
    FAULTY_WORKER,
    START_S,
    WORKER,
    Running,
    alone,
    faulty,
    result_of,
    under_launcher,
    under_mpirun,
)
from tiny import write_tiny

from minitp.cli import main as cli
from minitp.errors import RankError
from minitp.launch import supervisor
from minitp.launch.mpirun import OPEN_MPI
from minitp.loading.demo import demo_directory
from minitp.util.shares import shares_in

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Return the arguments of a run that prints tokens for minutes."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    write_tiny(directory, tokenizer=False, max_position_embeddings=1_000_000)
    return ["generate", "--tokens", "1,2,3", "--model", directory, "-n", "900000", "--ignore-eos"]


# --- the same tokens ------------------------------------------------------------------------------------


def test_same_tokens_however_started(tiny, capsys):
    argv = ["generate", "Hello", "--model", tiny, "-n", "24", "--json"]
    expected = alone(argv, capsys)
    launcher = result_of(under_launcher(argv))
    mpirun = result_of(under_mpirun([*argv, "--tp", 4]))
    for result in (launcher, mpirun):
        assert result["token_ids"] == expected["token_ids"]
        assert result["text"] == expected["text"]
        assert result["stats"]["tp"] == 4
        assert 0 < result["stats"]["comm_share"] < 1
        fraction = result["stats"]["weight_bytes_per_rank"] / expected["stats"]["weight_bytes_per_rank"]
        assert 0.25 < fraction < 0.3, "norms are replicated, all other weights are sharded"


def test_same_tokens_at_unequal_shares(tiny, capsys):
    argv = ["generate", "Hello", "--model", tiny, "-n", "24", "--json"]
    expected = alone(argv, capsys)
    shares = [*argv, "--split", "5,1"]
    for result in (result_of(under_launcher(shares, ranks="auto")), result_of(under_mpirun(shares, ranks=2))):
        assert result["token_ids"] == expected["token_ids"]
        assert (result["stats"]["tp"], result["stats"]["split"]) == (2, "5,1")
    result = result_of(under_launcher([*argv, "--split", "auto"], ranks=2))
    assert result["token_ids"] == expected["token_ids"]
    assert len(shares_in(result["stats"]["split"])) == 2, "numbers with which the run can be repeated"


@pytest.mark.parametrize("comm", ["shm", "mpi"])
def test_same_tokens_with_a_vocabulary_smaller_than_the_number_of_ranks(tmp_path, capsys, comm):
    model = write_tiny(tmp_path / "model", tokenizer=False, vocab_size=3, intermediate_size=2, seed=2)
    argv = ["generate", "--tokens", "0,2,1", "--model", model, "-n", "24", "--json"]
    expected = alone(argv, capsys)
    assert set(expected["token_ids"]) == {0, 1, 2}
    assert result_of(under_launcher([*argv, "--comm", comm], ranks=4))["token_ids"] == expected["token_ids"]


def test_perplexity_is_the_same(tiny, tmp_path, capsys):
    (tmp_path / "text").write_text(
        "All happy families are alike; each unhappy family is unhappy in its own way."
    )
    argv = ["perplexity", tmp_path / "text", "--model", tiny, "--json", "--max-context", "50"]
    expected = alone(argv, capsys)
    found = result_of(under_launcher(argv, ranks=3))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found["scored_tokens"] == expected["scored_tokens"] == 74


def test_demo_model(capsys):
    demo_directory()
    argv = ["generate", "The capital of France is", "--model", "smollm2", "-n", "8", "--json"]
    launcher = result_of(under_launcher(argv))
    assert launcher["text"].startswith(" Paris.")
    assert launcher["token_ids"] == alone(argv, capsys)["token_ids"]


def test_two_jobs_at_once(tiny, capsys):
    prompts = ["Hello", "Goodbye"]
    argvs = [["generate", prompt, "--model", tiny, "-n", "24", "--json"] for prompt in prompts]
    both = [under_launcher(argv, ranks=2) for argv in argvs]
    texts = [result_of(running)["text"] for running in both]
    assert texts == [alone(argv, capsys)["text"] for argv in argvs]


def test_a_job_survives_the_death_of_another(tiny, endless, capsys):
    argv = ["generate", "Hello", "--model", tiny, "-n", "24", "--json"]
    dying = under_launcher(endless, ranks=2, **faulty("kill forward 1"))
    living = under_launcher(argv, ranks=2, **faulty("lag forward 1"))
    assert dying.end(START_S)[0] == 3
    assert result_of(living)["text"] == alone(argv, capsys)["text"]


SHELLS = {
    "PMIx": {"PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "0"},
    "pmi2": {"PMI_SIZE": "1", "PMI_RANK": "0", "PMI_FD": "77", "PMIX_NAMESPACE": "x"},
    "empty": dict.fromkeys(["PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"], "")
    | dict.fromkeys(["PMIX_RANK", "MPI_LOCALNRANKS", "SLURM_PROCID", "SLURM_CPUS_PER_TASK"], "")
    | dict.fromkeys(["SLURM_JOB_NUM_NODES", "OMP_NUM_THREADS", supervisor.SOCKET_VARIABLE], ""),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_variables_of_a_shell_that_is_no_rank(tiny, shell):
    argv = ["generate", "Hello", "--model", tiny, "-n", "4", "--json"]
    assert result_of(under_launcher(argv, ranks=2, **SHELLS[shell]))["stats"]["tp"] == 2


def open_mpi():
    """Return Open MPI's mpirun and the variables with which mpi4py uses it; skip if it is not installed."""
    names = [shutil.which(name) for name in ("mpirun.openmpi", "mpirun")]
    installed = [str(path) for path in Path("/opt").glob("*openmpi*/bin/mpirun")]
    for mpirun in filter(None, [*names, *installed]):
        version = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
        if "Open MPI" in version or "Open RTE" in version or "PRRTE" in version:
            break
    else:
        pytest.skip("no mpirun of Open MPI is installed")
    libraries = [Path(mpirun).resolve().parent.parent / "lib" / "libmpi.so.40", "libmpi.so.40"]
    for library in map(str, libraries):
        variables = {"MPI4PY_LIBMPI": library}
        code = "from mpi4py import MPI; print(MPI.Get_library_version())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}
        )
        if "Open MPI" in done.stdout:
            return mpirun, variables
    pytest.skip(f"mpi4py does not find the libmpi.so.40 of {mpirun}")


def test_open_mpi(tiny, endless, capsys):
    mpirun, variables = open_mpi()
    argv = ["generate", "Hello", "--model", tiny, "-n", "24", "--json"]
    expected = alone(argv, capsys)["token_ids"]
    launcher = {**variables, "MINITP_TEST_MPIRUN": mpirun}
    assert result_of(under_launcher(argv, **launcher))["token_ids"] == expected
    assert result_of(under_mpirun(argv, mpirun=mpirun, **OPEN_MPI, **variables))["token_ids"] == expected
    check_fault_under_launcher("kill forward 2", endless, **launcher)
    check_fault_under_launcher("raise forward 1", endless, **launcher)


# --- faults ---------------------------------------------------------------------------------------------


def check_fault_under_launcher(fault, endless, **variables):
    _, place, rank = fault.split()
    running = under_launcher(endless, **faulty(fault), **variables)
    if place == "forward":
        running.wait_for_output()
    code, _, err = running.end(END_S if place == "forward" else START_S)
    assert code == 3, err
    said = [line for line in err.splitlines() if line.startswith("minitp: ")]
    assert len(said) == 1, err
    assert said[0].startswith(f"minitp: rank {rank} "), err
    assert "Traceback" not in err
    return said[0], err.splitlines()


def test_rank_is_killed(endless):
    said, lines = check_fault_under_launcher("kill forward 2", endless)
    assert "died: killed" in said
    assert "(pid " in said
    assert lines == [said, "  last words of rank 2"]


def test_rank_0_is_killed(endless):
    said, lines = check_fault_under_launcher("kill forward 0", endless)
    assert "died: killed" in said
    assert lines == ["last words of rank 0", said], "rank 0 writes to the launcher's stderr"


def test_rank_is_stopped(endless):
    running = under_launcher(endless, **faulty("stop forward 2"), MINITP_TEST_LOST_S="2")
    running.wait_for_output()
    code, _, err = running.end(END_S)
    assert code == 3
    late, lost = [line for line in err.splitlines() if line.startswith("minitp: ")]
    who = r"rank 2 \(pid \d+ on \S+\)"
    assert re.fullmatch(rf"minitp: rank 0 \(pid \d+ on \S+\) has waited 1 s for {who}", late)
    assert re.fullmatch(rf"minitp: rank 0 failed: waited 2 s for {who}: it, or a rank .*", lost)


def test_no_rank_gives_up_on_rank_0(tiny, capsys):
    argv = ["generate", "Hello", "--model", tiny, "-n", "24", "--json"]
    running = under_launcher(
        [*argv, "--comm", "mpi"], ranks=2, **faulty("lag forward 0"), MINITP_TEST_LOST_S="1"
    )
    code, out, err = running.end(START_S)
    assert (code, err) == (0, "last words of rank 0\n")
    assert json.loads(out)["token_ids"] == alone(argv, capsys)["token_ids"]


def test_rank_exits_without_a_message(endless):
    assert "died" in check_fault_under_launcher("exit forward 3", endless)[0]


def test_rank_is_killed_while_loading(endless):
    assert "died" in check_fault_under_launcher("kill loading 1", endless)[0]


def test_rank_raises(endless):
    said, lines = check_fault_under_launcher("raise forward 1", endless)
    assert said == "minitp: rank 1 failed: ZeroDivisionError: a fault for the test"
    assert lines[:2] == [said, "  last words of rank 1"]


def test_rank_raises_while_loading(endless):
    said, _ = check_fault_under_launcher("raise loading 3", endless)
    assert said == "minitp: rank 3 failed: ZeroDivisionError: a fault for the test"


@pytest.mark.parametrize("place", ["forward", "loading"])
def test_verbose_shows_the_traceback(endless, place):
    running = under_launcher([*endless, "-v"], ranks=2, **faulty(f"raise {place} 1"))
    code, _, err = running.end(START_S)
    assert code == 3
    assert "Traceback" in err
    assert "faulty_worker.py" in err, "the frame that raised"


def test_rank_is_killed_before_it_has_connected(endless):
    """Kill a rank before the supervisor knows it: the report names mpirun, or a rank that mpirun ended."""
    code, out, err = under_launcher(endless, **faulty("kill starting 1")).end(START_S)
    assert (code, out) == (3, "")
    assert re.match(
        r"minitp: (mpirun ended with code [0-9]+ before all ranks had started|rank [0-9] .*)\n", err
    )
    assert err.count("minitp: ") == 1
    assert "Traceback" not in err


def test_rank_does_not_start(endless):
    """Let a rank exit at once: some mpiruns ignore that, and the other ranks wait in MPI_Init."""
    running = under_launcher(endless, ranks=2, **faulty("exit starting 1"), MINITP_TEST_START_LIMIT_S="4")
    code, _, err = running.end(START_S)
    assert code == 3
    assert re.match(
        r"minitp: (ranks \[1\] have not started within 4 s|mpirun ended with code [0-9]+)", err
    ), err
    assert "  last words of rank 1\n" in err


def test_rank_lacks_a_package(endless):
    running = under_launcher(endless, ranks=2, **faulty("raise importing 1"), MINITP_TEST_START_LIMIT_S="8")
    code, _, err = running.end(START_S)
    assert code == 3
    assert err.startswith("minitp: rank 1 ")
    assert "ml_dtypes" in err


def test_ranks_wait_for_a_slow_rank(tiny, capsys):
    argv = ["generate", "Hello", "--model", tiny, "-n", "24", "--json"]
    expected = alone(argv, capsys)
    result = result_of(under_launcher(argv, **faulty("lag forward 2")))
    assert result["token_ids"] == expected["token_ids"]
    assert result["stats"]["comm_share"] > 0.5, "rank 0 waited for three seconds"
    assert 23 / result["stats"]["decode_tokens_per_s"] > 3


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_job(endless, number, expected):
    running = under_launcher(endless)
    running.wait_for_output()
    assert len(running.processes()) >= 6, "the launcher, mpirun, four ranks"
    os.killpg(running.process.pid, number)
    code, _, err = running.end(END_S)
    assert code == expected
    assert err == ""


def test_launcher_is_killed(endless):
    running = under_launcher(endless)
    running.wait_for_output()
    assert len(running.processes()) >= 6
    running.process.kill()
    running.process.wait()
    running.check_nothing_is_left(within=END_S)
    running.process.communicate()


@pytest.mark.parametrize("fault", ["kill forward 1", "raise forward 2", "raise loading 1"])
def test_fault_under_bare_mpirun(endless, fault):
    kind, place, rank = fault.split()
    running = under_mpirun(endless, worker=FAULTY_WORKER, **faulty(fault))
    if place == "forward":
        running.wait_for_output()
    code, _, err = running.end(END_S if place == "forward" else START_S)
    assert code != 0
    if kind == "raise":
        assert code == 3
        assert err.count(f"minitp: rank {rank} failed: ZeroDivisionError: a fault for the test\n") == 1


def test_tp_against_the_world(tiny):
    argv = ["generate", "Hello", "--model", tiny, "-n", "4"]
    code, out, err = under_mpirun([*argv, "--tp", "3"], ranks=2).end(START_S)
    assert code == 2
    assert out == ""
    assert err.count("minitp: --tp 3, but MPI started 2 ranks") == 1
    assert "Traceback" not in err


def test_bad_input_under_mpirun_is_reported_once(tiny):
    code, out, err = under_mpirun(["generate", "", "--model", tiny], ranks=2).end(START_S)
    assert code == 2
    assert out == ""
    assert err.count("minitp: the prompt is empty") == 1


def test_bad_usage_under_mpirun_is_reported_once(tiny):
    code, out, err = under_mpirun(["generate", "hi", "--model", tiny, "--nope"], ranks=2).end(START_S)
    assert code == 2
    assert out == ""
    assert err.count("minitp: unrecognized option --nope") == 1


# --- a missing, foreign or broken mpirun ----------------------------------------------------------------


def script(path, text):
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return str(path)


def test_no_mpirun(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert cli.main(["generate", "hi", "--model", str(tiny), "--tp", "4"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("minitp: no mpirun found; ")
    assert captured.err.count("\n") == 1
    assert "--tp 1" in captured.err


# An mpirun that starts ranks as that of another MPI would: each rank sees a world of one.
OF_ANOTHER_MPI = """
import os, subprocess, sys
size, command = int(sys.argv[2]), sys.argv[3:]
env = os.environ | {"OMPI_COMM_WORLD_SIZE": str(size), "PYTHONWARNINGS": "ignore"}
ranks = [subprocess.Popen(command, env=env | {"OMPI_COMM_WORLD_RANK": str(r)}) for r in range(size)]
sys.exit(max(rank.wait() for rank in ranks))
"""


def test_mpirun_of_another_mpi(endless, tmp_path):
    mpirun = script(tmp_path / "mpirun", OF_ANOTHER_MPI)
    code, out, err = under_launcher(endless, ranks=2, MINITP_TEST_MPIRUN=mpirun).end(START_S)
    assert code == 3
    assert out == ""
    assert "mpirun started 2 processes but mpi4py sees a world of 1: they belong to different MPIs" in err
    assert err.count("different MPIs") == 1


def test_lone_process_of_another_mpi(endless):
    code, out, err = Running([*WORKER, *endless], PMI_SIZE="4", PMI_RANK="0").end(START_S)
    assert code == 3
    assert out == ""
    assert err.startswith("minitp: mpirun started 4 processes but mpi4py sees a world of 1")
    assert err.count("\n") == 1


def test_mpirun_that_fails(endless, tmp_path):
    mpirun = script(tmp_path / "mpirun", "import sys; sys.exit('not enough slots')")
    code, out, err = under_launcher(endless, MINITP_TEST_MPIRUN=mpirun).end(START_S)
    assert (code, out) == (3, "")
    assert err == "minitp: mpirun ended with code 1 before all ranks had started\n  not enough slots\n"


def test_mpirun_that_starts_nothing(endless, tmp_path, monkeypatch, capsys):
    mpirun = script(tmp_path / "mpirun", "import time; time.sleep(600)")
    monkeypatch.setattr(supervisor, "START_LIMIT_S", 1)
    monkeypatch.setattr(supervisor, "find_mpirun", lambda: mpirun)
    started = time.monotonic()
    assert cli.main([*map(str, endless), "--tp", "2"]) == 3
    assert time.monotonic() - started < END_S
    assert capsys.readouterr().err == "minitp: ranks [0, 1] have not started within 1 s\n"


def test_only_the_first_exit_message_of_a_rank_counts():
    """Send two exit messages, as a rank does whose MPI_Abort returns."""
    ours, its = socket.socketpair()
    with ours, its, tempfile.TemporaryDirectory() as folder:
        ranks = supervisor.RankProcesses(Path(folder), size=4)
        its.sendall(b'{"exit": 3, "error": "the cause"}\n{"exit": 3, "error": null}\n')
        with pytest.raises(RankError, match=r"^rank 2 failed: the cause$"):
            ranks.receive(supervisor.Rank(2, its.fileno(), ours))
        ranks.end()


# --- the launcher in unusual environments ---------------------------------------------------------------


def test_closed_stdout(tiny):
    argv = [*WORKER, "generate", "Hello", "--model", str(tiny), "-n", "2", "--tp", "2"]
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *argv], stderr=subprocess.PIPE)
    assert done.returncode in (0, 3)
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk(tiny):
    with open("/dev/full", "wb") as full:
        argv = ["generate", "Hello", "--model", tiny, "-n", "2"]
        code, _, err = under_launcher(argv, ranks=2, stdout=full).end(START_S / 6)
    assert code == 3
    assert err.count("minitp: ") == 1
    assert "No space left on device" in err
    assert "Traceback" not in err
