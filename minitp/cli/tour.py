"""`minitp tour`: run `minitp.tour`, which itself imports nothing from this package."""

import codecs
import os
import signal
import subprocess
from pathlib import Path

from minitp.cli.command import Command
from minitp.cli.options import PROMPT_OR_TOKENS, add_max_new_tokens, add_prompt, add_revision
from minitp.errors import InputError
from minitp.launch.mpirun import find_mpirun, mpi_environment
from minitp.launch.run import ranks_to_start
from minitp.util import dev_shm
from minitp.util.environment import check_world, divide_cores, world_size
from minitp.util.run_module import RUN_MODULE
from minitp.util.stdout import write_out


class TourCommand(Command):
    """The command `minitp tour`."""

    name = "tour"
    inputs = PROMPT_OR_TOKENS.replace("{", "[").replace("}", "]")
    summary = "run tour.py, tensor parallelism in one file"
    description = (
        "Run minitp/tour.py, which implements tensor parallelism in 300 lines: a Llama model on several "
        "ranks, with greedy decoding."
    )
    examples = (
        ('minitp tour "Once upon a time" --tp 4', "the demo model on four ranks"),
        ("minitp tour --tokens 1,2,3 --model ./llama -n 20", "another Llama or Mistral checkpoint"),
    )
    verbose = None

    def add_options(self, parser):
        add_prompt(parser, default=" (default: Once upon a time)")
        add_max_new_tokens(parser, default=40)
        parser.groups["model"].add_argument(
            "--model",
            default="smollm2",
            help="smollm2, or a directory or Hugging Face id of a Llama or Mistral model (default: smollm2)",
        )
        add_revision(parser)
        group = parser.groups["ranks"]
        group.add_argument(
            "--tp",
            default="auto",
            metavar="N",
            help="number of ranks, from 1 to the number of attention heads; auto: one per physical core, up "
            "to 4, or with --gpu one per GPU (default: auto; under mpirun, its number of processes)",
        )
        group.add_argument(
            "--gpu",
            action="store_true",
            help="use one GPU per rank, and NCCL (default: CPUs and MPI)",
        )

    def start(self, args, rank_command):
        """Run the tour under mpirun, or as a rank if a user's mpirun has started this process."""
        divide_cores(os.environ)
        world = world_size(os.environ)
        if world is not None:
            check_world(args.tp, world)
            argv = tour_arguments(args, world)
            from minitp import tour

            return tour.main(argv)
        tp = ranks_to_start(args.tp, "cuda" if args.gpu else "cpu", args.model, revision=args.revision)
        command = [*RUN_MODULE, "minitp.tour", *tour_arguments(args, tp)]
        if tp > 1:
            dev_shm.check_room(tp)
            command = [find_mpirun(), "-n", str(tp), *command]
        return pass_on(command, mpi_environment(tp))


def tour_arguments(args, tp):
    """Return the arguments of `minitp.tour`, whose --model must be a directory."""
    if args.prompt is not None and args.tokens is not None:
        raise InputError("tour accepts a PROMPT or --tokens 1,2,3, but not both")
    from minitp.cli.inputs import tokenizer_of
    from minitp.loading.source import open_model

    source = open_model(args.model, tp, revision=args.revision)
    if source.directory is None:
        raise InputError(
            f"--model {args.model}: the tour needs a checkpoint in Hugging Face's format; give a directory "
            "or an id"
        )
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
    """Run a command and pass its output on; return its exit code, or 0 if stdout is closed."""
    text = codecs.getincrementaldecoder("utf-8")()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            while data := process.stdout.read1():
                if not write_out(text.decode(data)):
                    return 0
            return process.wait()
        finally:  # on Ctrl-C or SIGTERM, too, which only this process receives
            if process.poll() is None:
                for pid in descendants(process.pid):
                    dev_shm.delete_mapped_files(pid)
                os.killpg(process.pid, signal.SIGKILL)  # at SIGTERM mpirun would print its own report


def descendants(pid):
    """Return the pids of a process's children, their children, and so on, on Linux."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in path.read_text().split()] if path.exists() else []
    return children + [pid for child in children for pid in descendants(child)]
