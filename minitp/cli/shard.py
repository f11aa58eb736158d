"""`minitp shard`: print which rank holds what, and write a checkpoint file per rank."""

import sys
from pathlib import Path

from minitp.cli.command import OneProcess
from minitp.cli.options import SHARES, add_model
from minitp.launch.run import ranks_to_start
from minitp.util.format import size
from minitp.util.shares import numbers_only
from minitp.util.stdout import write_out

TP = (
    "number of ranks to split the model over; auto: as many as `minitp generate` would start on this machine "
    "(default: auto)"
)


class ShardCommand(OneProcess):
    """The command `minitp shard`."""

    name = "shard"
    summary = "show which rank holds what; write a checkpoint file per rank"
    description = (
        "Print the sharding plan: the axis along which each tensor is split, and each rank's ranges and "
        "bytes. No ranks are started. With -o, each rank's weights are also written to a file, for another "
        "engine."
    )
    examples = (
        ("minitp shard --tp 4", "the plan of the demo model for four ranks"),
        (
            "minitp shard --model ./Mistral-7B-v0.1 --tp 2 -o shards",
            "also write a file for each rank",
        ),
    )

    def add_options(self, parser):
        add_model(parser, TP, f"{SHARES} (default: equal shares)")
        parser.groups["output"].add_argument(
            "-o",
            "--output",
            metavar="DIR",
            help="write rank{r}.safetensors and plan.json into this directory (default: only print)",
        )

    def run(self, args):
        """Print the plan, and write the ranks' files."""
        from minitp.cli.shard_text import text
        from minitp.loading.export import prepare_directory, refuse_untied_copy
        from minitp.loading.source import open_model

        split = numbers_only(args.split, "depends on the ranks' devices, and shard starts no ranks")
        tp = ranks_to_start(args.tp, "auto", args.model, args.layers, args.revision, split)
        source = open_model(args.model, tp, args.layers, args.revision, split)
        directory = None if args.output is None else Path(args.output)
        if directory is not None:
            refuse_untied_copy(source)
            prepare_directory(directory, source)
        write_out(text(source))
        if directory is not None:
            write_files(directory, source)
        return 0


def write_files(directory, source):
    """Write the files of a plan, with a progress bar, and print their names."""
    from tqdm import tqdm

    from minitp.loading.export import rank_nbytes, write_shards

    tp = source.plan.tp
    total = sum(rank_nbytes(source, rank) for rank in range(tp))
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        write_shards(directory, source, bar.update)
    last = f" .. rank{tp - 1}.safetensors" if tp > 1 else ""
    write_out(f"\n{directory}: wrote rank0.safetensors{last} and plan.json, {size(total)}\n")
