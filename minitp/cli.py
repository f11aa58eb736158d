"""The `minitp` command: reads its arguments and starts ranks, or is one.

Imports of numpy and everything that brings it wait until the BLAS threads are set, and so that --help is
quick.
"""

import os
import sys

from minitp import environment, job, launch
from minitp.arguments import parser
from minitp.errors import InputError, MinitpError, RankError
from minitp.output import prepare_streams

DEFAULT_TP = 4
WITHOUT_RANKS = ("compare", "shard", "plan", "info")  # commands that one process does
SERVED = ("serve", "chat")  # commands of one process that has ranks to serve it


def main(argv=None, worker=launch.WORKER):
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
        if args.command == "ranks" and job.SOCKET_VARIABLE not in os.environ:
            raise InputError("minitp ranks is what LLM, chat and serve start; start one of these")
        world = environment.world_size(os.environ)
        if args.command == "bench":
            check_share(args, world)
        if world is not None:
            return as_rank(args, world)
        if job.ALONE_VARIABLE in os.environ:
            return alone(args)
        if job.SOCKET_VARIABLE in os.environ:  # a rank must not become a front that starts ranks
            raise RankError(
                "mpirun gives its ranks neither PMI_SIZE nor OMPI_COMM_WORLD_SIZE; use MPICH or Open MPI"
            )
        if getattr(args, "oracle", False) or getattr(args, "as_rank", None) is not None:
            return alone(args)
        size = environment.ranks_wanted(args.tp, DEFAULT_TP)
        if size == 1:
            return alone(args)
        return front(args, argv, size, worker)
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
        from minitp.info import info  # and not `commands`, which imports what may be broken

        return info(args)
    if args.command == "plan" and args.gpu == "cpu":  # measured with a thread on each core
        os.environ.update(dict.fromkeys(environment.BLAS_THREADS, "1"))
    from minitp import commands

    return commands.run_here(args, environment.ranks_wanted(getattr(args, "tp", None), DEFAULT_TP))


def served(args):
    """A command that starts ranks and talks with them; in a user's mpirun rank 0 does, with the others."""
    environment.share_cores(os.environ)
    from minitp import commands, llm

    tp = environment.world_size(os.environ) or environment.ranks_wanted(args.tp, DEFAULT_TP)
    if environment.env_rank(os.environ) != 0:
        llm.open_llm(args, tp)  # ends this process
    return commands.run_here(args, tp)


def as_rank(args, world):
    """One rank of a world that mpirun or srun has started: the front's, or the user's own."""
    environment.share_cores(os.environ)
    from minitp import worker

    return worker.run_in_world(args, world)


def alone(args):
    """The single rank of --tp 1, or the share of one, in this process and without MPI."""
    if getattr(args, "as_rank", None) is not None:
        environment.limit_blas_threads(os.environ, args.of)
    from minitp import worker

    return worker.run_alone(args)


def front(args, argv, size, worker):
    """Check all that can be checked, then start and watch the ranks."""
    from minitp import commands

    commands.check_input(args, size)
    return launch.run_ranks([*worker, *argv], size, verbose=args.verbose)


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
