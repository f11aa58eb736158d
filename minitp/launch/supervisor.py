"""The supervisor, which starts the ranks, watches them, exchanges messages with rank 0, and ends them.

Each rank connects to the supervisor's Unix socket as soon as it starts and keeps the connection until it
ends. So the supervisor knows which process is which rank, and notices at once when a process is gone: the
connection closes, however the process died. Each rank writes its stdout and stderr to its own file, whose
last lines are shown if the rank dies. Rank 0 may instead get the supervisor's own stdout and stderr, passed
as file descriptors: if they are a terminal, rank 0 sees a terminal, and nothing has to be copied.

    rank -> supervisor      {"rank": 2, "pid": 4711}     the first message, answered with two descriptors
    rank -> supervisor      {"beat": true}               a sign of life; see `launch.heartbeat`
    rank -> supervisor      {"exit": 0, "error": null}   the last message
    supervisor <-> rank 0   any other object             requests and their output; see `engine.service`

Each message is one line of JSON.
"""

import json
import os
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress

from minitp.errors import RankError
from minitp.launch import heartbeat
from minitp.launch.folder import make_folder
from minitp.launch.mpirun import find_mpirun, mpi_environment, warn_of_other_nodes
from minitp.util import dev_shm
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE

START_LIMIT_S = 60  # time for all ranks to connect
END_LIMIT_S = 10  # time for mpirun to end after the last message of the last rank


@contextmanager
def rank_processes(size, verbose=False, streams=None, replica=(0, 1)):
    """Yield a RankProcesses; when the block is left, end the processes and remove their files."""
    owner, folder = os.getpid(), make_folder()
    try:
        job = RankProcesses(folder, size, verbose, streams, replica)
        try:
            yield job
        finally:
            job.end()
    finally:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)


class Rank:
    """A rank's process and the connection to it."""

    def __init__(self, rank, pid, connection):
        self.rank, self.pid, self.connection = rank, pid, connection
        self.exit_code = None  # until the rank's last message
        self.received = b""  # the beginning of a line
        self.pulse = heartbeat.Pulse(pid)


