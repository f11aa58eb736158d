"""`minitp perplexity`: measure how well a model predicts a text."""

import json
import math
import sys
from pathlib import Path

from minitp.cli.command import OnRanks
from minitp.cli.options import add_json, add_run
from minitp.errors import InputError
from minitp.util.files import why_unreadable
from minitp.util.format import counted
from minitp.util.stdout import write_out


class PerplexityCommand(OnRanks):
    """The command `minitp perplexity`."""

    name = "perplexity"
    inputs = "FILE"
    summary = "measure a text's perplexity"
    description = (
        "Print the perplexity of a text: the exponential of the mean negative log-likelihood of its tokens. "
        "The text is split into windows of the model's context length."
    )
    examples = (
        ("minitp perplexity text.txt --max-context 512", "windows of 512 tokens"),
        ("minitp perplexity text.txt --kv-dtype int8", "the perplexity with a quantized KV cache"),
    )

    def add_options(self, parser):
        parser.groups["input"].add_argument("file", metavar="FILE", help="a text file in UTF-8")
        add_run(parser)
        parser.groups["model"].add_argument(
            "--max-context",
            type=int,
            metavar="N",
            help="number of tokens per window (default: the model's context length)",
        )
        add_json(parser)

    def prepare(self, args, source):
        """Return the text's tokens and the number of tokens per window."""
        from minitp.request import check_vocabulary, context_length

        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise InputError(f"{source.name} has no tokenizer.json, which perplexity needs")
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{args.file}: {why_unreadable(args.file, error)}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{args.file}: not UTF-8 text: {error}") from error
        ids = tokenizer.encode(text)
        if len(ids) < 2:
            raise InputError(f"{args.file}: {counted(len(ids), 'token')}; perplexity needs at least 2")
        check_vocabulary(ids, source.config)
        context = context_length(source.config, args.max_context)
        if context < 2:
            raise InputError(f"--max-context {context}: perplexity needs at least 2 tokens per window")
        return ids, context

    def run(self, args, comm, source, prepared):
        """Print the perplexity."""
        from tqdm import tqdm

        from minitp.cli.load_progress import load

        ids, context = prepared
        model, _ = load(args, comm, source)
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(total=len(ids), desc="perplexity", unit="token", leave=False, disable=hidden) as bar:
            value, scored = perplexity(model, ids, context, bar.update)
        if comm.rank == 0:
            result = {"perplexity": value, "scored_tokens": scored, "tokens": len(ids)}
            text = f"perplexity {value:.4f} over {counted(scored, 'token')}"
            write_out((json.dumps(result) if args.json else text) + "\n")
        return 0


def perplexity(model, token_ids, context, progress=lambda tokens: None):
    """Return exp of the mean negative log-likelihood of each token given those before it.

    The text is cut into independent windows of `context` tokens; the first token of a window has no
    predecessor and is not scored.

    Returns
    -------
    (perplexity, scored) : float, int
        The perplexity and the number of scored tokens; the same on every rank.
    """
    from minitp.cli.likelihood import log_likelihoods

    total, scored = 0.0, 0
    for start in range(0, len(token_ids) - 1, context):
        window = token_ids[start : start + context]
        total -= log_likelihoods(model, window, progress).sum().item()
        scored += len(window) - 1
    return math.exp(total / scored), scored
