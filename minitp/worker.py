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

from minitp import waiting
from minitp.environment import env_rank, ranks_wanted
from minitp.errors import AgreedError, InputError, RankError, one_line
from minitp.job import SOCKET_VARIABLE


def run_alone(args):
    """The single rank of --tp 1, or of --as-rank."""
    from minitp import commands
    from minitp.comm import Alone, OneOfMany
    from minitp.places import place_ranks

    front = _front()
    share = getattr(args, "as_rank", None)
    comm = Alone() if share is None else OneOfMany(share, args.of)
    try:
        comm = place_ranks(comm, args.device, args.comm, args.share_gpu)
        code = commands.run(args, comm, front)
    except AgreedError as error:
        code = _leave_together(error, args, comm, front)
    except Exception as error:
        return _leave_alone(error, args, comm, front)
    if front is not None:
        front.end(code)
    return code


def run_in_world(args, world, caller=None):
    """One rank under mpirun or srun.

    Parameters
    ----------
    args : Namespace
    world : int
        The number of ranks that the launcher says it started.
    caller : object
        Whom rank 0 serves if there is no front; see `engine.service`.
    """
    front = _front()
    caller = front or caller
    comm = None
    try:
        faulthandler.enable()
        from minitp.mpi_comm import MpiComm

        with _told_if_slow():
            comm = MpiComm(expected=world)  # first: without it there is no way to end the others
        try:
            from minitp import commands
            from minitp.places import on_hosts, place_ranks
            from minitp.several_hosts import through_shared_memory

            with _told_if_slow():
                comm = through_shared_memory(comm, on_hosts(args.comm))
            with comm.agreed():
                if args.tp != "auto" and ranks_wanted(args.tp, default=world) != world:
                    raise InputError(
                        f"--tp {args.tp} contradicts the MPI world of {world} ranks; leave --tp out"
                    )
            comm = place_ranks(comm, args.device, args.comm, args.share_gpu)
            code = commands.run(args, comm, caller)
        except AgreedError as error:
            code = _leave_together(error, args, comm, caller)
        comm.close()  # all ranks get here, or none
    except BaseException as error:
        code = _leave_alone(error, args, comm, front)
    if front is not None:
        front.end(code)
    return code


def _front():
    return Front(os.environ[SOCKET_VARIABLE]) if SOCKET_VARIABLE in os.environ else None


@contextmanager
def _told_if_slow():
    """While MPI starts, it alone decides how long to wait for ranks that do not come: say that it does."""
    text = f"minitp: MPI has not started on all ranks within {waiting.LATE_S:g} s"
    timer = threading.Timer(waiting.LATE_S, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if env_rank(os.environ) == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave_together(error, args, comm, caller):
    """All ranks leave: rank 0 says why, and with -v the rank that failed shows where."""
    if comm.rank == 0 and args.command == "ranks":
        caller.say({"failed": str(error), "exit_code": error.exit_code})
    elif comm.rank == 0:
        print(f"minitp: {error}", file=sys.stderr)
    _show_traceback(error.__cause__, args)
    return error.exit_code


def _leave_alone(error, args, comm, front):
    """This rank fails while the others may wait for it: say why, and end the whole job."""
    code = 130 if isinstance(error, KeyboardInterrupt) else RankError.exit_code
    _show_traceback(error, args)
    if front is not None:
        front.end(code, one_line(error))
    elif code != 130 and (comm is not None or env_rank(os.environ) == 0):
        who = f"{comm.name(comm.rank)} failed: " if comm is not None else ""
        print(f"minitp: {who}{one_line(error)}", file=sys.stderr, flush=True)
    if comm is not None:
        comm.abort(code)
    return code


def _show_traceback(error, args):
    if args.verbose and error is not None:
        traceback.print_exception(error)


def _high_number():
    """A number for a descriptor that lies above all others.

    Linux closes a killed process's highest descriptors first. So the front hears of the death before mpirun,
    whose connection has a low number, and which then kills the other ranks.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if most == resource.RLIM_INFINITY else min(512, most - 8)


class Front:
    """A rank's connection to the front that started it; see `job` for what goes over it.

    Attributes
    ----------
    inbox : queue.SimpleQueue
        Of what the front says, to rank 0.
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
        """When the front dies its end closes, and then this rank ends too."""
        with suppress(ConnectionResetError):
            for line in self._socket.makefile("rb"):
                self.inbox.put(json.loads(line))
        os.kill(os.getpid(), signal.SIGKILL)

    def say(self, message):
        """Send the front an object."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def end(self, exit_code, error=None):
        """This rank's last message."""
        self.say({"exit": exit_code, "error": error})
