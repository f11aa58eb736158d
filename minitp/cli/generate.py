"""`minitp generate`."""

import json
import sys
from time import perf_counter

from minitp.cli.inputs import prompt_tokens, sampling_params
from minitp.cli.load_progress import load
from minitp.errors import InputError
from minitp.generate import generate
from minitp.request import Request, check_prompt, context_length
from minitp.util.stdout import write_out


def prepare(args, source):
    """Check the options and the prompt; the prompt's tokens and the context length."""
    sampling_params(args)
    ids = prompt_tokens(args, source)
    if args.stop or args.tokens is not None:  # else the prompt has shown that there is one, and sound
        tokenizer = source.tokenizer()
        if args.stop and tokenizer is None:
            raise InputError(f"--stop needs text, and {source.name} has no tokenizer.json")
    context = context_length(source.config, args.max_context)
    check_prompt(ids, source.config, context)
    return ids, context


def run(args, comm, source, job):
    """Stream the text, or print one JSON object."""
    ids, context = job
    model, load_s = load(args, comm, source)
    request = None
    if comm.rank == 0:
        request = Request(
            params=sampling_params(args),
            eos_token_ids=source.config.eos_token_ids,
            prompt_ids=ids,
            max_context=context,
            tokenizer=source.tokenizer(),
            emit=(lambda piece: True) if args.json else write_out,
        )
    comm.seconds, started = 0.0, perf_counter()
    for _ in generate(model, ids, request, use_cache=not args.no_kv_cache):
        pass
    if comm.rank == 0:
        comm_share = comm.seconds / (perf_counter() - started)
        report(args, request, statistics(request, model, comm_share, load_s))
    return 0


def statistics(request, model, comm_share, load_s):
    """What --stats and --json tell of a run; `comm_share` of the time was spent in collectives on rank 0."""
    return {
        "tp": model.comm.size,
        "dtype": model.device.dtype.name,
        "load_s": round(load_s, 4),
        "ttft_s": round(request.ttft_s, 4),
        "decode_tokens_per_s": request.decode_tokens_per_s and round(request.decode_tokens_per_s, 3),
        "weight_bytes_per_rank": model.weights.nbytes,
        "comm_share": round(comm_share, 4),
        "seed": request.sampler.seed,
    }


def report(args, request, stats):
    """The end of a generation: a last newline, or the JSON object; and the statistics."""
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
    """The same for people, three lines."""
    speed = stats["decode_tokens_per_s"]
    after = f", {speed:.1f} tokens/s after the first" if speed else ""
    megabytes = stats["weight_bytes_per_rank"] / 1e6
    return (
        f"{stats['tp']} ranks, {stats['dtype']}, {megabytes:.1f} MB of weights on rank 0, "
        f"loaded in {stats['load_s']:.2f} s\n"
        f"{len(request.prompt_ids)} prompt tokens, first new token after {stats['ttft_s']:.3f} s\n"
        f"{len(request.token_ids)} new tokens{after}; {stats['comm_share']:.0%} of the time in collectives"
    )
