"""`minitp tour`: the story in one file, running. `minitp.tour` itself knows nothing of this package."""

import codecs
import os
import signal
import subprocess
import sys

from minitp.errors import InputError
from minitp.launch.supervisor import find_mpirun, mpi_environment
from minitp.loading.source import open_model
from minitp.util.environment import ranks_wanted, world_size
from minitp.util.stdout import write_out


def run(args, tp):
    """Run the tour on `tp` ranks under mpirun; or be one of them, where a user's mpirun has started this."""
    world = world_size(os.environ)
    if world is not None and ranks_wanted(args.tp, default=world) != world:
        raise InputError(f"--tp {args.tp} contradicts the MPI world of {world} ranks; leave --tp out")
    argv = tour_arguments(args, tp)
    if world is not None:
        from minitp import tour

        return tour.main(argv)
    command = [sys.executable, "-m", "minitp.tour", *argv]
    if tp > 1:
        command = [find_mpirun(), "-n", str(tp), *command]
    return pass_on(command, mpi_environment(tp))


def tour_arguments(args, tp):
    """What the tour takes: the directory of a model that may be called in other ways here."""
    if args.prompt is not None and args.tokens is not None:
        raise InputError("tour needs either a PROMPT or --tokens 1,2,3")
    source = open_model(args.model, tp)
    if source.directory is None:
        raise InputError(f"--model {args.model}: the tour reads a Hugging Face directory; give one")
    if args.tokens is None and source.tokenizer() is None:
        raise InputError(f"{source.name} has no tokenizer.json; give --tokens 1,2,3 in place of the prompt")
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
            while data := process.stdout.read1():
                if not write_out(text.decode(data)):
                    return 0
            return process.wait()
        finally:  # also on Ctrl-C, which is for this process to act on
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # at SIGTERM mpirun would have much to say
