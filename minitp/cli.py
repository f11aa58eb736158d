"""The `minitp` command: reads its arguments and starts ranks, or is one.

Imports of numpy and everything that brings it wait until the BLAS threads are set, and so that --help is
quick.
"""

import argparse
import os
import sys

from minitp import __version__, environment, launch
from minitp.errors import InputError, MinitpError, RankError
from minitp.output import prepare_streams, write_out

DEFAULT_TP = 4


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
        world = environment.world_size(os.environ)
        if world is not None:
            return as_rank(args, world)
        if launch.SOCKET_VARIABLE in os.environ:  # a rank must not become a front that starts ranks
            raise RankError(
                "mpirun gives its ranks neither PMI_SIZE nor OMPI_COMM_WORLD_SIZE; use MPICH or Open MPI"
            )
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


def as_rank(args, world):
    """One rank of a world that mpirun or srun has started: the front's, or the user's own."""
    environment.limit_blas_threads(os.environ, environment.local_ranks(os.environ, world))
    from minitp import worker

    return worker.run_in_world(args, world)


def alone(args):
    """The single rank of --tp 1, in this process and without MPI."""
    from minitp import worker

    return worker.run_alone(args)


def front(args, argv, size, worker):
    """Check all that can be checked, then start and watch the ranks."""
    from minitp import commands

    commands.check(args, size)
    variables = dict(os.environ)
    environment.limit_blas_threads(variables, size)
    variables.setdefault("HF_HUB_OFFLINE", "1")  # what was to be fetched lies in the cache now
    return launch.run_ranks([*worker, *argv], size, variables, verbose=args.verbose)


def refuse_undecodable(argv):
    """Python hands over bytes that are no UTF-8 as lone surrogates, which nothing further on could print."""
    for number, argument in enumerate(argv, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"argument {number} is not valid UTF-8: {os.fsencode(argument)!r}") from None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message, file=None):
        """Help and version: nobody may be reading."""
        write_out(message)


def parser():
    """The whole command line."""
    top = Parser(prog="minitp", description="Tensor-parallel LLM inference, written out and checkable.")
    top.add_argument("--version", action="version", version=f"minitp {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    sub = commands.add_parser(
        "generate", help="continue a prompt", description="Stream a prompt's continuation."
    )
    sub.add_argument("prompt", nargs="?", metavar="PROMPT")
    sub.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="token ids in place of the prompt")
    sub.add_argument("-n", "--max-new-tokens", type=int, default=100, metavar="N", help="default 100")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="among the K most probable; 0: all")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the most probable, up to P")
    sub.add_argument("--seed", type=int, help="the same seed gives the same text at the same --tp")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    sub.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    sub.add_argument("--no-kv-cache", action="store_true", help="recompute everything for every token")
    sub.add_argument("--max-context", type=int, metavar="N", help="at most the model's own, the default")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    sub.add_argument("--stats", action="store_true", help="print times and sizes to stderr")
    add_common(sub)

    sub = commands.add_parser(
        "perplexity",
        help="of a text",
        description="exp of the mean negative log-likelihood of a text, in windows of the context.",
    )
    sub.add_argument("file", metavar="FILE", help="a UTF-8 text")
    sub.add_argument(
        "--max-context", type=int, metavar="N", help="tokens a window; default the model's context"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    add_common(sub)
    return top


def add_common(sub):
    """The options that every command has."""
    sub.add_argument(
        "--model",
        default="smollm2",
        help="a directory, a Hugging Face id, smollm2 (the demo, default), or random:NAME "
        "(mistral-7b, llama-3-8b, tinyllama-1.1b, smollm2-135m)",
    )
    sub.add_argument(
        "--tp",
        metavar="N",
        help="ranks: 1 to the number of attention heads, or auto (default 4; under mpirun, its world)",
    )
    sub.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    sub.add_argument("--device", choices=["auto", "cpu"], default="auto")
    sub.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto")
    sub.add_argument("--comm", choices=["auto", "mpi"], default="auto")
    sub.add_argument("-v", "--verbose", action="store_true", help="tracebacks, and every rank's stderr")


def token_ids(text):
    """The ids of --tokens."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers and commas, as in 1,2,3") from None
