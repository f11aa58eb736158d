"""`minitp plan`: predict whether a model fits, and how fast it will be."""

import argparse
import json
import os

from minitp.cli.command import OneProcess
from minitp.cli.options import add_dtype, add_json, add_model, add_replicas
from minitp.errors import InputError
from minitp.estimate.hardware import GPUS, GPUS_PER_NODE
from minitp.util.environment import BLAS_THREADS
from minitp.util.format import counted
from minitp.util.stdout import write_out

CONTEXT, PROMPT = 4096, 512
TP = (
    "number of ranks in the marked row of the tables; auto: the fewest that fit, or with --gpu cpu as many "
    "as `minitp generate` would start on this machine (default: auto)"
)


class PlanCommand(OneProcess):
    """The command `minitp plan`."""

    name = "plan"
    summary = "predict whether a model fits, and how fast it will be"
    description = (
        "Print the memory per rank and the predicted speed for several numbers of ranks, computed from "
        "config.json and the hardware's specifications. No weights are read, and no GPU is needed."
    )
    examples = (
        ("minitp plan --model mistralai/Mistral-7B-v0.1 --gpu h100", "how many H100s the model needs"),
        ("minitp plan --model random:llama-3-8b --gpu a100 --tp 2 --context 8192", "two A100s, context 8192"),
        ("minitp plan --model random:llama-3-8b --gpu l40s,rtx-4090 --split auto", "unequal GPUs and shares"),
    )

    def add_options(self, parser):
        group = parser.groups["estimate"]
        group.add_argument(
            "--gpu",
            type=gpu_names,
            default="cpu",
            metavar="NAME",
            help=f"the hardware: {', '.join(GPUS)}; or several of these with commas, one for each rank; cpu: "
            "this machine, which is measured for a second (default: cpu)",
        )
        group.add_argument(
            "--nodes",
            type=int,
            metavar="N",
            help=f"number of machines for the ranks of a replica (default: one per {GPUS_PER_NODE} GPUs)",
        )
        for option, what in (
            (
                "--context",
                f"tokens in a sequence, prompt included (default: {CONTEXT}, or the model's context if less)",
            ),
            ("--prompt-tokens", f"tokens in the prompt (default: {PROMPT})"),
            ("--batch", "number of concurrent sequences (default: as many as fit)"),
        ):
            group.add_argument(option, type=int, metavar="N", help=what)
        add_model(parser, TP)
        add_replicas(parser, "plan for N copies of the model, each on its own --tp ranks")
        add_dtype(parser)
        add_json(parser)

    def start(self, args, rank_command):
        """Run with one BLAS thread, because the measurement itself starts a thread per core."""
        if args.gpu == "cpu":
            os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))
        return super().start(args, rank_command)

    def run(self, args):
        """Print what fits and the speed to expect."""
        from minitp.cli.plan_result import predict
        from minitp.cli.plan_text import text
        from minitp.loading.source import open_config

        config = open_config(args.model, args.layers, args.revision)
        result = predict(args, config, read_workload(args, config))
        write_out(json.dumps(result) + "\n" if args.json else text(result))
        return 0


def gpu_names(text):
    """Parse the value of --gpu: cpu, or names of GPUs."""
    for name in text.split(","):
        if text != "cpu" and name not in GPUS:
            known = ", ".join(map(repr, ("cpu", *GPUS)))
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r:.50} (choose from {known})")
    return text


def read_workload(args, config):
    """Return the Workload that the options describe."""
    from minitp.estimate.estimate import Workload

    longest = config.max_position_embeddings
    context = min(CONTEXT, longest) if args.context is None else args.context
    if not 2 <= context <= longest:
        raise InputError(
            f"--context {context}: this model's context is {counted(longest, 'token')}; give 2 to {longest}"
        )
    prompt = min(PROMPT, context - 1) if args.prompt_tokens is None else args.prompt_tokens
    if not 1 <= prompt < context:
        raise InputError(
            f"--prompt-tokens {prompt}: a prompt and one more token must fit --context {context}; "
            f"give 1 to {context - 1}"
        )
    if args.batch is not None and args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1 sequence")
    return Workload(context, prompt, args.batch)
