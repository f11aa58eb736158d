"""The ranks as the front has them: started with mpirun, watched, talked to, and ended.

Each rank connects to the front's Unix socket as soon as it starts and keeps the connection until it ends.
So the front knows which process is which rank, and sees at once when one is gone: the connection closes,
however the process died. What a rank writes goes to a file of its own, the end of which is shown if it dies;
or, for rank 0, to the front's own stdout and stderr, which the front hands over (as file descriptors), so
that a terminal is a terminal for rank 0 and nothing has to be copied.

    rank -> front      {"rank": 2, "pid": 4711}        then the descriptors come back
    rank -> front      {"exit": 0, "error": null}      its last message
    front <-> rank 0   any other object, a line of JSON each: requests and what comes of them
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
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from minitp.errors import RankError
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE, limit_blas_threads

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

# The front's socket is on this host, and so are its ranks, whatever hosts a batch system has set aside.
THIS_HOST = {
    "HYDRA_RMK": "user",
    "HYDRA_LAUNCHER": "fork",
    "OMPI_MCA_plm": "isolated",
    "OMPI_MCA_ras": "^slurm,tm,lsf,gridengine",
    "PRTE_MCA_plm": "^slurm,lsf,tm",
    "PRTE_MCA_ras": "^slurm,lsf,pbs,gridengine",
}


def find_mpirun():
    """The mpirun beside this Python, whose MPI mpi4py finds as well; else that of the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        raise RankError("no mpirun found: pip install 'minitp[mpi]', or install an MPI, or use --tp 1")
    return found


def mpi_environment(size):
    """Variables for an mpirun of `size` ranks on this host, each with its share of the cores."""
    environment = {**OPEN_MPI, **os.environ, **THIS_HOST}
    environment.pop("HYDRA_HOST_FILE", None)
    limit_blas_threads(environment, size)
    return environment


@contextmanager
def rank_processes(size, verbose=False, streams=None):
    """A RankProcesses that has ended, and its files gone, when the block is left."""
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_PARENT:
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="minitp-", dir=parent, ignore_cleanup_errors=True) as folder:
        job = RankProcesses(Path(folder), size, verbose, streams)
        try:
            yield job
        finally:
            job.end()


class Rank:
    """What the front knows of one rank."""

    def __init__(self, rank, pid, connection):
        self.rank, self.pid, self.connection = rank, pid, connection
        self.exit_code = None  # until it says so itself
        self.received = b""  # the beginning of a line
        self.telling = threading.Lock()  # held while something is sent to it


