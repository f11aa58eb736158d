"""The `minitp` command: reads its arguments and starts ranks, or is one.

Imports of numpy and everything that brings it wait until the BLAS threads are set, and so that --help is
quick.
"""

import json
import os
import sys

from minitp.cli.options import parser
from minitp.engine.options import EngineOptions
from minitp.errors import InputError, MinitpError, RankError
from minitp.launch.run import WORKER, run_ranks
from minitp.util import environment
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE
from minitp.util.stdout import prepare_streams

DEFAULT_TP = 4
WITHOUT_RANKS = ("compare", "shard", "plan", "info")  # commands that one process does
SERVED = ("serve", "chat")  # commands of one process that has ranks to serve it


def main(argv=None, worker=WORKER):
    """Run the command; return its exit code.

    Parameters
    ----------
    argv : list of str, optional
        Instead of sys.argv[1:].
    worker : list of str
        The command of which `mpirun` starts one process a rank.
    """
    argv = sys.argv[1:] if argv is None else argv
    prepare_streams()
    try:
        refuse_undecodable(argv)
        args = parser().parse_args(argv)
        if args.command in WITHOUT_RANKS:
            return here(args)
        if args.command in SERVED:
            return served(args)
        if args.command == "tour":
            return tour(args)
        if args.command == "ranks":
            return rank_of_engine(args)
        world = environment.world_size(os.environ)
        if args.command == "bench":
            check_share(args, world)
        if world is not None:
            return as_rank(args, world)
        if ALONE_VARIABLE in os.environ:
            return alone(args)
        refuse_unknown_mpi()
        if getattr(args, "oracle", False) or getattr(args, "as_rank", None) is not None:
            return alone(args)
        size = environment.ranks_wanted(args.tp, DEFAULT_TP)
        if size == 1:
            return alone(args)
        return launcher(args, argv, size, worker)
    except MinitpError as error:
        if environment.env_rank(os.environ) == 0:  # all ranks of a user's mpirun read the same arguments
            print(f"minitp: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def here(args):
    """A command that needs no ranks; of those that a user's mpirun starts all the same, one does it."""
    if environment.env_rank(os.environ) != 0:
        return 0
    if args.command == "info":
        from minitp.cli.info import info  # and not `commands`, which imports what may be broken

        return info(args)
    if args.command == "plan" and args.gpu == "cpu":  # measured with a thread on each core
        os.environ.update(dict.fromkeys(environment.BLAS_THREADS, "1"))
    from minitp.cli.commands import module_of

    tp = environment.ranks_wanted(getattr(args, "tp", None), DEFAULT_TP)
    return module_of(args.command).run(args, tp)


def served(args):
    """A command that starts ranks and talks with them; in a user's mpirun rank 0 does, with the others."""
    environment.divide_cores(os.environ)
    world = environment.world_size(os.environ)
    tp = world or environment.ranks_wanted(args.tp, DEFAULT_TP)
    if environment.env_rank(os.environ) != 0:
        from minitp.cli.shared_options import llm_options
        from minitp.llm import LLM

        LLM(**llm_options(args, tp))  # ends this process
    from minitp.cli.commands import module_of
    from minitp.engine.client import JOINED

    try:
        return module_of(args.command).run(args, tp)
    except InputError as error:
        if world is None or JOINED in os.environ:
            raise
        print(f"minitp: {error}", file=sys.stderr, flush=True)
        from minitp.comm.mpi import MpiComm

        MpiComm(expected=world).abort(error.exit_code)  # the others wait for rank 0 to join them


def tour(args):
    """The one-file story, which starts ranks of its own; in a user's mpirun each rank is one of them."""
    environment.divide_cores(os.environ)
    from minitp.cli.tour import run

    return run(args, environment.world_size(os.environ) or environment.ranks_wanted(args.tp, DEFAULT_TP))


def as_rank(args, world):
    """One rank of a world that mpirun or srun has started: the launcher's, or the user's own."""
    environment.divide_cores(os.environ)
    from minitp.launch.rank import run_in_world

    return run_in_world(work_of(args), args, world)


def alone(args):
    """The single rank of --tp 1, or the share of one, in this process and without MPI."""
    share = getattr(args, "as_rank", None)
    if share is not None:
        environment.limit_blas_threads(os.environ, args.of)
    from minitp.comm.single import ShardOnly, SingleRank
    from minitp.launch.rank import run_alone

    return run_alone(work_of(args), args, SingleRank() if share is None else ShardOnly(share, args.of))


def work_of(args):
    """Return a rank's work on a command for `launch.rank`; it is imported when MPI is there."""

    def work(comm, caller):
        from minitp.cli.commands import run_on_rank

        return run_on_rank(args, comm)

    return work


def rank_of_engine(args):
    """One of the ranks that LLM, chat and serve start."""
    if SOCKET_VARIABLE not in os.environ:
        raise InputError("minitp ranks is what LLM, chat and serve start; start one of these")
    try:
        options = EngineOptions(**json.loads(args.options))
    except (TypeError, ValueError) as error:
        raise InputError(f"minitp ranks: {error}") from error
    world = environment.world_size(os.environ)
    environment.divide_cores(os.environ)
    from minitp.engine.client import join_world, run_alone_for_caller

    if world is not None:
        return join_world(options, world)
    if ALONE_VARIABLE not in os.environ:
        refuse_unknown_mpi()
    return run_alone_for_caller(options)


def refuse_unknown_mpi():
    """A rank that does not know that it is one must not become a launcher that starts ranks."""
    if SOCKET_VARIABLE in os.environ:
        raise RankError(
            "mpirun gives its ranks neither PMI_SIZE nor OMPI_COMM_WORLD_SIZE; use MPICH or Open MPI"
        )


def launcher(args, argv, size, worker):
    """Check all that can be checked, then start and watch the ranks."""
    from minitp.cli.commands import check_input

    check_input(args, size)
    return run_ranks([*worker, *argv], size, verbose=args.verbose)


def check_share(args, world):
    """Refuse an --as-rank that is no rank of --of ranks, or beside what decides otherwise."""
    if args.as_rank is None and args.of is None:
        return
    if args.as_rank is None or args.of is None:
        raise InputError("--as-rank R and --of N go together: rank R's share of N ranks")
    if args.of < 1:
        raise InputError(f"--of {args.of}: expected at least 1 rank")
    if not 0 <= args.as_rank < args.of:
        raise InputError(f"--as-rank {args.as_rank} --of {args.of}: expected a rank from 0 to {args.of - 1}")
    if args.tp is not None or world is not None:
        raise InputError("--as-rank runs alone: leave out --tp, and mpirun")


def refuse_undecodable(argv):
    """Python hands over bytes that are no UTF-8 as lone surrogates, which nothing further on could print."""
    for number, argument in enumerate(argv, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"argument {number} is not valid UTF-8: {os.fsencode(argument)!r}") from None
