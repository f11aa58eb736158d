"""The entry point of `minitp`: parse the arguments, run the command, turn errors into exit codes."""

import os
import sys
import threading
from contextlib import nullcontext

from minitp.cli.arguments import parser
from minitp.cli.commands import COMMANDS
from minitp.errors import InputError, MinitpError
from minitp.launch.run import WORKER
from minitp.launch.signals import Terminated, ended_by_signals
from minitp.util import environment
from minitp.util.stdout import prepare_streams


def main(argv=None, worker=WORKER):
    """Run the command and return its exit code.

    Parameters
    ----------
    argv : list of str, optional
        The arguments; the default is sys.argv[1:].
    worker : list of str
        The command line of a rank, to which the arguments are appended.
    """
    argv = sys.argv[1:] if argv is None else argv
    prepare_streams()
    rank = 0
    try:
        rank = environment.env_rank(os.environ)
        refuse_undecodable(argv)
        args = parser().parse_args(argv)
        with nullcontext() if signals_are_handled() else ended_by_signals():
            return COMMANDS[args.command].start(args, [*worker, *argv])
    except MinitpError as error:
        if rank == 0:  # under a user's mpirun all ranks have the same error
            print(f"minitp: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143


def signals_are_handled():
    """Return whether something else handles signals: mpirun or the launcher, or the caller of `main`."""
    started = environment.world_size(os.environ) is not None or os.environ.get(environment.SOCKET_VARIABLE)
    return bool(started) or threading.current_thread() is not threading.main_thread()


def refuse_undecodable(argv):
    """Reject arguments that are not UTF-8: they become lone surrogates, which cannot be printed."""
    for number, argument in enumerate(argv, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"argument {number} is not valid UTF-8: {os.fsencode(argument)!r}") from None
