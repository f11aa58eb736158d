"""Tests of `minitp tour`: invalid input, and the exit after a closed pipe or a signal."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import GOLDENS
from running import START_S, Running, under_mpirun
from tiny import write_tiny

pytestmark = pytest.mark.mpi

COMMAND = [sys.executable, "-m", "minitp", "tour"]
LONG = ["--tokens", "1,2,3", "-n", "400000"]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The directory of a model that generates text for minutes."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    return write_tiny(directory, tokenizer=False, max_position_embeddings=1_000_000, eos_token_id=None)


@pytest.mark.parametrize("ranks", [1, 3])
def test_exit_without_messages_after_a_closed_pipe(endless, ranks):
    running = Running([*COMMAND, *LONG, "--model", endless, "--tp", ranks])
    running.wait_for_output()
    running.process.stdout.close()
    running.process.stdout = None
    assert running.end(START_S) == (0, "", "")


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_without_messages_after_a_signal(endless, ranks, number, expected):
    running = Running([*COMMAND, *LONG, "--model", endless, "--tp", ranks])
    running.wait_for_output()
    os.kill(running.process.pid, number)
    code, _, err = running.end(START_S)
    assert (code, err) == (expected, "")


def test_exit_code_is_that_of_the_ranks():
    code, out, err = Running([*COMMAND, "--tokens", "1,2", "--model", GOLDENS / "qwen3", "--tp", 2]).end(
        START_S
    )
    assert (code, out) == (2, "")
    assert err == "minitp tour: config.json: model_type 'qwen3' is not supported; use `minitp generate`\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["Hello", "--tokens", "1,2"], "tour accepts a PROMPT or --tokens 1,2,3, but not both"),
        (["Hello", "--tp", "10"], "--tp 10: this model has 9 attention heads"),
        (["Hello", "--model", "random:smollm2-135m"], "the tour needs a checkpoint in Hugging Face's format"),
        (["Hello", "--model", GOLDENS / "llama2"], "has no tokenizer.json; give --tokens 1,2,3"),
    ],
)
def test_invalid_input_is_rejected_before_ranks_start(argv, words):
    done = subprocess.run([*COMMAND, *map(str, argv)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_tp_that_contradicts_the_mpi_world():
    code, out, err = under_mpirun(["tour", "Hello", "--tp", "4"], ranks=2).end(START_S)
    assert (code, out) == (2, "")
    assert "--tp 4, but MPI started 2 ranks" in err


def test_auto_uses_the_mpi_world():
    argv = ["tour", "--tokens", "1,2,3", "-n", "2", "--model", GOLDENS / "llama2", "--tp", "auto"]
    code, out, err = under_mpirun(argv, ranks=3).end(START_S)
    assert (code, len(out.split()), err) == (0, 2, "")


def test_threads_are_shared_among_the_ranks():
    code = "import os, minitp.tour; print(os.environ['OMP_NUM_THREADS'])"
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for ranks, threads in ((1, os.cpu_count()), (10_000, 1)):
        environment = kept | {"MPI_LOCALNRANKS": str(ranks)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == f"{threads}\n"


def test_chat_with_a_bad_option_ends_all_ranks_under_mpirun():
    """Reject an option on rank 0 while the other ranks wait for it."""
    started = time.monotonic()
    code, out, err = under_mpirun(["chat", "--max-context", "0"], ranks=2).end(START_S)
    assert (code, out) == (2, "")
    assert err.startswith("minitp: --max-context 0: ")
    assert time.monotonic() - started < START_S / 2
