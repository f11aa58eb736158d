"""`minitp tour`: the story in one file, running. `minitp.tour` itself knows nothing of this package."""

import os
import sys

from minitp.errors import InputError
from minitp.launch.supervisor import find_mpirun, mpi_environment
from minitp.loading.source import open_model
from minitp.util.environment import world_size


def run(args, tp):
    """Become mpirun with the tour on `tp` ranks; or one of them, where a user's mpirun has started this."""
    argv = tour_arguments(args, tp)
    if world_size(os.environ) is not None:
        from minitp import tour

        return tour.main(argv)
    command = [sys.executable, "-m", "minitp.tour", *argv]
    if tp > 1:
        command = [find_mpirun(), "-n", str(tp), *command]
    os.execve(command[0], command, mpi_environment(tp))


def tour_arguments(args, tp):
    """What the tour takes: the directory of a model that may be called in other ways here."""
    source = open_model(args.model, tp)
    if source.directory is None:
        raise InputError(f"--model {args.model}: the tour reads a Hugging Face directory; give one")
    argv = ["--model", str(source.directory), "--max-new-tokens", str(args.max_new_tokens)]
    if args.tokens is not None:
        argv += ["--tokens", ",".join(map(str, args.tokens))]
    if args.gpu:
        argv += ["--gpu"]
    return argv if args.prompt is None else [*argv, "--", args.prompt]
