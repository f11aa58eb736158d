"""`minitp tour`: the story in one file, running. `minitp.tour` itself knows nothing of this package."""

import codecs
import os
import signal
import subprocess
import sys

from minitp.cli.inputs import tokenizer_of
from minitp.errors import InputError
from minitp.launch.run import Terminated, raised_on_sigterm
from minitp.launch.supervisor import find_mpirun, mpi_environment
from minitp.loading.source import open_model
from minitp.util.environment import check_world, world_size
from minitp.util.stdout import write_out


def run(args, tp):
    """Run the tour on `tp` ranks under mpirun; or be one of them, where a user's mpirun has started this."""
    world = world_size(os.environ)
    if world is not None:
        check_world(args.tp, world)
    argv = tour_arguments(args, tp)
    if world is not None:
        from minitp import tour

        return tour.main(argv)
    command = [sys.executable, "-m", "minitp.tour", *argv]
    if tp > 1:
        command = [find_mpirun(), "-n", str(tp), *command]
    return pass_on(command, mpi_environment(tp))


def tour_arguments(args, tp):
    """Return the tour's own arguments: a model may have other names here, and is a directory there."""
    if args.prompt is not None and args.tokens is not None:
        raise InputError("tour needs either a PROMPT or --tokens 1,2,3")
    source = open_model(args.model, tp)
    if source.directory is None:
        raise InputError(f"--model {args.model}: the tour reads a Hugging Face directory; give one")
    if args.tokens is None:
        tokenizer_of(source)
    if args.gpu:
        from minitp.cuda.gpu import find_cupy

        find_cupy()
    argv = ["--model", str(source.directory), "--max-new-tokens", str(args.max_new_tokens)]
    if args.tokens is not None:
        argv += ["--tokens", ",".join(map(str, args.tokens))]
    if args.gpu:
        argv += ["--gpu"]
    return argv if args.prompt is None else [*argv, "--", args.prompt]


def pass_on(command, environment):
    """Run a command and write its output as it comes; its exit code, or 0 if nobody reads any more."""
    text = codecs.getincrementaldecoder("utf-8")()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            with raised_on_sigterm():
                while data := process.stdout.read1():
                    if not write_out(text.decode(data)):
                        return 0
                return process.wait()
        except Terminated:
            return 143
        finally:  # also on Ctrl-C, which is for this process to act on
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # at SIGTERM mpirun would have much to say
