"""`minitp bench`."""

import importlib.util
import json
import sys
from dataclasses import dataclass, replace

from tqdm import tqdm

from minitp.bench.fake_weights import TiledWeights
from minitp.bench.measure import measure
from minitp.bench.table import lines
from minitp.cli.inputs import check_output
from minitp.cli.load_progress import load
from minitp.errors import InputError
from minitp.load import device_of
from minitp.request import context_length
from minitp.util.stdout import write_out

PLOTS = (".png", ".svg")
BATCHES = (1, 2, 4, 8, 16, 32)
FIRST_CONTEXT, LAST_CONTEXT = 32, 2048
PROMPT_TOKENS = 128
# New tokens and rounds: of one length, and at each point of a sweep.
NEW_TOKENS, ROUNDS = (64, 16), (5, 3)


@dataclass(frozen=True)
class Job:
    """What is to be measured."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    profile: bool
    sweep: str | None
    requests: int | None = None
    points: tuple = ()  # of the sweep


def prepare(args, source):
    """Check the options; the Job."""
    if source.config.num_local_experts:
        raise InputError(f"{source.name} is a mixture of experts, for which bench has no limits yet")
    refuse_pairs(args)
    sweep = args.sweep is not None
    prompt_tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    new_tokens = NEW_TOKENS[sweep] if args.max_new_tokens is None else args.max_new_tokens
    rounds = ROUNDS[sweep] if args.rounds is None else args.rounds
    for option, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--max-new-tokens", new_tokens, 2),
        ("--rounds", rounds, 1),
        ("--requests", 1 if args.requests is None else args.requests, 1),
    ):
        if value < least:
            raise InputError(f"{option} {value}: expected {least} or more")
    context = context_length(source.config, args.max_context)
    needed = prompt_tokens + new_tokens + (args.sweep == "batch")  # its first step warms up
    if args.sweep != "context" and needed > context:
        raise InputError(
            f"--prompt-tokens {prompt_tokens} and {needed - prompt_tokens} new ones exceed the context "
            f"of {context}"
        )
    check_plot(args)
    points = ()
    if args.sweep == "batch":
        points = BATCHES
    elif args.sweep == "context":
        points = contexts(context if args.max_context else min(context, LAST_CONTEXT), new_tokens)
    return Job(prompt_tokens, new_tokens, rounds, args.profile, args.sweep, args.requests, points)


def run(args, comm, source, job):
    """Measure, and print a table or one JSON object."""
    if source.directory is None:  # of random weights only the shapes matter here
        tiled = TiledWeights(source.tensors.shapes, device_of(comm, source, args.dtype).dtype)
        source = replace(source, tensors=tiled)
    model, load_s = load(args, comm, source)
    with comm.agreed():
        if job.profile and model.device.is_gpu and not model.fused:
            raise InputError(
                f"--profile is of the fused path on a GPU, which does not take {model.device.dtype.name} "
                f"with --kv-dtype {model.kv_dtype}; leave one of them out"
            )
    hidden = comm.rank != 0 or not sys.stderr.isatty()
    with tqdm(bar_format="measuring: {desc}", leave=False, disable=hidden) as bar:
        result = measure(model, source, job, load_s, bar.set_description_str)
    if comm.rank == 0:
        if args.plot:
            from minitp.bench.plot import plot

            plot(result, args.plot)
        write_out(json.dumps(result) + "\n" if args.json else "\n".join(lines(result)) + "\n")
    return 0


def refuse_pairs(args):
    """Options of which one would leave the other without effect."""
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
            raise InputError(f"{one} and {other} do not go together; give one of them")


def contexts(last, new_tokens):
    """Lengths that double up to `last`, and leave room for the new tokens."""
    if last <= new_tokens:
        raise InputError(f"a context of {last}, and the sweep decodes {new_tokens} tokens at each; give more")
    found, length = [], FIRST_CONTEXT
    while length < last - new_tokens:
        found.append(length)
        length *= 2
    return (*found, last - new_tokens)


def check_plot(args):
    """Refuse early what could not be drawn in the end."""
    if args.plot is None:
        return
    if args.sweep is None:
        raise InputError(f"--plot {args.plot}: there is something to draw only with --sweep")
    if not args.plot.endswith(PLOTS):
        raise InputError(f"--plot {args.plot}: expected a name that ends in {' or '.join(PLOTS)}")
    check_output(args.plot, args.plot[-4:])
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'minitp[plot]'")