class RankProcesses:
    """mpirun and its ranks; or the one rank, which needs no mpirun.

    Parameters
    ----------
    folder : Path
        For the socket, and for what the ranks write.
    size : int
    verbose : bool
        Show in the end what they have written.
    streams : (int, int) or None
        The descriptors that rank 0 gets as its stdout and stderr; None: a file, as the others.
    """

    def __init__(self, folder, size, verbose=False, streams=None):
        self.folder, self.size, self.verbose, self.streams = folder, size, verbose, streams
        self.ranks = {}
        self.on_message = None  # gets what rank 0 says, if it says anything
        self.leader = None  # mpirun, or the only rank
        self.given_up = False  # set by another thread, it ends `watch`
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "front"))
        self.listener.listen(size)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def start(self, command):
        """Start the ranks, in a session of their own: Ctrl-C on the terminal is for the front to act on."""
        environment = {**mpi_environment(self.size), SOCKET_VARIABLE: str(self.folder / "front")}
        environment.setdefault("HF_HUB_OFFLINE", "1")  # what was to be fetched lies in the cache now
        if self.size == 1:
            environment[ALONE_VARIABLE] = "1"
        else:
            command = [find_mpirun(), "-n", str(self.size), *command]
            warn_of_other_nodes(os.environ)
        with open(self.folder / "mpirun", "wb") as output:
            self.leader = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def watch(self):
        """Return the job's exit code, once all ranks have given theirs.

        Raises
        ------
        RankError
            as soon as one has failed, with its last words
        """
        started = time.monotonic()
        while len(self.ranks) < self.size or any(rank.exit_code is None for rank in self.ranks.values()):
            for key, _ in self.selector.select(timeout=0.2):
                if key.fileobj is self.listener:
                    self.welcome()
                else:
                    self.hear(key.data)
            if self.given_up:
                return RankError.exit_code
            if len(self.ranks) < self.size:
                if self.leader.poll() is not None:
                    self.fail_to_start()
                if time.monotonic() - started > START_LIMIT_S:
                    missing = sorted(set(range(self.size)) - set(self.ranks))
                    self.fail(f"ranks {missing} have not started within {START_LIMIT_S} s")
        try:
            self.leader.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.fail(f"mpirun has not ended within {END_LIMIT_S} s of its last rank")
        return max(rank.exit_code for rank in self.ranks.values())

    def fail_to_start(self):
        """A process has ended while ranks were starting; which was the first, only mpirun may know."""
        try:
            code = self.leader.wait(2)
        except subprocess.TimeoutExpired:
            self.fail("a rank has ended before all had started")
        if self.size == 1:
            self.fail(f"rank 0 ended with code {code} while it was starting")
        self.fail(f"mpirun ended with code {code} before all ranks had started")

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
        with open(self.folder / f"rank{rank.rank}", "wb") as words:
            streams = self.streams if rank.rank == 0 and self.streams else [words.fileno()] * 2
            with suppress(BrokenPipeError):  # it may have died meanwhile
                socket.send_fds(connection, [b"\n"], streams)
        self.ranks[rank.rank] = rank  # from now on it can be told something
        self.selector.register(connection, selectors.EVENT_READ, rank)

    def tell(self, message):
        """Send rank 0 an object; any thread may, once it has connected. One that is gone hears nothing."""
        rank = self.ranks[0]
        line = json.dumps(message, default=lambda number: number.item())  # NumPy's
        try:
            with rank.telling:
                rank.connection.sendall(line.encode() + b"\n")
        except TimeoutError:
            raise RankError(f"rank 0 (pid {rank.pid}) has taken no message for {END_LIMIT_S} s") from None
        except OSError:
            pass  # it is gone, which `watch` says better

    def hear(self, rank):
        """Take what a rank says; RankError if it has failed or is gone without a last message."""
        try:
            data = rank.connection.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        *lines, rank.received = (rank.received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "exit" not in message:
                self.on_message(message)
            elif rank.exit_code is None:  # the first is the last that counts
                rank.exit_code = message["exit"]
                if message["error"] is not None:
                    self.fail(f"rank {rank.rank} failed: {message['error']}", rank)
        if not data:
            self.selector.unregister(rank.connection)
            if rank.exit_code is None and len(self.ranks) < self.size:
                self.fail_to_start()
            if rank.exit_code is None:
                self.fail(f"rank {rank.rank} (pid {rank.pid}) died: killed, out of memory, or crashed", rank)

    def words_of(self, name):
        """The lines that "mpirun" or "rank2" has written to its file."""
        path = self.folder / name
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def fail(self, message, rank=None):
        """Raise what went wrong, with the last words of the rank (of mpirun, if it is no rank's failure)."""
        raise RankError(message, self.words_of(f"rank{rank.rank}" if rank else "mpirun")[-20:])

    def end(self):
        """End whatever still runs: mpirun first, which ends its ranks, then those that it left."""
        if self.leader is not None and self.leader.poll() is None:
            self.leader.terminate()
            try:
                self.leader.wait(2)
            except subprocess.TimeoutExpired:
                self.leader.kill()
                self.leader.wait()
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
        for name in ["mpirun", *[f"rank{rank}" for rank in range(self.size)]]:
            for line in self.words_of(name):
                print(f"[{name}] {line}", file=sys.stderr)


def warn_of_other_nodes(environment):
    """Of a batch system's allocation only this host is used."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if nodes > 1:
        print(
            f"minitp: warning: all ranks start on this host, one of the {nodes} nodes of the allocation; "
            "srun -K --mpi=pmi2 minitp .. or mpirun minitp .. without --tp uses all",
            file=sys.stderr,
        )


def _kill(pid):
    with suppress(ProcessLookupError):  # it may be gone by now
        os.kill(pid, signal.SIGKILL)