class RankProcesses:
    """The processes of a job: mpirun and its ranks, or a single rank without mpirun.

    Parameters
    ----------
    folder : Path
        A folder for the socket and for the output of the ranks.
    size : int
        The number of ranks.
    verbose : bool
        Print the output of all ranks when they have ended.
    streams : (int, int) or None
        File descriptors for rank 0's stdout and stderr; with None, rank 0 writes to a file like the others.
    replica : (int, int)
        The index of this job and the number of jobs that share the host; each is a replica of the model.
    """

    def __init__(self, folder, size, verbose=False, streams=None, replica=(0, 1)):
        self.folder, self.size, self.verbose, self.streams = folder, size, verbose, streams
        self.replica = replica
        self.ranks = {}
        self.on_message = None  # called with each message of rank 0 but the first and the last
        self.leader = None  # the process of mpirun, or of the only rank
        self.cancelled = False  # set by another thread to end `watch`
        self.outbox, self.sender = queue.SimpleQueue(), None  # lines for rank 0; the thread that sends them
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "supervisor"))
        self.listener.listen(size)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.forked = False  # True in a forked child, to which the ranks do not belong
        job = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: job() and job().disown())

    def disown(self):
        """Close the copies of the connections in a forked child, which would outlive the supervisor's own."""
        self.forked = True
        for file in (self.listener, self.selector, *(rank.connection for rank in self.ranks.values())):
            file.close()

    def start(self, command):
        """Start the ranks in a new session, so that only the supervisor gets Ctrl-C from the terminal."""
        environment = {
            **mpi_environment(self.size, self.replica),
            SOCKET_VARIABLE: str(self.folder / "supervisor"),
        }
        if not environment.get("HF_HUB_OFFLINE"):
            environment["HF_HUB_OFFLINE"] = "1"  # the launcher has downloaded everything already
        if self.size == 1:
            environment[ALONE_VARIABLE] = "1"
        else:
            dev_shm.check_room(self.size * self.replica[1])
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
        """Wait until all ranks have sent their exit codes; return that of the job, the highest.

        Raises
        ------
        RankError
            As soon as a rank fails or stands still, with the last lines that the rank wrote.
        """
        checked, starting_s = time.monotonic(), 0.0
        while len(self.ranks) < self.size or any(rank.exit_code is None for rank in self.ranks.values()):
            for key, _ in self.selector.select(timeout=0.2):
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.receive(key.data)
            if self.cancelled:
                return RankError.exit_code
            if time.monotonic() - checked >= heartbeat.CHECK_S:
                # One check counts CHECK_S, however late it is: this process may have been paused.
                checked, starting_s = time.monotonic(), starting_s + heartbeat.CHECK_S
                self.check_pulses()
            if len(self.ranks) < self.size:
                if self.leader.poll() is not None:
                    self.fail_to_start()
                if starting_s > START_LIMIT_S:
                    missing = sorted(set(range(self.size)) - set(self.ranks))
                    self.fail(f"ranks {missing} have not started within {START_LIMIT_S} s")
        try:
            self.leader.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.fail(f"mpirun has not ended within {END_LIMIT_S} s after its last rank")
        return max(rank.exit_code for rank in self.ranks.values())

    def check_pulses(self):
        """Raise a RankError if a rank stands still."""
        for rank in self.ranks.values():
            if rank.exit_code is None and (reason := rank.pulse.check()):
                self.fail(f"rank {rank.rank} (pid {rank.pid}) {reason}", rank)

    def fail_to_start(self):
        """Raise a RankError for a process that ended during startup; only mpirun may know which one."""
        try:
            code = self.leader.wait(2)
        except subprocess.TimeoutExpired:
            self.fail("a rank ended before all ranks had started")
        if self.size == 1:
            self.fail(f"rank 0 ended with code {code} while it was starting")
        self.fail(f"mpirun ended with code {code} before all ranks had started")

    def accept(self):
        """Accept the connection of a rank and send it the descriptors of its stdout and stderr."""
        connection, _ = self.listener.accept()
        connection.settimeout(END_LIMIT_S)
        line = b""
        with suppress(OSError):
            line = connection.makefile("rb").readline()
        if not line:  # the process has died; mpirun will end and report the reason
            connection.close()
            return
        hello = json.loads(line)
        rank = Rank(hello["rank"], hello["pid"], connection)
        with open(self.folder / f"rank{rank.rank}", "wb") as output:
            streams = self.streams if rank.rank == 0 and self.streams else [output.fileno()] * 2
            with suppress(BrokenPipeError):  # the rank may have died in the meantime
                socket.send_fds(connection, [b"\n"], streams)
        connection.settimeout(None)
        self.ranks[rank.rank] = rank
        self.selector.register(connection, selectors.EVENT_READ, rank)
        if rank.rank == 0:
            self.sender = threading.Thread(target=self._send_lines, args=(connection,), daemon=True)
            self.sender.start()

    def send(self, message):
        """Send rank 0 an object, from any thread, without waiting; do nothing if rank 0 is gone."""
        line = json.dumps(message, default=lambda number: number.item())  # for NumPy's numbers
        self.outbox.put(line.encode() + b"\n")

    def _send_lines(self, connection):
        """Send rank 0 the lines in the outbox, each for as long as it takes, until the job ends."""
        with suppress(OSError):  # rank 0 is gone, which `watch` reports
            for line in iter(self.outbox.get, None):
                connection.sendall(line)

    def receive(self, rank):
        """Handle messages of a rank; raise RankError if it has failed, or ended without a last message."""
        try:
            data = rank.connection.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        rank.pulse.heard = True
        *lines, rank.received = (rank.received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "beat" in message:
                rank.pulse.beating = True
            elif "exit" not in message:
                self.on_message(message)
            elif rank.exit_code is None:  # after an abort another exit message may follow
                rank.exit_code = message["exit"]
                if message["error"] is not None:
                    self.fail(f"rank {rank.rank} failed: {message['error']}", rank)
        if not data:
            self.selector.unregister(rank.connection)
            if rank.exit_code is None and len(self.ranks) < self.size:
                self.fail_to_start()
            if rank.exit_code is None:
                self.fail(f"rank {rank.rank} (pid {rank.pid}) died: {self.cause_of_death()}", rank)

    def cause_of_death(self):
        """Return the likely cause of a rank's death, of which mpirun may know the signal."""
        with suppress(subprocess.TimeoutExpired):
            self.leader.wait(1)
        if any("Bus error" in line for line in self.output_of("mpirun")):
            return f"bus error, most likely because {dev_shm.described()}"
        return "killed, out of memory, or crashed"

    def output_of(self, name):
        """Return the lines that a process, "mpirun" or "rank2", has written to its file."""
        path = self.folder / name
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def fail(self, message, rank=None):
        """Raise a RankError with the last lines that the rank wrote, or mpirun if no rank is given."""
        raise RankError(message, self.output_of(f"rank{rank.rank}" if rank else "mpirun")[-20:])

    def end(self):
        """End all processes: first mpirun, which ends its ranks, then any ranks that remain."""
        if self.forked:
            return
        if self.leader is not None and self.leader.poll() is None:
            self.leader.terminate()
            self.leader.send_signal(signal.SIGCONT)  # a stopped process gets SIGTERM when it continues
            try:
                self.leader.wait(2)
            except subprocess.TimeoutExpired:
                self.leader.kill()
                self.leader.wait()
        for rank in self.ranks.values():
            if not self.has_ended(rank):
                dev_shm.delete_mapped_files(rank.pid)
                _kill(rank.pid)
            with suppress(OSError):
                rank.connection.shutdown(socket.SHUT_RDWR)  # ends an unfinished `sendall`
        if self.sender is not None:
            self.outbox.put(None)
            self.sender.join()
        for rank in self.ranks.values():
            rank.connection.close()
        if self.verbose:
            self.print_output()
        self.listener.close()
        self.selector.close()

    def has_ended(self, rank):
        """Return whether a rank's process has ended, which closes its end of the connection."""
        rank.connection.setblocking(False)
        try:
            while rank.connection.recv(1 << 16):  # messages that `watch` has not read
                pass
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def print_output(self):
        """Print all that mpirun and the ranks have written to their files."""
        for name in ["mpirun", *[f"rank{rank}" for rank in range(self.size)]]:
            for line in self.output_of(name):
                print(f"[{name}] {line}", file=sys.stderr)


def _kill(pid):
    with suppress(ProcessLookupError):  # the process may be gone by now
        os.kill(pid, signal.SIGKILL)
