"""`minitp trace`: write the steps of a forward pass to a file."""

from pathlib import Path

from minitp.cli.command import OnRanks
from minitp.cli.options import PROMPT_OR_TOKENS, add_decode, add_device, add_model, add_prompt
from minitp.errors import InputError
from minitp.util.format import counted
from minitp.util.stdout import write_out


class TraceCommand(OnRanks):
    """The command `minitp trace`."""

    name = "trace"
    inputs = f"{PROMPT_OR_TOKENS} -o FILE"
    summary = "write every intermediate array of a forward pass to a file"
    description = (
        "Run a prompt and write the steps, which are the named intermediate arrays of the forward pass, to a "
        "safetensors file. The ranks' parts of an array are joined."
    )
    examples = (
        ('minitp trace "Once upon a time" --tp 2 -o steps.safetensors', "every step of the demo model"),
        (
            "minitp trace \"Once upon a time\" --oracle --steps 'prefill/layers.0.*' -o layer0.safetensors",
            "the first layer in float64, as a reference for your own engine",
        ),
    )

    def add_options(self, parser):
        add_prompt(parser)
        add_decode(parser, default=0)
        group = parser.groups["steps"]
        group.add_argument(
            "--steps",
            action="append",
            metavar="GLOB",
            help="write only matching steps, as in 'prefill/layers.0.*'; can be repeated (default: all but "
            "scores and probs)",
        )
        group.add_argument(
            "--per-rank", action="store_true", help="also write each rank's own part, as rank{r}/..."
        )
        group.add_argument(
            "--oracle",
            action="store_true",
            help="write the steps of the oracle instead: an independent float64 implementation, which runs "
            "in one process",
        )
        add_model(parser)
        add_device(parser)
        parser.groups["output"].add_argument(
            "-o", "--output", required=True, metavar="FILE", help="the .safetensors file to write (required)"
        )

    def ranks(self, args):
        """Return the number of ranks to start; the oracle has one."""
        return 1 if args.oracle else super().ranks(args)

    def prepare(self, args, source):
        """Return the prompt's tokens, the passes, and the names of the steps to write."""
        from minitp.cli.inputs import check_output, check_passes, prompt_tokens
        from minitp.trace.record import passes_of, wanted_steps

        ids = prompt_tokens(args, source)
        check_passes(args, source, ids)
        passes = passes_of(len(ids), args.decode)
        check_output(args.output, ".safetensors")
        if args.oracle and args.per_rank:
            raise InputError(
                "--oracle and --per-rank cannot be combined: the oracle has no ranks; omit one of them"
            )
        return ids, passes, wanted_steps(source.plan, passes, args.steps, args.oracle)

    def run(self, args, comm, source, prepared):
        """Write the file, and print its name and size."""
        from minitp.cli.load_progress import load
        from minitp.trace.write import write_oracle_trace, write_trace

        ids, passes, wanted = prepared
        path = Path(args.output)
        if args.oracle:
            with comm.agreed():
                if comm.rank == 0:
                    write_oracle_trace(path, source, ids, passes, wanted)
        else:
            model, _ = load(args, comm, source, "explicit")
            write_trace(path, source, model, ids, passes, wanted, args.per_rank)
        if comm.rank == 0:
            who = "the oracle, float64" if args.oracle else source.ranks
            megabytes = path.stat().st_size / 1e6
            tokens = counted(len(ids) + args.decode, "token")
            write_out(f"{path}: {tokens} through {source.name} on {who}, {megabytes:.1f} MB\n")
        return 0
