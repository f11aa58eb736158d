"""`minitp lint`: compare an engine's shards with the checkpoint."""

import sys
from pathlib import Path

from minitp.cli.command import OneProcess
from minitp.cli.options import SHARES, add_revision, add_split
from minitp.errors import InputError
from minitp.mapping.tensors import ENGINES
from minitp.util.shares import numbers_only
from minitp.util.stdout import write_out


class LintCommand(OneProcess):
    """The command `minitp lint`."""

    name = "lint"
    inputs = "PATH"
    summary = "compare another engine's shards with the checkpoint"
    description = (
        "Look up every row of an engine's per-rank files in the checkpoint, by its content. Each row must be "
        "on one rank, or on several for a reason, and query heads must be with their KV heads. If a tensor "
        "is wrong, the exit code is 1, and the last line names the first one and what is wrong with it."
    )
    examples = (
        ("minitp lint shards --model ./Llama-3.2-1B", "the files of all ranks in a folder"),
        (
            "minitp lint iter_0000001 --model ./Llama-3.2-1B --engine megatron",
            "folders mp_rank_00, mp_rank_01, ..; the names of the tensors are Megatron's",
        ),
    )
    verbose = "show each layer in a row of its own"

    def add_options(self, parser):
        parser.groups["input"].add_argument(
            "path",
            metavar="PATH",
            help="a folder with a .safetensors or .npz file, or a folder, for each rank; or the file of the "
            "only rank",
        )
        group = parser.groups["model"]
        group.add_argument(
            "--model",
            help="the checkpoint that was sharded, as for `generate` (default: the model in PATH/plan.json)",
        )
        add_revision(parser)
        group.add_argument(
            "--layers",
            type=int,
            metavar="N",
            help="the shards have only the first N layers (default: those in PATH/plan.json, or all layers)",
        )
        add_split(parser, f"{SHARES} (default: that of PATH/plan.json, or equal shares)")
        parser.groups["input"].add_argument(
            "--engine",
            choices=ENGINES,
            help="the engine whose names the tensors have (default: recognized by the names)",
        )

    def run(self, args):
        """Print the table and the verdict; return 1 if a tensor is wrong, else 0."""
        from tqdm import tqdm

        from minitp.cli.lint_text import text
        from minitp.compare.rank_folder import open_ranks
        from minitp.lint.run import lint
        from minitp.loading.source import open_model

        ranks = open_ranks(args.path)
        model, layers, split = model_of(args)
        source = open_model(model, 1, layers, args.revision)
        total = sum(path.stat().st_size for rank in ranks for path in rank.paths)
        hidden = not sys.stderr.isatty()
        with tqdm(total=total, desc="linting", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
            result = lint(ranks, source, args.engine, bar.update, split)
        write_out(text(result, args.path, source, len(ranks), args.verbose, sys.stdout))
        return 1 if result.faults else 0


def model_of(args):
    """Return the model, the layers and the shares: those of the options, or else those in plan.json."""
    from minitp.loading.export import FORMAT, PLAN
    from minitp.util.files import read_json

    plan = Path(args.path) / PLAN
    fields = read_json(plan) if plan.is_file() else {}
    if fields.get("format") != FORMAT:
        fields = {}
    for name, kind in (("model", str), ("layers", int), ("split", str)):
        if not isinstance(value := fields.get(name), kind | None):
            raise InputError(f"{plan}: {name}: expected {kind.__name__}, found {type(value).__name__}")
    model = args.model or fields.get("model")
    if model is None:
        raise InputError(f"{args.path}: needs --model, the checkpoint that was sharded")
    layers = args.layers or (fields.get("layers") if args.model in (None, fields.get("model")) else None)
    split = args.split or fields.get("split")
    return model, layers, numbers_only(split, "depends on devices, which lint does not know")
