"""`minitp perplexity`."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from minitp.commands.loading import load
from minitp.errors import InputError
from minitp.generate import check_vocabulary, context_length
from minitp.output import write_out
from minitp.perplexity import perplexity


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
