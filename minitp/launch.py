"""The front: a process outside MPI that starts the ranks with mpirun, watches them, and ends them.

Each rank connects to the front's Unix socket as soon as it starts and keeps the connection until it ends.
So the front knows which process is which rank, and sees at once when one is gone: the connection closes,
however the process died. Over the same connection the front hands its own stdout and stderr to rank 0 (as
file descriptors), so a terminal is a terminal for rank 0 and nothing has to be copied; the other ranks write
to a file each, of which the end is shown if they die.

    rank -> front    {"rank": 2, "pid": 4711}        then the descriptors come back
    rank -> front    {"exit": 0, "error": null}      its last message
"""

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from minitp.errors import RankError

WORKER = [sys.executable, "-m", "minitp"]
SOCKET_VARIABLE = "MINITP_FRONT"
START_LIMIT_S = 60  # until all ranks have connected
LONGEST_PARENT = 80  # a Unix socket's path has at most 103 bytes (macOS) or 107 (Linux)
END_LIMIT_S = 10  # from the last rank's last message to the end of mpirun

# Open MPI refuses root and more ranks than cores unless told; it binds each rank to a core; and its waiting
# ranks would keep the others' cores. The names differ between version 4 and 5; other MPIs ignore them.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def find_mpirun():
    """The mpirun beside this Python, whose MPI mpi4py finds as well; else that of the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        raise RankError("no mpirun found: pip install 'minitp[mpi]', or install an MPI, or use --tp 1")
    return found


def run_ranks(command, size, environment, verbose=False):
    """Start `size` ranks of `command`, wait for their end, and return the exit code of the whole job.

    Returns 3, after naming the rank on stderr, if one dies or fails by itself; 130 on Ctrl-C, 143 on SIGTERM.
    No process of the job is left when this returns.
    """
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_PARENT:
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="minitp-", dir=parent, ignore_cleanup_errors=True) as folder:
        job = Job(Path(folder), size, verbose)
        try:
            with raised_on_sigterm():
                job.start([find_mpirun(), "-n", str(size), *command], environment)
                return job.watch()
        except Terminated:
            return 143
        except KeyboardInterrupt:
            return 130
        finally:
            job.end()


class Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def raised_on_sigterm():
    """SIGTERM raises Terminated here, so that the ranks are ended on this way out as well."""

    def raise_terminated(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Rank:
    """What the front knows of one rank."""

    def __init__(self, rank, pid, connection):
        self.rank, self.pid, self.connection = rank, pid, connection
        self.exit_code = None  # until it says so itself
        self.received = b""


class Job:
    """mpirun and its ranks."""

    def __init__(self, folder, size, verbose):
        self.folder, self.size, self.verbose = folder, size, verbose
        self.ranks = {}
        self.mpirun = None
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "front"))
        self.listener.listen(size)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def start(self, command, environment):
        """Start mpirun, in a session of its own: Ctrl-C on the terminal is for the front to act on."""
        environment = {**OPEN_MPI, **environment, SOCKET_VARIABLE: str(self.folder / "front")}
        with open(self.folder / "mpirun", "wb") as output:
            self.mpirun = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def watch(self):
        """Return the job's exit code, once all ranks have given theirs or one has failed."""
        started = time.monotonic()
        while len(self.ranks) < self.size or any(rank.exit_code is None for rank in self.ranks.values()):
            for key, _ in self.selector.select(timeout=0.2):
                if key.fileobj is self.listener:
                    self.welcome()
                elif not self.hear(key.data):
                    return RankError.exit_code
            if len(self.ranks) < self.size:
                if self.mpirun.poll() is not None:
                    return self.fail_to_start()
                if time.monotonic() - started > START_LIMIT_S:
                    missing = sorted(set(range(self.size)) - set(self.ranks))
                    return self.fail(f"ranks {missing} have not started within {START_LIMIT_S} s")
        try:
            self.mpirun.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return self.fail(f"mpirun has not ended within {END_LIMIT_S} s of its last rank")
        return max(rank.exit_code for rank in self.ranks.values())

    def fail_to_start(self):
        """A process has ended while ranks were starting; which was the first, only mpirun may know."""
        try:
            code = self.mpirun.wait(2)
        except subprocess.TimeoutExpired:
            return self.fail("a rank has ended before all had started")
        return self.fail(f"mpirun ended with code {code} before all ranks had started")

    def welcome(self):
        """A rank has connected: note who it is and give it its stdout and stderr."""
        connection, _ = self.listener.accept()
        connection.settimeout(END_LIMIT_S)
        line = b""
        with suppress(OSError):
            line = connection.makefile("rb").readline()
        if not line:  # it died in between; mpirun will end, and say why
            connection.close()
            return
        hello = json.loads(line)
        rank = Rank(hello["rank"], hello["pid"], connection)
        self.ranks[rank.rank] = rank
        self.selector.register(connection, selectors.EVENT_READ, rank)
        with open(self.folder / f"rank{rank.rank}", "wb") as words:
            streams = [1, 2] if rank.rank == 0 else [words.fileno(), words.fileno()]
            with suppress(BrokenPipeError):  # it may have died meanwhile
                socket.send_fds(connection, [b"\n"], streams)

    def hear(self, rank):
        """Take what a rank says; False if it has failed or is gone without a last message."""
        try:
            data = rank.connection.recv(65536)
        except ConnectionResetError:
            data = b""
        rank.received += data
        line, newline, _ = rank.received.partition(b"\n")
        if newline and rank.exit_code is None:  # the first is the last that counts
            message = json.loads(line)
            rank.exit_code = message["exit"]
            if message["error"] is not None:
                self.fail(f"rank {rank.rank} failed: {message['error']}", rank)
                return False
        if not data:
            self.selector.unregister(rank.connection)
            if rank.exit_code is None and len(self.ranks) < self.size:
                self.fail_to_start()
                return False
            if rank.exit_code is None:
                self.fail(f"rank {rank.rank} (pid {rank.pid}) died: killed, out of memory, or crashed", rank)
                return False
        return True

    def words_of(self, name):
        """The lines that "mpirun" or "rank2" has written to its file."""
        path = self.folder / name
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def fail(self, message, rank=None):
        """Say what went wrong, with the last words of the rank (of mpirun, if it is no rank's failure)."""
        print(f"minitp: {message}", file=sys.stderr)
        for line in self.words_of(f"rank{rank.rank}" if rank else "mpirun")[-20:]:
            print(f"  {line}", file=sys.stderr)
        return RankError.exit_code

    def end(self):
        """End whatever still runs: mpirun first, which ends its ranks, then those that it left."""
        if self.mpirun is not None and self.mpirun.poll() is None:
            self.mpirun.terminate()
            try:
                self.mpirun.wait(2)
            except subprocess.TimeoutExpired:
                self.mpirun.kill()
                self.mpirun.wait()
        for rank in self.ranks.values():
            if not self.closed(rank):
                _kill(rank.pid)
            rank.connection.close()
        if self.verbose:
            self.show_words()
        self.listener.close()
        self.selector.close()

    def closed(self, rank):
        """Whether a rank's process has ended, which closes its end of the connection."""
        rank.connection.setblocking(False)
        try:
            return rank.connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def show_words(self):
        for name in ["mpirun", *[f"rank{rank}" for rank in range(1, self.size)]]:
            for line in self.words_of(name):
                print(f"[{name}] {line}", file=sys.stderr)


def _kill(pid):
    with suppress(ProcessLookupError):  # it may be gone by now
        os.kill(pid, signal.SIGKILL)
