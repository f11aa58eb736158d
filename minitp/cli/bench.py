"""`minitp bench`: measure the machine's limits and how close the model gets to them."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, replace

from minitp.cli.command import OnRanks
from minitp.cli.options import add_json, add_replicas, add_run
from minitp.errors import InputError
from minitp.util.environment import limit_blas_threads, world_size
from minitp.util.format import counted, duration
from minitp.util.shares import numbers_only
from minitp.util.stdout import write_out

PLOTS = (".png", ".svg")
BATCHES = (1, 2, 4, 8, 16, 32)
FIRST_CONTEXT, LAST_CONTEXT = 32, 2048
PROMPT_TOKENS = 128
ANNOUNCED_S = 20  # the expected time of a shorter measurement is not announced
# Defaults of --max-new-tokens and --rounds: without a sweep, and for each point of a sweep.
NEW_TOKENS, ROUNDS = (64, 16), (5, 3)


@dataclass(frozen=True)
class Job:
    """The measurements to make."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    profile: bool
    sweep: str | None
    requests: int | None = None
    points: tuple = ()  # lengths or batch sizes of the sweep


class BenchCommand(OnRanks):
    """The command `minitp bench`."""

    name = "bench"
    summary = "measure speed against the machine's limits"
    description = (
        "Measure the memory bandwidth, matrix multiplication rate and all-reduce time of this machine. Then "
        "measure prefill and decode, and print what fraction of the machine's limits they achieve."
    )
    examples = (
        ("minitp bench --tp 2 --profile", "two ranks, with the time of each step"),
        ("minitp bench --sweep context --plot sweep.png", "plot the speed at several context lengths"),
        ("minitp bench --model random:mistral-7b --as-rank 0 --of 4", "one of four ranks of a large model"),
    )

    def add_options(self, parser):
        group = parser.groups["measurement"]
        for option, what in (
            ("--prompt-tokens", f"number of tokens in the random prompt (default: {PROMPT_TOKENS})"),
            (
                "--rounds",
                f"repetitions of each measurement (default: {ROUNDS[0]}, or {ROUNDS[1]} with --sweep)",
            ),
            (
                "--requests",
                "measure N concurrent requests, and the same requests one by one, instead of one sequence "
                "(default: one sequence)",
            ),
        ):
            group.add_argument(option, type=int, metavar="N", help=what)
        group.add_argument(
            "-n",
            "--max-new-tokens",
            type=int,
            metavar="N",
            help=f"number of tokens to decode (default: {NEW_TOKENS[0]}, or {NEW_TOKENS[1]} with --sweep)",
        )
        group.add_argument(
            "--profile", action="store_true", help="also show the time of each step (on GPUs: each kernel)"
        )
        group.add_argument(
            "--sweep",
            choices=["context", "batch"],
            help="measure at several context lengths or batch sizes (default: no sweep)",
        )
        group.add_argument(
            "--max-context",
            type=int,
            metavar="N",
            help="maximum context length in tokens, where --sweep context ends (default: the model's, with "
            f"--sweep at most {LAST_CONTEXT})",
        )
        group.add_argument(
            "--as-rank",
            type=int,
            metavar="R",
            help="run only rank R of the N ranks given by --of, in one process (default: run all ranks)",
        )
        group.add_argument("--of", type=int, metavar="N", help="total number of ranks for --as-rank")
        add_run(parser)
        add_replicas(
            parser,
            "with --requests: divide the requests among N copies of the model, each on its own --tp ranks",
        )
        add_json(parser)
        parser.groups["output"].add_argument(
            "--plot", metavar="FILE", help="plot the sweep to a .png or .svg file (default: no plot)"
        )

    def start(self, args, rank_command):
        """Run on all ranks, or with --as-rank as a single rank without the others."""
        if args.as_rank is None and args.of is None:
            return super().start(args, rank_command)
        check_share(args)
        limit_blas_threads(os.environ, args.of)
        from minitp.comm.single import ShardOnly
        from minitp.launch.rank import run_alone

        return run_alone(self.work(args), args, ShardOnly(args.as_rank, args.of))

    def prepare(self, args, source):
        """Check the options and return the Job."""
        from minitp.request import context_length

        refuse_pairs(args)
        check_requests(args)
        sweep = args.sweep is not None
        prompt_tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
        new_tokens = NEW_TOKENS[sweep] if args.max_new_tokens is None else args.max_new_tokens
        rounds = ROUNDS[sweep] if args.rounds is None else args.rounds
        for option, value, least in (
            ("--prompt-tokens", prompt_tokens, 1),
            ("--max-new-tokens", new_tokens, 2),
            ("--rounds", rounds, 1),
        ):
            if value < least:
                raise InputError(f"{option} {value}: expected {least} or more")
        context = context_length(source.config, args.max_context)
        needed = prompt_tokens + new_tokens + (args.sweep == "batch")  # a batch warms up with one more
        if args.sweep != "context" and needed > context:
            raise InputError(
                f"--prompt-tokens {prompt_tokens} and {counted(needed - prompt_tokens, 'new token')} exceed "
                f"the context of {counted(context, 'token')}"
            )
        check_plot(args)
        points = ()
        if args.sweep == "batch":
            points = BATCHES
        elif args.sweep == "context":
            points = contexts(context if args.max_context else min(context, LAST_CONTEXT), new_tokens)
        return Job(prompt_tokens, new_tokens, rounds, args.profile, args.sweep, args.requests, points)

    def run(self, args, comm, source, prepared):
        """Measure, and print a table or one JSON object."""
        from tqdm import tqdm

        from minitp.bench.measure import measure
        from minitp.bench.table import lines
        from minitp.launch.transport import transport_of

        model, load_s = load_bench_model(args, comm, source)
        with comm.agreed():
            if prepared.profile and model.device.is_gpu and not model.fused:
                raise InputError(
                    f"--profile needs the fused path on a GPU, which does not support "
                    f"{model.device.dtype.name} with --kv-dtype {model.kv_dtype}; omit one of them"
                )
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(bar_format="measuring: {desc}", leave=False, disable=hidden) as bar:

            def announce(seconds):
                if comm.rank == 0 and seconds >= ANNOUNCED_S:
                    tqdm.write(f"minitp: measuring takes about {duration(seconds)}", file=sys.stderr)

            result = measure(model, source, prepared, load_s, bar.set_description_str, announce)
        if comm.rank == 0:
            result["transport"] = transport_of(model.comm)
            if args.plot:
                from minitp.bench.plot import plot

                plot(result, args.plot)
            write_out(json.dumps(result) + "\n" if args.json else "\n".join(lines(result)) + "\n")
        return 0


