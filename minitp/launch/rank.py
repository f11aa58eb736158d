"""The process of one rank, from its start to its exit code, including failures.

NumPy and the modules that need it are imported inside functions, so that a failing import is handled like any
other failure.
"""

import faulthandler
import fcntl
import json
import os
import queue
import resource
import signal
import socket
import sys
import threading
import traceback
from contextlib import contextmanager, suppress

from minitp.errors import AgreedError, RankError, one_line
from minitp.launch.heartbeat import start_beating
from minitp.util import dev_shm
from minitp.util.environment import SOCKET_VARIABLE, check_world, env_rank, replica_of


def run_alone(work, options, comm, serving=False):
    """Run the single rank of --tp 1 or --as-rank; return its exit code.

    Parameters
    ----------
    work : callable
        A function work(comm, caller) -> exit code that does the rank's work.
    options : object
        An object with the options device, comm, share_gpu and verbose as attributes.
    comm : Comm
        The Comm of the single rank.
    serving : bool
        Report a failure to the caller instead of stderr.
    """
    from minitp.launch.transport import select_comm

    supervisor = _supervisor_link()
    caller = supervisor if serving else None
    try:
        comm = select_comm(comm, options.device, options.comm, options.share_gpu)
        if supervisor is not None:
            start_beating(supervisor.send)
        code = work(comm, supervisor)
    except AgreedError as error:
        code = _exit_together(error, options, comm, caller)
    except Exception as error:
        return _abort(error, options, comm, supervisor)
    if supervisor is not None:
        supervisor.send_exit(code)
    return code


def run_in_world(work, options, world, caller=None, serving=False):
    """Run one of the ranks that mpirun or srun has started; return its exit code.

    Parameters
    ----------
    work, options, serving
        The same as for `run_alone`; `options` also has tp.
    world : int
        The number of ranks that mpirun or srun says it started.
    caller : object
        The caller that rank 0 serves if there is no supervisor; see `engine.service`.
    """
    supervisor = _supervisor_link()
    caller = supervisor or caller
    # Not every command has this option; and replicas that the launcher has started are separate worlds.
    replicas = getattr(options, "replicas", 1) // replica_of(os.environ)[1]
    comm = None
    try:
        faulthandler.enable()
        from minitp.comm.mpi import MpiComm

        with _warned_if_mpi_is_slow():
            comm = MpiComm(expected=world)  # first, because only MPI can end the other ranks
        try:
            from minitp.comm.groups import split_into_groups
            from minitp.launch.transport import select_comm, select_host_comm

            with comm.agreed():
                check_world(options.tp, world, replicas)
            with _warned_if_mpi_is_slow():
                comm = select_host_comm(split_into_groups(comm, replicas), options.comm)
            comm = select_comm(comm, options.device, options.comm, options.share_gpu)
            if supervisor is not None:
                start_beating(supervisor.send)
            code = work(comm, caller)
        except AgreedError as error:
            code = _exit_together(error, options, comm, caller if serving else None)
        comm.close()  # either all ranks get here or none does
    except BaseException as error:
        code = _abort(error, options, comm, supervisor)
    if supervisor is not None:
        supervisor.send_exit(code)
    return code


def _supervisor_link():
    path = os.environ.get(SOCKET_VARIABLE)
    return SupervisorLink(path) if path else None


@contextmanager
def _warned_if_mpi_is_slow():
    """Print a line if the block takes long; while MPI starts, nothing else reports missing ranks."""
    from minitp.comm import wait

    text = f"minitp: MPI has not started on all ranks within {wait.LATE_S:g} s"
    timer = threading.Timer(wait.LATE_S, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if env_rank(os.environ) == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit_together(error, options, comm, caller):
    """Report on rank 0 why all ranks exit; with -v the rank that failed prints its traceback."""
    first = comm.all_groups.rank == 0
    if first and caller is not None:
        caller.send({"failed": str(error), "exit_code": error.exit_code})
    elif first:
        print(f"minitp: {error}", file=sys.stderr)
    _print_traceback(error.__cause__, options)
    return error.exit_code


def _abort(error, options, comm, supervisor):
    """Report why this rank failed and end the whole job, since other ranks may be waiting for this one."""
    code = 130 if isinstance(error, KeyboardInterrupt) else RankError.exit_code
    _print_traceback(error, options)
    if supervisor is not None:
        supervisor.send_exit(code, one_line(error))
    elif code != 130 and (comm is not None or env_rank(os.environ) == 0):
        failed = f"{comm.name(comm.rank)} failed: " if comm is not None else ""
        print(f"minitp: {failed}{one_line(error)}", file=sys.stderr, flush=True)
    if comm is not None:
        comm.abort(code)
    return code


def _print_traceback(error, options):
    if options.verbose and error is not None:
        traceback.print_exception(error)


def _high_descriptor():
    """Return a number for a file descriptor above those of MPI.

    Linux closes the highest descriptors of a killed process first. So the supervisor learns which rank has
    died before mpirun notices and kills the other ranks.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if limit == resource.RLIM_INFINITY else min(512, limit - 8)


class SupervisorLink:
    """A rank's connection to its supervisor; the module `supervisor` lists the messages.

    Attributes
    ----------
    inbox : queue.SimpleQueue
        Messages from the supervisor; only rank 0 gets any.
    """

    def __init__(self, path):
        with socket.socket(socket.AF_UNIX) as low:
            self._socket = socket.socket(
                fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, _high_descriptor())
            )
        self._socket.connect(path)
        hello = {"rank": env_rank(os.environ), "pid": os.getpid()}
        self._socket.sendall(json.dumps(hello).encode() + b"\n")
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 2)
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        self.inbox, self._sending = queue.SimpleQueue(), threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        """Queue the supervisor's messages; if that fails, or the supervisor has died, kill this process."""
        try:
            for line in self._socket.makefile("rb"):
                self.inbox.put(json.loads(line))
        except OSError:
            pass  # the supervisor has died
        except Exception as error:
            with suppress(OSError):
                self.send_exit(RankError.exit_code, f"reading a message: {one_line(error)}")
        dev_shm.delete_mapped_files()
        os.kill(os.getpid(), signal.SIGKILL)

    def send(self, message):
        """Send an object to the supervisor, from any thread."""
        with self._sending:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def send_exit(self, exit_code, error=None):
        """Send the last message of this rank."""
        self.send({"exit": exit_code, "error": error})
