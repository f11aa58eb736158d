"""The base class of commands, and the three ways to run one.

OneProcess   runs in this process, without ranks
OnRanks      runs on every rank; this process starts the ranks, or is one of them
Caller       sends requests to ranks, which this process or a user's mpirun has started

To parse any command line, the modules of all commands are imported. So that `--help` is fast, they import
NumPy, and modules that need it, only inside functions. That also leaves time to set the number of BLAS
threads before NumPy is imported.
"""

import os
import sys

from minitp.cli.options import llm_options
from minitp.errors import InputError, RankError
from minitp.launch.devices import check_gpus
from minitp.launch.run import ranks_of_replica, run_ranks
from minitp.util import environment
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE


class Command:
    """A command of `minitp`: its options, help and behavior.

    Attributes
    ----------
    name : str
    inputs : str
        The required arguments, for the usage line.
    summary : str
        A line for the list of commands in `minitp --help`.
    description : str
        The first paragraph of the command's own --help.
    examples : tuple of (str, str)
        Command lines and what they do, for the end of --help.
    verbose : str or None
        The help of -v; None hides the option, which is accepted but has no effect.
    """

    name, inputs, summary, description, examples = "", "", "", "", ()
    verbose = "show Python tracebacks, and what every rank wrote to stderr"

    def add_options(self, parser):
        """Add the command's options to the groups of its `arguments.Parser`."""

    def start(self, args, rank_command):
        """Run the command in this process and return its exit code.

        Parameters
        ----------
        args : Namespace
        rank_command : list of str
            The command line with which mpirun runs this command as a rank.
        """
        raise NotImplementedError


class OneProcess(Command):
    """A command without ranks. If a user's mpirun starts it anyway, only rank 0 runs it."""

    verbose = None

    def start(self, args, rank_command):
        return self.run(args) if environment.env_rank(os.environ) == 0 else 0

    def run(self, args):
        """Run the command and return the exit code."""
        raise NotImplementedError


class OnRanks(Command):
    """A command that every rank runs, whether the launcher or a user's mpirun starts the ranks."""

    def start(self, args, rank_command):
        world = environment.world_size(os.environ)
        if world is not None:
            environment.divide_cores(os.environ)
            from minitp.launch.rank import run_in_world

            return run_in_world(self.work(args), args, world)
        if os.environ.get(ALONE_VARIABLE):
            return self.run_alone(args)
        refuse_unknown_mpi()
        environment.check_cupy(args.device)
        size, replicas = self.ranks(args), getattr(args, "replicas", 1)
        check_gpus(args.device, args.share_gpu, size, replicas)
        if size * replicas == 1:
            return self.run_alone(args)
        from minitp.loading.source import open_model, warn_of_unread_fields

        source = open_model(args.model, size, args.layers, args.revision, args.split)
        warn_of_unread_fields(source)
        self.prepare(args, source)  # rejects bad input before any rank starts
        return run_ranks(rank_command, size * replicas, verbose=args.verbose)

    def ranks(self, args):
        """Return the number of ranks to start."""
        return ranks_of_replica(args, None)

    def run_alone(self, args):
        """Run the command as the only rank, in this process and without MPI."""
        from minitp.comm.single import SingleRank
        from minitp.launch.rank import run_alone

        return run_alone(self.work(args), args, SingleRank())

    def work(self, args):
        """Return the function that `launch.rank` calls on each rank after MPI has started."""

        def work(comm, caller):
            from minitp.load import open_source

            prepared = None
            source = open_source(comm, args)
            with comm.agreed():
                if comm.rank == 0:
                    prepared = self.prepare(args, source)
            return self.run(args, comm, source, comm.broadcast(prepared))

        return work

    def prepare(self, args, source):
        """Reject invalid options and inputs, and return what `run` needs in addition to the source."""
        raise NotImplementedError

    def run(self, args, comm, source, prepared):
        """Run the command on this rank and return the exit code; all ranks call this method."""
        raise NotImplementedError


class Caller(Command):
    """A command that sends requests to ranks through `LLM`.

    Under a user's mpirun, rank 0 runs the command, and the other ranks serve its requests.
    """

    def start(self, args, rank_command):
        environment.divide_cores(os.environ)
        world = environment.world_size(os.environ)
        tp = ranks_of_replica(args, world)
        if world is None:
            environment.check_cupy(args.device)
            check_gpus(args.device, args.share_gpu, tp, getattr(args, "replicas", 1))
        if environment.env_rank(os.environ) != 0:
            from minitp.llm import LLM

            LLM(**llm_options(args, tp))  # serves rank 0, then exits
        from minitp.engine.client import JOINED

        try:
            return self.run(args, tp)
        except InputError as error:
            if world is None or JOINED in os.environ:
                raise
            print(f"minitp: {error}", file=sys.stderr, flush=True)
            from minitp.comm.mpi import MpiComm

            MpiComm(expected=world).abort(error.exit_code)  # the other ranks wait for rank 0

    def run(self, args, tp):
        """Start or join `tp` ranks, run the command, and return the exit code."""
        raise NotImplementedError


def refuse_unknown_mpi():
    """Raise RankError if this process is itself a rank, of an MPI that does not announce its size."""
    if os.environ.get(SOCKET_VARIABLE):
        raise RankError(
            "mpirun gives its ranks neither PMI_SIZE nor OMPI_COMM_WORLD_SIZE; use MPICH or Open MPI"
        )
