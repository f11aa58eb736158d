"""Tests of a second SIGTERM or Ctrl-C while a command ends: no traceback, and an exit code of the two.

test_server_processes has those of `serve`.
"""

import os
import signal
import sys
import time

import pytest
from running import END_S, WORKER, Running
from served import write_chatty
from tiny import write_tiny

pytestmark = pytest.mark.mpi
INT, TERM = signal.SIGINT, signal.SIGTERM
CODES = {INT: 130, TERM: 143}
TOKENS = ["--tokens", "1,2,3", "-n", "400000"]
WITH_INPUT = ["bash", "-c", 'exec "$@" <"$0"']  # the first argument is the file for stdin


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The directory of a model that generates for minutes."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    return write_tiny(directory, tokenizer=False, max_position_embeddings=1_000_000, eos_token_id=None)


def check_two_signals(running, first, second, delay):
    """Send both signals to a running command, whose ranks have started, and check how it ends."""
    os.kill(running.process.pid, first)
    time.sleep(delay)
    if running.process.poll() is None:
        os.kill(running.process.pid, second)
    code, _, err = running.end(END_S)
    assert err == ""
    assert code in (CODES[first], CODES[second])  # on a busy machine, Python may see both at once


@pytest.mark.parametrize(
    ("first", "second", "delay"),
    [(TERM, TERM, 0), (TERM, INT, 0.002), (INT, TERM, 0.01), (INT, INT, 0.02), (TERM, TERM, 0.05)],
)
def test_generate(endless, first, second, delay):
    running = Running([*WORKER, "generate", *TOKENS, "--model", endless, "--tp", 2])
    running.wait_for_output()
    check_two_signals(running, first, second, delay)


@pytest.mark.parametrize(("command", "ranks"), [("generate", 1), ("tour", 1), ("tour", 2)])
def test_a_command_that_prints(endless, command, ranks):
    running = Running([*WORKER, command, *TOKENS, "--model", endless, "--tp", ranks])
    running.wait_for_output()
    check_two_signals(running, TERM, INT, 0.01)


@pytest.mark.parametrize("argv", [["check", *TOKENS[:2], "--decode", "400000"], ["bench", "-n", "400000"]])
def test_a_command_that_prints_at_its_end(endless, argv):
    running = Running([*WORKER, *argv, "--model", endless, "--tp", 2])
    deadline = time.monotonic() + END_S
    while len(running.processes()) < 4:  # the launcher, mpirun, two ranks
        assert time.monotonic() < deadline
        time.sleep(0.05)
    check_two_signals(running, INT, TERM, 0.01)


def test_chat(tmp_path):
    model = write_chatty(tmp_path / "model")
    (tmp_path / "messages").write_text("Hi\n" * 100_000)
    command = [*WITH_INPUT, tmp_path / "messages", sys.executable, "-m", "minitp", "chat"]
    running = Running([*command, "--model", model, "--tp", 2])
    running.wait_for_output()
    check_two_signals(running, TERM, INT, 0.01)
