"""`minitp generate`: stream the continuation of a prompt."""

import json
import sys
from time import perf_counter

from minitp.cli.color import dimmed
from minitp.cli.command import OnRanks
from minitp.cli.options import PROMPT_OR_TOKENS, add_json, add_max_context, add_prompt, add_run, add_sampling
from minitp.errors import InputError
from minitp.launch.transport import transport_of
from minitp.util.format import counted
from minitp.util.stdout import write_out


class GenerateCommand(OnRanks):
    """The command `minitp generate`."""

    name = "generate"
    inputs = PROMPT_OR_TOKENS
    summary = "continue a prompt"
    description = (
        "Print the continuation of a prompt, token by token. On a terminal the prompt itself is shown first, "
        "dimmed."
    )
    examples = (
        ('minitp generate "Once upon a time" -n 40 --tp 2', "40 tokens from the demo model on two ranks"),
        (
            'minitp generate "Once upon a time" --model ./Mistral-7B-v0.1 --temperature 0.8 --seed 1 --stats',
            "sampled but repeatable text from a checkpoint, with times and sizes on stderr",
        ),
    )

    def add_options(self, parser):
        add_prompt(parser)
        add_sampling(parser, max_new_tokens=100)
        add_run(parser)
        add_max_context(parser)
        parser.groups["model"].add_argument(
            "--no-kv-cache",
            action="store_true",
            help="recompute the whole sequence for each token (default: keep keys and values)",
        )
        add_json(parser)
        parser.groups["output"].add_argument(
            "--stats", action="store_true", help="print times and sizes to stderr"
        )

    def prepare(self, args, source):
        """Return the prompt's tokens and the context length."""
        from minitp.cli.inputs import prompt_tokens, sampling_params
        from minitp.request import check_prompt, context_length

        sampling_params(args, source.config)
        ids = prompt_tokens(args, source)
        if args.stop or args.tokens is not None:  # otherwise prompt_tokens has read it
            tokenizer = source.tokenizer()
            if args.stop and tokenizer is None:
                raise InputError(f"--stop needs a tokenizer, and {source.name} has no tokenizer.json")
        context = context_length(source.config, args.max_context)
        check_prompt(ids, source.config, context)
        return ids, context

    def run(self, args, comm, source, prepared):
        """Stream the text, or print one JSON object."""
        from minitp.cli.inputs import sampling_params
        from minitp.cli.load_progress import load
        from minitp.generate import generate
        from minitp.request import Request

        ids, context = prepared
        model, load_s = load(args, comm, source)
        request = None
        if comm.rank == 0:
            tokenizer = source.tokenizer()
            request = Request(
                params=sampling_params(args, source.config),
                eos_token_ids=source.eos_token_ids(tokenizer),
                prompt_ids=ids,
                max_context=context,
                tokenizer=tokenizer,
                emit=(lambda piece: True) if args.json else write_out,
            )
            if args.prompt and not args.json and sys.stdout.isatty():
                write_out(dimmed(args.prompt, sys.stdout))
        model.comm.seconds, started = 0.0, perf_counter()
        for _ in generate(model, ids, request, use_cache=not args.no_kv_cache):
            pass
        if comm.rank == 0:
            comm_share = model.comm.seconds / (perf_counter() - started)
            report(args, request, statistics(request, model, source.shares, comm_share, load_s))
        return 0


def statistics(request, model, shares, comm_share, load_s):
    """Return the statistics of a run.

    `shares` is the value of --split that gives the same plan, and `comm_share` the share of rank 0's time
    that was spent in collectives.
    """
    return {
        "tp": model.comm.size,
        "split": shares,
        "dtype": model.device.dtype.name,
        "load_s": round(load_s, 4),
        "ttft_s": round(request.ttft_s, 4),
        "decode_tokens_per_s": request.decode_tokens_per_s and round(request.decode_tokens_per_s, 3),
        "weight_bytes_per_rank": model.weights.nbytes,
        "comm_share": round(comm_share, 4),
        "transport": transport_of(model.comm),
        "seed": request.sampler.seed,
    }


def report(args, request, stats):
    """Print the final newline or the JSON object, and the statistics."""
    if args.json:
        result = {
            "prompt_token_ids": request.prompt_ids,
            "token_ids": request.token_ids,
            "text": request.text if request.tokenizer else None,
            "finish_reason": request.finish_reason,
            "stats": stats,
        }
        write_out(json.dumps(result) + "\n")
    elif request.finish_reason != "closed":
        write_out("\n")
    if args.stats:
        print(statistics_text(request, stats), file=sys.stderr)


def statistics_text(request, stats):
    """Return the statistics as three lines of text."""
    speed = stats["decode_tokens_per_s"]
    after = f", {speed:.1f} tokens/s after the first" if speed else ""
    equal = len(set(stats["split"].split(","))) == 1
    split = "" if equal else f" (--split {stats['split']})"
    through = f" through {stats['transport']['name']}" if stats["transport"]["name"] else ""
    megabytes = stats["weight_bytes_per_rank"] / 1e6
    return (
        f"{counted(stats['tp'], 'rank')}{split}, {stats['dtype']}, {megabytes:.1f} MB of weights on rank 0, "
        f"loaded in {stats['load_s']:.2f} s\n"
        f"{counted(len(request.prompt_ids), 'prompt token')}, first new token after {stats['ttft_s']:.3f} s\n"
        f"{counted(len(request.token_ids), 'new token')}{after}; {stats['comm_share']:.0%} of the time in "
        f"collectives{through}"
    )
