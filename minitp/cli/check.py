"""`minitp check`: compare every step of every rank with the oracle."""

import sys
from time import perf_counter

from minitp.cli.check_text import table, verdict
from minitp.cli.color import judged
from minitp.cli.command import OnRanks
from minitp.cli.options import add_decode, add_prompt, add_replicas, add_report, add_run
from minitp.errors import InputError
from minitp.util.format import counted
from minitp.util.stdout import write_out

MOST_SEQUENCES = 64  # the maximum of --batch


class CheckCommand(OnRanks):
    """The command `minitp check`."""

    name = "check"
    inputs = "{PROMPT | --tokens IDS | --prompt-tokens N}"
    summary = "check every step of every rank against a float64 reference"
    description = (
        "Run a prompt and compare every step (intermediate array) of every rank with the oracle, an "
        "independent float64 implementation of the model. If the error of a step exceeds its bound, the exit "
        "code is 1, and the last line names the first wrong step, its layer and its rank."
    )
    examples = (
        ('minitp check "The capital of France is" --tp 4', "check the demo model on four ranks"),
        (
            'minitp check "Once upon a time" --tp 2 --device cuda --path fused --report check.html',
            "check the GPU kernels, and write a page that shows every step",
        ),
        (
            'minitp check "Once upon a time" --batch 3 --kv-dtype int8',
            "also check what serve runs: batches of sequences over a paged cache, here of int8 numbers",
        ),
    )
    verbose = "show a row for each layer, Python tracebacks, and what every rank wrote to stderr"

    def add_options(self, parser):
        add_prompt(parser)
        parser.groups["input"].add_argument(
            "--prompt-tokens",
            type=int,
            metavar="N",
            help="start from N random token ids instead of PROMPT, because some faults show only at later "
            "positions (default: PROMPT or --tokens)",
        )
        add_decode(parser, default=2)
        group = parser.groups["steps"]
        group.add_argument(
            "--batch",
            type=int,
            default=0,
            metavar="N",
            help="also run N sequences, made from the prompt, through the engine of serve: in batches, over "
            "a paged cache, with a shared prefix and a preemption (default: 0)",
        )
        group.add_argument(
            "--path",
            choices=["explicit", "fused"],
            default="explicit",
            help="explicit: every operation by itself; fused: the fused GPU kernels where they exist, which "
            "needs --device cuda (default: explicit)",
        )
        add_run(parser)
        add_replicas(
            parser,
            "check N copies of the model, each on its own --tp ranks, and compare the bits of their steps",
        )
        add_report(parser)

    def prepare(self, args, source):
        """Return the prompt's tokens; refuse a prompt or options that the model does not allow."""
        from minitp.cli.inputs import check_output, check_passes

        ids = prompt_of(args, source)
        if args.report is not None:
            check_output(args.report, ".html")
        check_passes(args, source, ids)
        if args.batch:
            check_batch(args.batch, source, ids)
        return ids

    def run(self, args, comm, source, prepared):
        """Print the table and the verdict; return 1 if a step is wrong, else 0."""
        from tqdm import tqdm

        from minitp.check.replicas import replicas_verdict
        from minitp.check.run import check_model
        from minitp.cli.load_progress import load
        from minitp.report.check import report_data
        from minitp.report.page import write_report

        model, _ = load(args, comm, source, args.path)
        first = comm.all_groups.rank == 0
        hidden = not first or not sys.stderr.isatty()
        started = perf_counter()
        with tqdm(
            total=3 * source.plan.layers, desc="checking", unit="layer", leave=False, disable=hidden
        ) as bar:
            result = check_model(source, model, prepared, args.decode, args.batch, bar.update)
        seconds = perf_counter() - started
        said, ok = verdict(source, result), result.ok
        if args.replicas > 1:
            said, ok = replicas_verdict(comm, result, said)
        if first:
            lines = [title(args, source, model, prepared), "", *table(result, args.verbose), ""]
            lines += [f"warning: {text}" for text in result.warnings]
            per_layer = seconds / source.plan.layers
            lines.append(f"checked in {seconds:.1f} s, {per_layer:.2g} s per layer")
            write_out("\n".join(lines) + "\n")
        with comm.agreed():
            if first and args.report is not None:
                gpu = model.device.name if model.device.is_gpu else None
                data = report_data(source, model.device.dtype, result, said, args.prompt, gpu)
                write_report(args.report, data)
                write_out(f"report: {args.report}\n")
        if first:
            write_out(judged(said, ok, sys.stdout) + "\n")
        return 0 if ok else 1


def check_batch(count, source, prompt):
    """Reject a number of sequences that is not allowed, or one whose longest sequence exceeds the context."""
    from minitp.check.passes import batch_prompts, longest_positions

    if not 2 <= count <= MOST_SEQUENCES:
        raise InputError(f"--batch {count}: expected 0, or 2 to {MOST_SEQUENCES} sequences")
    context = source.config.max_position_embeddings
    longest = longest_positions(batch_prompts(prompt, count, source.config.vocab_size))
    if longest > context:
        raise InputError(
            f"--batch {count}: its longest sequence has {counted(longest, 'token')}, which exceeds the "
            f"model's context of {context}; give a shorter prompt"
        )


def prompt_of(args, source):
    """Return the token ids of PROMPT, --tokens or --prompt-tokens."""
    import numpy as np

    from minitp.cli.inputs import prompt_tokens

    if args.prompt_tokens is None:
        return prompt_tokens(args, source)
    if (args.prompt, args.tokens) != (None, None):
        raise InputError("check needs a PROMPT, --tokens 1,2,3 or --prompt-tokens N, and only one of them")
    if args.prompt_tokens < 1:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}: expected 1 or more")
    return np.random.default_rng(0).integers(0, source.config.vocab_size, args.prompt_tokens).tolist()


def title(args, source, model, prompt):
    """Return the heading: the model, the ranks, the dtypes, the tokens and the sequences of the engine."""
    cache = "" if model.kv_dtype == "auto" else f", a cache of {model.kv_dtype}"
    batch = f", {counted(args.batch, 'sequence')} in batches" if args.batch else ""
    ranks = source.ranks
    if args.replicas > 1:
        ranks = f"{counted(args.replicas, 'replica')} of {ranks}"
    return (
        f"{source.name} on {ranks}, {model.device.dtype.name}{cache}: a prompt of "
        f"{counted(len(prompt), 'token')} and {args.decode} decoded ones{batch}, "
        f"{counted(source.plan.layers, 'layer')}"
    )
