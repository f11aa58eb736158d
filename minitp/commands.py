"""What the commands do on a rank, and what the front checks for them beforehand."""

import json
import os
import sys
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from minitp.device import open_device
from minitp.errors import InputError
from minitp.generate import Request, check_prompt, check_vocabulary, context_length, generate
from minitp.launch import SOCKET_VARIABLE
from minitp.model import load_model
from minitp.model_source import open_model
from minitp.output import write_out
from minitp.perplexity import perplexity
from minitp.sampling import SamplingParams
from minitp.weights import shard_nbytes


def check(args, tp):
    """Raise InputError for whatever can be found wrong before ranks are started."""
    source = open_model(args.model, tp, args.layers)
    warn_of_unread_fields(source)
    COMMANDS[args.command].prepare(args, source)


def run(args, comm):
    """The command, on this rank; returns the exit code."""
    command = COMMANDS[args.command]
    source = None
    with comm.agreed():  # rank 0 first, for it may have to download
        if comm.rank == 0:
            source = open_model(args.model, comm.size, args.layers)
            if SOCKET_VARIABLE not in os.environ:  # else the front has said it
                warn_of_unread_fields(source)
    with comm.agreed():
        if comm.rank != 0:
            source = open_model(args.model, comm.size, args.layers)
        job = command.prepare(args, source) if comm.rank == 0 else None
    job = comm.broadcast(job)
    return command.run(args, comm, source, job)


def warn_of_unread_fields(source):
    for name in source.config.unread:
        print(
            f"minitp: warning: config.json of {source.name} has a field {name!r} that minitp does not know; "
            "if it changes the maths, the results are wrong",
            file=sys.stderr,
        )


def load(args, comm, source):
    """This rank's Model, with a progress bar of rank 0's share on a terminal; and the seconds it took."""
    started = perf_counter()
    device = open_device(args.dtype)
    with (
        comm.agreed(),
        tqdm(
            total=shard_nbytes(source.plan, comm.rank, device),
            desc=f"loading {source.name}, rank 0 of {comm.size}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=comm.rank != 0 or not sys.stderr.isatty(),
        ) as bar,
    ):
        model = load_model(source, comm, device, bar.update)
    return model, perf_counter() - started


class Generate:
    """`minitp generate`."""

    @staticmethod
    def prepare(args, source):
        """Check the options and the prompt; the prompt's tokens and the context length."""
        sampling_params(args)
        if (args.prompt is None) == (args.tokens is None):
            raise InputError("generate wants either a PROMPT or --tokens 1,2,3")
        ids = args.tokens
        if ids is None:
            tokenizer = source.tokenizer()
            if tokenizer is None:
                raise InputError(
                    f"{source.name} has no tokenizer.json; give --tokens 1,2,3 in place of the prompt"
                )
            ids = tokenizer.encode(args.prompt)
        elif args.stop and source.tokenizer() is None:
            raise InputError(f"--stop wants text, and {source.name} has no tokenizer.json")
        context = context_length(source.config, args.max_context)
        check_prompt(ids, source.config, context)
        return ids, context

    @staticmethod
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


def sampling_params(args):
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )


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


class Perplexity:
    """`minitp perplexity`."""

    @staticmethod
    def prepare(args, source):
        """Read and check the text; its tokens and the tokens a window."""
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise InputError(f"{source.name} has no tokenizer.json, and perplexity is of a text")
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{args.file}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{args.file}: not UTF-8 text: {error}") from error
        ids = tokenizer.encode(text)
        if len(ids) < 2:
            raise InputError(f"{args.file}: {len(ids)} tokens; perplexity needs at least two")
        check_vocabulary(ids, source.config)
        context = context_length(source.config, args.max_context)
        if context < 2:
            raise InputError(
                f"--max-context {context}: a token is scored after at least one other; give 2 or more"
            )
        return ids, context

    @staticmethod
    def run(args, comm, source, job):
        """Print the perplexity."""
        ids, context = job
        model, _ = load(args, comm, source)
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(total=len(ids), desc="perplexity", unit="token", leave=False, disable=hidden) as bar:
            value, scored = perplexity(model, ids, context, bar.update)
        if comm.rank == 0:
            if args.json:
                write_out(
                    json.dumps({"perplexity": value, "scored_tokens": scored, "tokens": len(ids)}) + "\n"
                )
            else:
                write_out(f"perplexity {value:.4f} over {scored} tokens\n")
        return 0


COMMANDS = {"generate": Generate, "perplexity": Perplexity}
