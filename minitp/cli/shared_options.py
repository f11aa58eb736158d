"""The options that several commands share."""

import argparse
from dataclasses import fields

from minitp.engine.options import CHOICES, EngineOptions


def add_sampling(sub, max_new_tokens):
    sub.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"default {max_new_tokens or 'what the context holds'}",
    )
    sub.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="among the K most probable; 0: all")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the most probable, up to P")
    sub.add_argument("--seed", type=int, help="the same seed gives the same text at the same --tp")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    sub.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")


def add_max_context(sub):
    sub.add_argument("--max-context", type=int, metavar="N", help="at most the model's own, the default")


def add_cache(sub):
    """How many requests at once, and what they may take."""
    add_max_context(sub)
    sub.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="positions that all requests may take together; default: what fits in a quarter of the memory, "
        "or in most of what a GPU has left",
    )
    sub.add_argument("--block-size", type=int, default=16, metavar="N", help="of the cache; default 16")
    sub.add_argument(
        "--max-tokens-per-step", type=int, default=512, metavar="N", help="of all requests; default 512"
    )
    sub.add_argument(
        "--max-sequences", type=int, default=64, metavar="N", help="that run at once; default 64"
    )


def add_prompt(sub):
    sub.add_argument("prompt", nargs="?", metavar="PROMPT")
    sub.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="token ids in place of the prompt")


def add_decode(sub, default):
    sub.add_argument(
        "--decode",
        type=int,
        default=default,
        metavar="N",
        help=f"after the prompt, N passes of one token, greedily chosen; default {default}",
    )


def add_model(sub):
    sub.add_argument(
        "--model",
        default="smollm2",
        help="a directory, a .gguf file, a Hugging Face id, smollm2 (the demo, default), or random:NAME "
        "(mistral-7b, llama-3-8b, tinyllama-1.1b, smollm2-135m)",
    )
    sub.add_argument(
        "--tp",
        metavar="N",
        help="ranks: 1 to the number of attention heads, or auto (default 4; under mpirun, its world)",
    )
    sub.add_argument("--layers", type=int, metavar="N", help="only the first N layers")


def add_run(sub):
    """Which model, and how it is computed."""
    add_model(sub)
    add_device(sub)
    add_kv_dtype(sub)


def add_device(sub):
    sub.add_argument(
        "--device",
        choices=CHOICES["device"],
        default="auto",
        help="cuda: each rank on a GPU of its own; auto (default): cuda where CuPy and a GPU are",
    )
    sub.add_argument("--dtype", choices=CHOICES["dtype"], default="auto")
    sub.add_argument(
        "--comm",
        choices=CHOICES["comm"],
        default="auto",
        help="shm: shared memory within a host, messages between hosts; mpi: messages; on GPUs also nccl, "
        "and peer: small sums through the GPUs' own memory; auto (default): the fastest there is",
    )
    sub.add_argument(
        "--share-gpu",
        action="store_true",
        help="several ranks may use one GPU: to see that it is right, slow",
    )


def add_kv_dtype(sub):
    sub.add_argument(
        "--kv-dtype",
        choices=CHOICES["kv_dtype"],
        default="auto",
        help="how keys and values are kept: as --dtype (auto), in half or in a quarter of float32's bytes",
    )


def token_ids(text):
    """The ids of --tokens."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers and commas, as in 1,2,3") from None


def llm_options(args, tp):
    """Return the parameters of the LLM that a command starts; options that it does not have are None."""
    given = {field.name: getattr(args, field.name, None) for field in fields(EngineOptions)}
    return {**given, "tp": tp}
