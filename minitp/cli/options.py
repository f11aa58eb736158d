"""The command line: every command, its options and their help; `shared_options` has those of several."""

import argparse

from minitp import __version__
from minitp.cli.shared_options import (
    add_cache,
    add_decode,
    add_device,
    add_max_context,
    add_model,
    add_prompt,
    add_run,
    add_sampling,
    token_ids,
)
from minitp.engine.options import CHOICES
from minitp.errors import InputError
from minitp.estimate.hardware import GPUS
from minitp.util.stdout import write_out


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
    for add in (
        add_generate,
        add_chat,
        add_trace,
        add_check,
        add_compare,
        add_perplexity,
        add_shard,
        add_plan,
        add_bench,
        add_serve,
        add_tour,
        add_info,
        add_ranks,
    ):
        sub = add(commands)
        sub.add_argument("-v", "--verbose", action="store_true", help="tracebacks, and every rank's stderr")
    return top


def add_generate(commands):
    sub = commands.add_parser(
        "generate", help="continue a prompt", description="Stream a prompt's continuation."
    )
    add_prompt(sub)
    add_sampling(sub, max_new_tokens=100)
    sub.add_argument("--no-kv-cache", action="store_true", help="recompute everything for every token")
    add_max_context(sub)
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    sub.add_argument("--stats", action="store_true", help="print times and sizes to stderr")
    add_run(sub)
    return sub


def add_chat(commands):
    sub = commands.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model; or, if stdin is no terminal, have it answer each line.",
    )
    sub.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_sampling(sub, max_new_tokens=None)
    add_max_context(sub)
    sub.add_argument("--stats", action="store_true", help="print each answer's length and speed to stderr")
    add_run(sub)
    sub.set_defaults(max_sequences=1)
    return sub


def add_trace(commands):
    sub = commands.add_parser(
        "trace",
        help="write every step of a forward pass to a file",
        description="Write the steps of a prompt's forward pass, assembled over the ranks, as safetensors.",
    )
    add_prompt(sub)
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="a .safetensors file")
    sub.add_argument(
        "--steps",
        action="append",
        metavar="GLOB",
        help="only these, as in 'prefill/layers.0.*'; repeatable. Default: all but scores and probs",
    )
    add_decode(sub, default=0)
    sub.add_argument("--per-rank", action="store_true", help="each rank's own pieces too, as rank{r}/...")
    sub.add_argument("--oracle", action="store_true", help="the float64 oracle's steps instead")
    add_model(sub)
    add_device(sub)
    return sub


def add_check(commands):
    sub = commands.add_parser(
        "check",
        help="hold every step of every rank against the oracle",
        description="Run a prompt and hold every step of every rank against the float64 oracle. Exit code 1 "
        "and the first wrong step, layer and rank if one is out of bounds.",
    )
    add_prompt(sub)
    add_decode(sub, default=2)
    sub.add_argument("--report", metavar="FILE.html", help="also write a page to look at")
    sub.add_argument(
        "--path",
        choices=["explicit", "fused"],
        default="explicit",
        help="fused: what runs on GPUs, at the steps that it has; explicit (default): operation by operation",
    )
    add_model(sub)
    add_device(sub)
    return sub


def add_compare(commands):
    sub = commands.add_parser(
        "compare",
        help="two traces or dumps, whoever made them",
        description="Hold the steps of B against those of A. Exit code 1 and the first step that departs.",
    )
    sub.add_argument("a", metavar="A", help="a .safetensors or .npz file, the reference")
    sub.add_argument("b", metavar="B", help="the file held against it")
    sub.add_argument("--map", metavar="NAMES.json", help="an object: name in A to name in B")
    sub.add_argument(
        "--tolerance", type=float, metavar="X", help="relative error allowed; default by the files' dtypes"
    )
    sub.add_argument("--report", metavar="FILE.html", help="also write a page to look at")
    return sub


def add_perplexity(commands):
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
    add_run(sub)
    return sub


def add_shard(commands):
    sub = commands.add_parser(
        "shard",
        help="who holds what",
        description="Print the sharding plan: tensor, axis, each rank's range, bytes.",
    )
    sub.add_argument("-o", "--output", metavar="DIR", help="write rank{r}.safetensors and plan.json there")
    add_model(sub)
    return sub


