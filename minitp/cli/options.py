"""Options that several commands share. Each function adds options to groups of an `arguments.Parser`."""

import argparse
import json
from dataclasses import fields

from minitp.engine.options import CHOICES, EngineOptions

PROMPT_OR_TOKENS = "{PROMPT | --tokens IDS}"  # in usage lines
TP = (
    "number of ranks, from 1 to the number of attention heads; auto: one per GPU or, without GPUs, one per "
    "physical core, up to 4 (default: auto; with --split, its number of shares; under mpirun, its number of "
    "processes)"
)
SHARES = (
    "the ranks' shares of the heads, FFN columns and vocabulary: a number for each rank, as in 3,1 or 0.6,0.4"
)
SPLIT = (
    f"{SHARES}; auto: in proportion to the memory bandwidth that is measured on each rank, as far as its "
    "memory allows; memory: in proportion to each rank's memory (default: equal shares)"
)


def add_prompt(parser, default=""):
    group = parser.groups["input"]
    group.add_argument("prompt", nargs="?", metavar="PROMPT", help=f"the text to start from{default}")
    group.add_argument(
        "--tokens",
        type=token_ids,
        metavar="IDS",
        help="token ids to start from instead of PROMPT, as in 1,2,3",
    )


def add_max_new_tokens(parser, default):
    parser.groups["sampling"].add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        default=default,
        metavar="N",
        help=f"maximum number of tokens to generate (default: {default or 'as many as fit in the context'})",
    )


def add_sampling(parser, max_new_tokens):
    add_max_new_tokens(parser, max_new_tokens)
    group = parser.groups["sampling"]
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="sampling temperature; 0: always choose the most probable token (default: 0)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most probable tokens; 0: from all tokens (default: 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="nucleus sampling: sample from the smallest set of most probable tokens whose total probability "
        "is at least P (default: 1)",
    )
    add_penalties(group)
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="random seed; the same seed and --tp give the same text (default: chosen at random)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the output before this text, of up to 1024 characters; can be repeated up to 32 times "
        "(default: none)",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        help="continue after an end-of-sequence (EOS) token (default: stop)",
    )


def add_penalties(group):
    """Add min-p, the penalties, and the logit bias to the options of sampling."""
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="sample only from tokens with at least P times the probability of the most probable one "
        "(default: 0)",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtract X, from -2 to 2, from the logit of each token that the output already has "
        "(default: 0)",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtract X, from -2 to 2, from a token's logit for each time that the output already has it "
        "(default: 0)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="for tokens that the prompt or the output already has, divide positive logits by X, from 0.01 "
        "to 100, and multiply negative ones by X; above 1 reduces repetition (default: 1)",
    )
    group.add_argument(
        "--logit-bias",
        type=json_object('{"13": -100}'),
        metavar="JSON",
        help="numbers from -100 to 100 to add to logits, by token id, as in '{\"13\": -100}' (default: none)",
    )


def add_max_context(parser):
    parser.groups["model"].add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="maximum number of tokens in a prompt and its continuation (default: the model's context "
        "length)",
    )


def add_chat_template_kwargs(parser, group):
    parser.groups[group].add_argument(
        "--chat-template-kwargs",
        type=json_object('{"enable_thinking": false}'),
        metavar="JSON",
        help="variables of the model's chat template, as in '{\"enable_thinking\": false}' for Qwen 3 "
        "(default: none)",
    )


def add_decode(parser, default):
    parser.groups["steps"].add_argument(
        "--decode",
        type=int,
        default=default,
        metavar="N",
        help="number of tokens to decode greedily after the prompt, in one forward pass each "
        f"(default: {default})",
    )


def add_model(parser, tp=TP, split=SPLIT):
    group = parser.groups["model"]
    group.add_argument(
        "--model",
        default="smollm2",
        help="a directory, a .gguf file, a Hugging Face id (owner/name, or owner/name:Q4_K_M for GGUF), "
        "smollm2 (the demo model), or random:NAME for random weights, where NAME is mistral-7b, llama-3-8b, "
        "mixtral-8x7b, tinyllama-1.1b or smollm2-135m (default: smollm2)",
    )
    add_revision(parser)
    group.add_argument(
        "--layers", type=int, metavar="N", help="use only the first N layers (default: all layers)"
    )
    parser.groups["ranks"].add_argument("--tp", default="auto", metavar="N", help=tp)
    add_split(parser, split)


def add_split(parser, text=SPLIT):
    parser.groups["ranks"].add_argument("--split", metavar="SHARES", help=text)


def add_revision(parser):
    parser.groups["model"].add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a Hugging Face id (default: its main branch)",
    )


def add_dtype(parser):
    parser.groups["model"].add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        default="auto",
        help="data type of weights and activations; auto: float32 on CPUs; on GPUs the checkpoint's own if "
        "it has 16 bits, otherwise bfloat16 (default: auto)",
    )


def add_kv_dtype(parser):
    parser.groups["model"].add_argument(
        "--kv-dtype",
        choices=CHOICES["kv_dtype"],
        default="auto",
        help="data type of the KV cache; auto: same as --dtype; int8 needs about a quarter of float32's "
        "memory (default: auto)",
    )


def add_device(parser):
    """Add the options for the hardware that ranks run on."""
    add_dtype(parser)
    group = parser.groups["ranks"]
    group.add_argument(
        "--device",
        choices=CHOICES["device"],
        default="auto",
        help="where ranks compute. cuda: on GPUs, one per rank; auto: cuda if CuPy and a GPU are available, "
        "otherwise cpu (default: auto)",
    )
    group.add_argument(
        "--comm",
        choices=CHOICES["comm"],
        default="auto",
        help="how ranks communicate. shm: shared memory within a host, MPI between hosts; mpi: MPI; nccl: "
        "NCCL between GPUs; peer: small all-reduces through peer GPU memory, everything else through NCCL; "
        "auto: the fastest, on GPUs by a measurement at the start that -v shows (default: auto)",
    )
    group.add_argument(
        "--share-gpu",
        action="store_true",
        help="let several ranks share a GPU; slow, only for checking results (default: one GPU per rank)",
    )


def add_run(parser):
    """Add the options of a command that runs a model."""
    add_model(parser)
    add_device(parser)
    add_kv_dtype(parser)


def add_replicas(parser, what):
    """Add --replicas, whose help begins with `what`."""
    parser.groups["ranks"].add_argument(
        "--replicas", type=replica_count, default=1, metavar="N", help=f"{what} (default: 1)"
    )


def add_json(parser):
    parser.groups["output"].add_argument(
        "--json", action="store_true", help="print one JSON object instead of text"
    )


def add_report(parser):
    parser.groups["output"].add_argument(
        "--report", metavar="FILE.html", help="also write an HTML report (default: no report)"
    )


def replica_count(text):
    """Parse the value of --replicas."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1000):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 to 999")
    return int(text)


def token_ids(text):
    """Parse the value of --tokens."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers and commas, as in 1,2,3") from None


def json_object(example):
    """Return the parser of an option that is a JSON object; its error message shows `example`."""

    def parse(text):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise argparse.ArgumentTypeError(f"{text!r:.100}: expected a JSON object, as in '{example}'")
        return value

    return parse


def llm_options(args, tp):
    """Return the parameters for LLM from a command's options; None for options that the command lacks."""
    given = {field.name: getattr(args, field.name, None) for field in fields(EngineOptions)}
    return {**given, "tp": tp}