def load_bench_model(args, comm, source):
    """Return this rank's Model and the seconds that loading it took."""
    from minitp.bench.fake_weights import TiledWeights
    from minitp.cli.load_progress import load
    from minitp.load import device_of

    if source.directory is None:  # the speed depends only on the shapes of random weights
        tiled = TiledWeights(source.tensors.shapes, device_of(comm, source, args.dtype).dtype)
        source = replace(source, tensors=tiled)
    return load(args, comm, source)


def check_share(args):
    """Reject --as-rank and --of unless they name one rank, which runs without others."""
    if args.as_rank is None or args.of is None:
        raise InputError("--as-rank R and --of N must be given together")
    if args.of < 1:
        raise InputError(f"--of {args.of}: expected at least 1 rank")
    if not 0 <= args.as_rank < args.of:
        ranks = "rank 0" if args.of == 1 else f"a rank from 0 to {args.of - 1}"
        raise InputError(f"--as-rank {args.as_rank} --of {args.of}: expected {ranks}")
    numbers_only(args.split, "measures all ranks, and --as-rank runs one")
    if args.tp != "auto" or args.replicas > 1 or world_size(os.environ) is not None:
        raise InputError("--as-rank runs a single process; omit --tp, --replicas and mpirun")


def check_requests(args):
    """Reject a number of requests below 1 or below the number of replicas, which share them."""
    if args.replicas > 1 and args.requests is None:
        raise InputError(f"--replicas {args.replicas} needs concurrent requests; add --requests N")
    if args.requests is not None and args.requests < args.replicas:
        raise InputError(f"--requests {args.requests}: expected {args.replicas} or more")


def refuse_pairs(args):
    """Reject pairs of options that cannot be combined."""
    given = {
        "--sweep": args.sweep is not None,
        "--requests": args.requests is not None,
        "--profile": args.profile,
        "--sweep context": args.sweep == "context",
        "--prompt-tokens": args.prompt_tokens is not None,
    }
    for one, other in (
        ("--sweep", "--requests"),
        ("--sweep", "--profile"),
        ("--requests", "--profile"),
        ("--sweep context", "--prompt-tokens"),
    ):
        if given[one] and given[other]:
            raise InputError(f"{one} and {other} cannot be combined; omit one of them")


def contexts(last, new_tokens):
    """Return context lengths that double up to `last`, minus the new tokens."""
    if last <= new_tokens:
        raise InputError(
            f"a context of {counted(last, 'token')} has no room for {counted(new_tokens, 'new token')} in a "
            "sweep; increase --max-context or reduce -n"
        )
    found, length = [], FIRST_CONTEXT
    while length < last - new_tokens:
        found.append(length)
        length *= 2
    return (*found, last - new_tokens)


def check_plot(args):
    """Reject a --plot that could not be drawn or written."""
    if args.plot is None:
        return
    if args.sweep is None:
        raise InputError(f"--plot {args.plot}: only a sweep can be plotted; add --sweep context or batch")
    if not args.plot.endswith(PLOTS):
        raise InputError(f"--plot {args.plot}: expected a name that ends in {' or '.join(PLOTS)}")
    from minitp.cli.inputs import check_output

    check_output(args.plot, args.plot[-4:])
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'minitp[plot]'")
