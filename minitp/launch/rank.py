"""One rank's process: from its start to its exit code, with a way out for every failure.

What brings numpy and the rest is imported inside, so that failing to import is a failure like any other.
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
from minitp.util.environment import SOCKET_VARIABLE, check_world, env_rank


def run_alone(work, options, comm, serving=False):
    """The single rank of --tp 1, or of --as-rank; returns its exit code.

    Parameters
    ----------
    work : callable
        work(comm, caller) -> exit code: what the rank is there for.
    options : object
        Its device, comm, share_gpu and verbose are as these options.
    comm : Comm
        Of one rank.
    serving : bool
        The caller is told of a failure; else stderr is.
    """
    from minitp.launch.transport import select_comm

    supervisor = _supervisor_link()
    caller = supervisor if serving else None
    try:
        comm = select_comm(comm, options.device, options.comm, options.share_gpu)
        code = work(comm, supervisor)
    except AgreedError as error:
        code = _leave_together(error, options, comm, caller)
    except Exception as error:
        return _leave_alone(error, options, comm, supervisor)
    if supervisor is not None:
        supervisor.end(code)
    return code


def run_in_world(work, options, world, caller=None, serving=False):
    """One rank under mpirun or srun; returns its exit code.

    Parameters
    ----------
    work, options, serving
        As of `run_alone`; `options` has tp, too.
    world : int
        The number of ranks that the launcher says it started.
    caller : object
        Whom rank 0 serves if there is no supervisor; see `engine.service`.
    """
    supervisor = _supervisor_link()
    caller = supervisor or caller
    comm = None
    try:
        faulthandler.enable()
        from minitp.comm.mpi import MpiComm

        with _told_if_slow():
            comm = MpiComm(expected=world)  # first: without it there is no way to end the others
        try:
            from minitp.launch.transport import select_comm, select_host_comm

            with _told_if_slow():
                comm = select_host_comm(comm, options.comm)
            with comm.agreed():
                check_world(options.tp, world)
            comm = select_comm(comm, options.device, options.comm, options.share_gpu)
            code = work(comm, caller)
        except AgreedError as error:
            code = _leave_together(error, options, comm, caller if serving else None)
        comm.close()  # all ranks get here, or none
    except BaseException as error:
        code = _leave_alone(error, options, comm, supervisor)
    if supervisor is not None:
        supervisor.end(code)
    return code


def _supervisor_link():
    return SupervisorLink(os.environ[SOCKET_VARIABLE]) if SOCKET_VARIABLE in os.environ else None


@contextmanager
def _told_if_slow():
    """While MPI starts, it alone decides how long to wait for ranks that do not come: say that it does."""
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


def _leave_together(error, options, comm, caller):
    """All ranks leave: rank 0 says why, and with -v the rank that failed shows where."""
    if comm.rank == 0 and caller is not None:
        caller.say({"failed": str(error), "exit_code": error.exit_code})
    elif comm.rank == 0:
        print(f"minitp: {error}", file=sys.stderr)
    _show_traceback(error.__cause__, options)
    return error.exit_code


def _leave_alone(error, options, comm, supervisor):
    """This rank fails while the others may wait for it: say why, and end the whole job."""
    code = 130 if isinstance(error, KeyboardInterrupt) else RankError.exit_code
    _show_traceback(error, options)
    if supervisor is not None:
        supervisor.end(code, one_line(error))
    elif code != 130 and (comm is not None or env_rank(os.environ) == 0):
        who = f"{comm.name(comm.rank)} failed: " if comm is not None else ""
        print(f"minitp: {who}{one_line(error)}", file=sys.stderr, flush=True)
    if comm is not None:
        comm.abort(code)
    return code


def _show_traceback(error, options):
    if options.verbose and error is not None:
        traceback.print_exception(error)


def _high_number():
    """A number for a descriptor that lies above all others.

    Linux closes a killed process's highest descriptors first, so the supervisor hears of the death before
    mpirun does, whose connection has a low number and which then kills the other ranks.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if most == resource.RLIM_INFINITY else min(512, most - 8)


class SupervisorLink:
    """A rank's connection to the supervisor that started it; see `supervisor` for what goes over it.

    Attributes
    ----------
    inbox : queue.SimpleQueue
        Of what the supervisor says, to rank 0.
    """

    def __init__(self, path):
        with socket.socket(socket.AF_UNIX) as low:
            self._socket = socket.socket(
                fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, _high_number())
            )
        self._socket.connect(path)
        hello = {"rank": env_rank(os.environ), "pid": os.getpid()}
        self._socket.sendall(json.dumps(hello).encode() + b"\n")
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 2)
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        self.inbox = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        """When the supervisor dies its end closes, and then this rank ends too."""
        with suppress(ConnectionResetError):
            for line in self._socket.makefile("rb"):
                self.inbox.put(json.loads(line))
        os.kill(os.getpid(), signal.SIGKILL)

    def say(self, message):
        """Send the supervisor an object."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def end(self, exit_code, error=None):
        """This rank's last message."""
        self.say({"exit": exit_code, "error": error})
