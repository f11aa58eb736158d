"""Commands that tests start, whose processes carry a mark, so that a test can find any that are left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from paths import FAULTY_WORKER

from minitp.cli import main as cli
from minitp.launch import supervisor

WORKER = [sys.executable, "-m", "minitp"]

# The minitp command, with mpirun, the worker command and START_LIMIT_S from the environment.
LAUNCHER = [
    sys.executable,
    "-c",
    "import os, sys\n"
    "from minitp.cli.main import main\n"
    "from minitp.launch import supervisor\n"
    "from minitp.launch.run import WORKER\n"
    "mpirun = os.environ.get('MINITP_TEST_MPIRUN')\n"
    "if mpirun: supervisor.find_mpirun = lambda: mpirun\n"
    "supervisor.START_LIMIT_S = int(os.environ.get('MINITP_TEST_START_LIMIT_S', supervisor.START_LIMIT_S))\n"
    "worker = os.environ.get('MINITP_TEST_WORKER')\n"
    "sys.exit(main(sys.argv[1:], worker=worker.split('|') if worker else WORKER))",
]

MARK = "MINITP_TEST_MARK"
END_S = 10  # time from a fault to the end of the job
START_S = 120  # time limit of a short run on a busy machine


class Running:
    """A command whose processes, down to the last rank, carry a mark in their environment."""

    def __init__(self, command, stdout=subprocess.PIPE, **variables):
        self.mark = f"{MARK}={uuid.uuid4()}"
        # The path is short, because the supervisor's socket is in it. The folder is new, so that a test can
        # check that it is empty in the end.
        self.folder = Path(tempfile.mkdtemp(prefix="t-"))
        environment = {**os.environ, **variables, "TMPDIR": str(self.folder)}
        environment[MARK] = self.mark.partition("=")[2]
        environment.pop("PYTHONUNBUFFERED", None)  # it would hide output that stays in a buffer
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a separate process group, as a shell would create
        )

    def wait_for_output(self):
        """Wait until rank 0 has written something, which means that it is generating."""
        assert os.read(self.process.stdout.fileno(), 1), self.process.stderr.read().decode()

    def end(self, within):
        """Wait for the end, check that no process is left, and return (exit code, stdout, stderr)."""
        try:
            out, err = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            self.kill_all()
            out, err = self.process.communicate()
            pytest.fail(f"still running after {within} s; stderr:\n{err.decode()}")
        self.check_nothing_is_left(within=2)
        return self.process.returncode, (out or b"").decode(errors="replace"), err.decode()

    def check_nothing_is_left(self, within):
        deadline = time.monotonic() + within
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.processes()
        self.kill_all()
        assert not left
        if self.process.returncode != -signal.SIGKILL:
            assert [path.name for path in self.folder.glob("minitp-*")] == []
        shutil.rmtree(self.folder)

    def processes(self):
        """Return {pid: command line} of all processes with the mark."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (
                        (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
            except OSError:
                pass  # the process has just ended, or is another user's
        return found

    def kill_all(self):
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def under_launcher(argv, ranks=4, **options):
    return Running([*LAUNCHER, *argv, "--tp", ranks], **options)


def under_mpirun(argv, ranks=4, worker=WORKER, mpirun=None, **variables):
    return Running([mpirun or supervisor.find_mpirun(), "-n", ranks, *worker, *argv], **variables)


def faulty(fault):
    return {"MINITP_TEST_FAULT": fault, "MINITP_TEST_WORKER": "|".join(FAULTY_WORKER)}


def result_of(running):
    """Wait for a run and return the JSON object that it printed."""
    code, out, err = running.end(START_S)
    assert (code, err) == (0, "")
    return json.loads(out)


def alone(argv, capsys):
    """Run the command without MPI, in this process; return the JSON object that it printed."""
    assert cli.main([*map(str, argv), "--tp", "1"]) == 0
    return json.loads(capsys.readouterr().out)
