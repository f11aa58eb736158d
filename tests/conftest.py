"""Fixtures that several test files share."""

import signal

import pytest
from on_gpu import stand_in
from refusal import check_refusal
from tiny import write_tiny

from minitp.cli.main import main
from minitp.comm.single import SingleRank
from minitp.launch.supervisor import RankProcesses
from minitp.launch.transport import select_comm


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Let Ctrl-C end the tests and the processes that they start, even if a shell started them with &."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The read-only directory of a tiny model with a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cupy():
    """The stand-in for CuPy, for all tests of a file."""
    with stand_in() as module:
        yield module


@pytest.fixture(scope="module")
def comm():
    """The Comm of a single rank on a real GPU."""
    return select_comm(SingleRank(), "cuda")


@pytest.fixture
def gpu(comm):
    return comm.gpu


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a command that must fail with one line on stderr, in this process; return that line."""

    def no_ranks(*_, **__):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(RankProcesses, "start", no_ranks)

    def run(*argv):
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        check_refusal(code, captured.out, captured.err)
        return captured.err

    return run