def add_plan(commands):
    sub = commands.add_parser(
        "plan",
        help="will it fit, and how fast will it be",
        description="Memory a rank and predicted speed, from config.json and what the hardware can do.",
    )
    sub.add_argument(
        "--gpu", choices=["cpu", *GPUS], default="cpu", help="cpu, the default, is this machine, measured now"
    )
    sub.add_argument("--nodes", type=int, metavar="N", help="--tp ranks over N nodes; default: 8 GPUs a node")
    sub.add_argument("--context", type=int, metavar="N", help="positions a sequence; default 4096")
    sub.add_argument("--prompt-tokens", type=int, metavar="N", help="of a sequence; default 512")
    sub.add_argument("--batch", type=int, metavar="N", help="sequences at once; default: as many as fit")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--dtype", choices=CHOICES["dtype"], default="auto")
    add_model(sub)
    return sub


def add_bench(commands):
    sub = commands.add_parser(
        "bench",
        help="how fast, and how near to the machine's limits",
        description="Measure the limits of this machine, then prefill and decode beside them.",
    )
    sub.add_argument("--prompt-tokens", type=int, metavar="N", help="random ones; default 128")
    sub.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="default 64; in a sweep 16")
    sub.add_argument("--rounds", type=int, metavar="N", help="default 5; in a sweep 3")
    sub.add_argument("--profile", action="store_true", help="also where the time goes, step by step")
    sub.add_argument("--requests", type=int, metavar="N", help="instead, N requests at once and one by one")
    sub.add_argument("--sweep", choices=["context", "batch"], help="instead, at several lengths or batches")
    sub.add_argument("--max-context", type=int, metavar="N", help="--sweep context: up to N; default 2048")
    sub.add_argument("--plot", metavar="FILE", help="draw the sweep: .png or .svg")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--as-rank", type=int, metavar="R", help="run only rank R's share, alone, of --of ranks")
    sub.add_argument("--of", type=int, metavar="N")
    add_run(sub)
    return sub


def add_serve(commands):
    sub = commands.add_parser(
        "serve",
        help="an OpenAI-compatible HTTP server",
        description="Serve a model: /v1/completions, /v1/chat/completions, /metrics, and a page at /.",
    )
    sub.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="default 127.0.0.1: this machine only"
    )
    sub.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0: a free one")
    sub.add_argument(
        "--api-key", metavar="KEY", help="wanted of clients; or in MINITP_API_KEY, which ps hides"
    )
    sub.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; default 256, then 429",
    )
    sub.add_argument(
        "--request-timeout", type=float, default=600, metavar="S", help="seconds for an answer; default 600"
    )
    sub.add_argument(
        "--drain-timeout", type=float, default=30, metavar="S", help="seconds after SIGTERM; default 30"
    )
    sub.add_argument("--restart", action="store_true", help="start the ranks again when one dies")
    add_cache(sub)
    add_run(sub)
    return sub


def add_tour(commands):
    sub = commands.add_parser(
        "tour",
        help="run the one-file story of tensor parallelism",
        description="Run minitp/tour.py, which is made to be read: a plain Llama model on several ranks.",
    )
    sub.add_argument("prompt", nargs="?", metavar="PROMPT")
    sub.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="token ids in place of the prompt")
    sub.add_argument("-n", "--max-new-tokens", type=int, default=40, metavar="N", help="default 40")
    sub.add_argument("--model", default="smollm2", help="as for generate; a plain Llama or Mistral")
    sub.add_argument("--tp", metavar="N", help="ranks; default 4")
    sub.add_argument("--gpu", action="store_true", help="each rank on a GPU, with NCCL")
    return sub


def add_info(commands):
    sub = commands.add_parser(
        "info",
        help="what a bug report needs",
        description="Say what is installed and what the machine has: MPI, BLAS, CuPy, NCCL, GPUs, cores, "
        "variables. Nothing is started, and nothing that is missing makes it fail.",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return sub


def add_ranks(commands):
    """What LLM, chat and serve start; without `help` it does not appear among the commands."""
    sub = commands.add_parser("ranks", description="Ranks that serve LLM, chat or serve, which start them.")
    sub.add_argument("options", nargs="?", metavar="JSON", help="the fields of EngineOptions")
    return sub
