"""The form that every command has, and the three ways to run one.

OneProcess   this process does it alone
OnRanks      every rank does it; this process starts the ranks, or is one of them
Caller       this process starts ranks, or leads those of its mpirun, and sends them requests

A command's module is imported for every `minitp --help`. So it imports numpy and whatever needs it inside
its functions, which also leaves time to set the number of BLAS threads first.
"""

import os
import sys

from minitp.cli.options import llm_options
from minitp.errors import InputError, RankError
from minitp.launch.run import ranks_to_start, run_ranks
from minitp.util import environment
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE


class Command:
    """A command of `minitp`: its options, its help and what it does.

    Attributes
    ----------
    name : str
    inputs : str
        The arguments that are not options, and required options, for the usage line.
    summary : str
        Its line in `minitp --help`.
    description : str
        The first paragraph of its own --help.
    examples : tuple of (str, str)
        Command lines with what each of them does, for the end of --help.
    verbose : str
        The help of -v.
    """

    name, inputs, summary, description, examples = "", "", "", "", ()
    verbose = "show Python tracebacks, and what every rank wrote to stderr"

    def add_options(self, parser):
        """Add the command's options to its `arguments.Parser`, each to one of the parser's groups."""

    def start(self, args, rank_command):
        """Run the command in this process and return its exit code.

        Parameters
        ----------
        args : Namespace
        rank_command : list of str
            The command line that runs the same command as a rank, for mpirun.
        """
        raise NotImplementedError


class OneProcess(Command):
    """A command without ranks. If a user's mpirun starts it all the same, only rank 0 runs it."""

    verbose = "no effect on this command, which starts no ranks"

    def start(self, args, rank_command):
        return self.run(args) if environment.env_rank(os.environ) == 0 else 0

    def run(self, args):
        """Do the work and return the exit code."""
        raise NotImplementedError


class OnRanks(Command):
    """A command that every rank runs: ranks of the launcher, of a user's mpirun, or the only one."""

    def start(self, args, rank_command):
        world = environment.world_size(os.environ)
        if world is not None:
            environment.divide_cores(os.environ)
            from minitp.launch.rank import run_in_world

            return run_in_world(self.work(args), args, world)
        if ALONE_VARIABLE in os.environ:
            return self.run_alone(args)
        refuse_unknown_mpi()
        size = self.ranks(args)
        if size == 1:
            return self.run_alone(args)
        from minitp.loading.source import open_model, warn_of_unread_fields

        source = open_model(args.model, size, args.layers)
        warn_of_unread_fields(source)
        self.prepare(args, source)  # bad input is refused before any rank starts
        return run_ranks(rank_command, size, verbose=args.verbose)

    def ranks(self, args):
        """Return the number of ranks to start."""
        return ranks_to_start(args.tp, args.device, args.model, args.layers)

    def run_alone(self, args):
        """Run the command as the only rank, in this process and without MPI."""
        from minitp.comm.single import SingleRank
        from minitp.launch.rank import run_alone

        return run_alone(self.work(args), args, SingleRank())

    def work(self, args):
        """Return what a rank does, for `launch.rank`, which calls it when MPI has started."""

        def work(comm, caller):
            from minitp.load import open_source

            prepared = None
            source = open_source(comm, args.model, args.layers)
            with comm.agreed():
                if comm.rank == 0:
                    prepared = self.prepare(args, source)
            return self.run(args, comm, source, comm.broadcast(prepared))

        return work

    def prepare(self, args, source):
        """Refuse options and inputs that cannot work, and return what `run` needs besides the source."""
        raise NotImplementedError

    def run(self, args, comm, source, prepared):
        """Do this rank's part of the work and return the exit code; all ranks call it."""
        raise NotImplementedError


class Caller(Command):
    """A command that talks to ranks through `LLM`; in a user's mpirun rank 0 does, the others serve it."""

    def start(self, args, rank_command):
        environment.divide_cores(os.environ)
        world = environment.world_size(os.environ)
        tp = world or ranks_to_start(args.tp, args.device, args.model, args.layers)
        if environment.env_rank(os.environ) != 0:
            from minitp.llm import LLM

            LLM(**llm_options(args, tp))  # serves rank 0, then ends this process
        from minitp.engine.client import JOINED

        try:
            return self.run(args, tp)
        except InputError as error:
            if world is None or JOINED in os.environ:
                raise
            print(f"minitp: {error}", file=sys.stderr, flush=True)
            from minitp.comm.mpi import MpiComm

            MpiComm(expected=world).abort(error.exit_code)  # the others wait for rank 0 to join them

    def run(self, args, tp):
        """Start `tp` ranks, or join them, and serve the user; return the exit code."""
        raise NotImplementedError


def refuse_unknown_mpi():
    """Refuse to start ranks in a process that is itself a rank of an MPI which does not say so."""
    if SOCKET_VARIABLE in os.environ:
        raise RankError(
            "mpirun gives its ranks neither PMI_SIZE nor OMPI_COMM_WORLD_SIZE; use MPICH or Open MPI"
        )
