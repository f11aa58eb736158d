"""`minitp bench`."""

import importlib.util
import json
import sys
from dataclasses import dataclass

from tqdm import tqdm

from minitp.bench.measure import SWEEP_STEPS, measure
from minitp.bench.table import lines
from minitp.commands.loading import load
from minitp.commands.prompt import check_output
from minitp.errors import InputError
from minitp.generate import context_length
from minitp.output import write_out

PLOTS = (".png", ".svg")
BATCHES = (1, 2, 4, 8, 16, 32)
FIRST_CONTEXT, LAST_CONTEXT = 32, 2048


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


class Bench:
    """`minitp bench`."""

    @staticmethod
    def prepare(args, source):
        """Check the options; the Job."""
        context = context_length(source.config, args.max_context)
        for option, value, least in (
            ("--prompt-tokens", args.prompt_tokens, 1),
            ("--max-new-tokens", args.max_new_tokens, 2),
            ("--rounds", args.rounds, 1),
            ("--requests", 1 if args.requests is None else args.requests, 1),
        ):
            if value < least:
                raise InputError(f"{option} {value}: expected {least} or more")
        new = SWEEP_STEPS if args.sweep else args.max_new_tokens
        if args.sweep != "context" and args.prompt_tokens + new > context:
            raise InputError(
                f"--prompt-tokens {args.prompt_tokens} and {new} new ones exceed the context of {context}"
            )
        if args.requests is not None and args.sweep is not None:
            raise InputError("--requests and --sweep are two measurements; give one of them")
        check_plot(args)
        points = ()
        if args.sweep == "batch":
            points = BATCHES
        elif args.sweep == "context":
            if context <= SWEEP_STEPS:
                raise InputError(
                    f"a context of {context}, and a sweep decodes {SWEEP_STEPS} tokens; give more"
                )
            points = contexts(context if args.max_context else min(context, LAST_CONTEXT))
        return Job(args.prompt_tokens, new, args.rounds, args.profile, args.sweep, args.requests, points)

    @staticmethod
    def run(args, comm, source, job):
        """Measure, and print a table or one JSON object."""
        model, load_s = load(args, comm, source)
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(bar_format="measuring: {desc}", leave=False, disable=hidden) as bar:
            result = measure(model, source, job, load_s, bar.set_description_str)
        if comm.rank == 0:
            if args.plot:
                from minitp.bench.plot import plot

                plot(result, args.plot)
            write_out(json.dumps(result) + "\n" if args.json else "\n".join(lines(result)) + "\n")
        return 0


def contexts(last):
    """Lengths that double up to `last`, which leaves room for the new tokens."""
    found, last = [], last - SWEEP_STEPS
    length = FIRST_CONTEXT
    while length < last:
        found.append(length)
        length *= 2
    return (*found, last)


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
