"""The options that several commands share. `parser` is an `arguments.Parser`, whose groups they go to."""

import argparse
from dataclasses import fields

from minitp.engine.options import CHOICES, EngineOptions

TP = (
    "number of ranks, from 1 to the number of attention heads; auto: one per GPU, or without GPUs one per "
    "physical core, up to 4 (default: auto; under mpirun, its number of processes)"
)


def add_prompt(parser):
    group = parser.groups["input"]
    group.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to start from")
    group.add_argument(
        "--tokens", type=token_ids, metavar="1,2,3", help="token ids to start from, instead of PROMPT"
    )


def add_sampling(parser, max_new_tokens):
    group = parser.groups["sampling"]
    group.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"most tokens to generate (default: {max_new_tokens or 'what the context has room for'})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="randomness of the choice; 0 always takes the most probable token (default: 0)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="choose among the K most probable tokens; 0: among all (default: 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="nucleus sampling: choose from the smallest set of tokens with probability P (default: 1)",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="repeat a random choice: the same seed gives the same text at the same --tp (default: random)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text; repeatable (default: none)",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="continue after an end-of-text token (default: stop)"
    )


def add_max_context(parser):
    parser.groups["model"].add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its continuation (default: the model's context length)",
    )


def add_decode(parser, default):
    parser.groups["steps"].add_argument(
        "--decode",
        type=int,
        default=default,
        metavar="N",
        help=f"after the prompt, run N passes of one token each, chosen greedily (default: {default})",
    )


def add_model(parser, tp=TP):
    group = parser.groups["model"]
    group.add_argument(
        "--model",
        default="smollm2",
        help="a directory, a .gguf file, a Hugging Face id, smollm2 (the demo model), or random:NAME with "
        "NAME one of mistral-7b, llama-3-8b, tinyllama-1.1b, smollm2-135m (default: smollm2)",
    )
    group.add_argument(
        "--layers", type=int, metavar="N", help="use only the first N layers (default: all layers)"
    )
    parser.groups["ranks"].add_argument("--tp", default="auto", metavar="N", help=tp)


def add_dtype(parser):
    parser.groups["model"].add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        default="auto",
        help="number format of weights and products; auto: float32 on CPUs; on GPUs the checkpoint's "
        "16-bit format, or else bfloat16 (default: auto)",
    )


def add_kv_dtype(parser):
    parser.groups["model"].add_argument(
        "--kv-dtype",
        choices=CHOICES["kv_dtype"],
        default="auto",
        help="number format of the KV cache; auto: as --dtype; int8 needs a quarter of float32's memory "
        "(default: auto)",
    )


def add_device(parser):
    """Add the options of the hardware that ranks run on."""
    add_dtype(parser)
    group = parser.groups["ranks"]
    group.add_argument(
        "--device",
        choices=CHOICES["device"],
        default="auto",
        help="cuda gives each rank its own GPU; auto: cuda if CuPy and a GPU are there, else cpu "
        "(default: auto)",
    )
    group.add_argument(
        "--comm",
        choices=CHOICES["comm"],
        default="auto",
        help="how ranks exchange data. shm: shared memory within a host, messages between hosts; mpi: "
        "messages; nccl: NCCL between GPUs; peer: small sums directly in the GPUs' memory, the rest by NCCL; "
        "auto: the fastest that works (default: auto)",
    )
    group.add_argument(
        "--share-gpu",
        action="store_true",
        help="let several ranks share a GPU; slow, for checking results only (default: one GPU per rank)",
    )


def add_run(parser):
    """Add the options of a command that runs a model."""
    add_model(parser)
    add_device(parser)
    add_kv_dtype(parser)


def add_json(parser):
    parser.groups["output"].add_argument(
        "--json", action="store_true", help="print one JSON object instead of text"
    )


def add_report(parser):
    parser.groups["output"].add_argument(
        "--report", metavar="FILE.html", help="also write an HTML report (default: no report)"
    )


def token_ids(text):
    """Parse the value of --tokens."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers and commas, as in 1,2,3") from None


def llm_options(args, tp):
    """Return the parameters of the LLM that a command starts; options that the command lacks are None."""
    given = {field.name: getattr(args, field.name, None) for field in fields(EngineOptions)}
    return {**given, "tp": tp}
