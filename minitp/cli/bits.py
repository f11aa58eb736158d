"""`minitp bits`: the first step whose bits change with the batch, the chunk or the number of ranks."""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from minitp.cli.color import judged
from minitp.cli.command import OnRanks, refuse_unknown_mpi
from minitp.cli.options import add_device, add_model, token_ids
from minitp.errors import InputError
from minitp.launch.run import WORKER, run_ranks
from minitp.util import environment
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE
from minitp.util.format import aligned, counted
from minitp.util.format import size as nbytes_text
from minitp.util.stdout import write_out

MOST_SEQUENCES, MOST_REPEATS = 64, 100  # the maximum of --batch and of --repeats
LARGE = 4e9  # bytes of temporary files of which a warning is printed
WORDS = {
    "same": "same",
    "rounding": "changed",
    "larger": "changed, not by rounding",
    "race": "changed at random",
}


class BitsCommand(OnRanks):
    """The command `minitp bits`."""

    name = "bits"
    inputs = "{PROMPT | --tokens IDS | A B ..}"
    summary = "find the first step whose bits change with batch, chunk or ranks"
    description = (
        "Run the same tokens again, in a batch, in chunks, one token per pass, and on 1 to N ranks, and name "
        "the first step whose bits change in each run, and why. Or compare the bits of recordings of any "
        "engine with those of the first one. The exit code is 1 if any bits change, else 0."
    )
    examples = (
        ('minitp bits "Once upon a time" --tp 2', "the demo model, on one and on two ranks"),
        (
            "minitp bits alone.safetensors batched.safetensors",
            "two recordings of another engine, as for judge or compare",
        ),
    )

    def add_options(self, parser):
        group = parser.groups["input"]
        group.add_argument(
            "inputs",
            nargs="*",
            metavar="PROMPT",
            help="the text to start from; or two or more recordings, .safetensors or .npz files, whose steps "
            "are named as in traces",
        )
        group.add_argument(
            "--tokens",
            type=token_ids,
            metavar="IDS",
            help="token ids to start from instead of PROMPT, as in 1,2,3",
        )
        group = parser.groups["comparison"]
        group.add_argument(
            "--batch",
            type=int,
            default=4,
            metavar="N",
            help="number of sequences in a batch; 1 for no batches (default: 4)",
        )
        group.add_argument(
            "--repeats",
            type=int,
            default=2,
            metavar="N",
            help="number of times to repeat the same run, because a race may not show every time "
            "(default: 2)",
        )
        group.add_argument(
            "--path",
            choices=["explicit", "fused"],
            default="explicit",
            help="explicit: every operation by itself; fused: the fused GPU kernels, which needs --device "
            "cuda, on --tp ranks only (default: explicit)",
        )
        add_model(parser)
        add_device(parser)

    def start(self, args, rank_command):
        if len(args.inputs) > 1:
            return compare_recordings(args) if environment.env_rank(os.environ) == 0 else 0
        args.prompt, args.decode = (args.inputs or [None])[0], 0
        is_rank = environment.world_size(os.environ) is not None or os.environ.get(ALONE_VARIABLE)
        return super().start(args, rank_command) if is_rank else self.launch(args, rank_command)

    def launch(self, args, rank_command):
        """Run the variants on --tp ranks and a trace on each smaller number of ranks; print the results."""
        refuse_unknown_mpi()
        environment.check_cupy(args.device)
        size = self.ranks(args)
        from tqdm import tqdm

        from minitp.bits.run import Row, bits_of_files
        from minitp.loading.source import open_model, warn_of_unread_fields

        source = open_model(args.model, size, args.layers, args.revision, args.split)
        warn_of_unread_fields(source)
        ids = self.prepare(args, source)
        sizes = range(size, 0, -1) if size > 1 and args.path == "explicit" else ()
        with tempfile.TemporaryDirectory(prefix="minitp-bits-") as folder:
            output = Path(folder, "rows")
            with open(output, "wb") as file:
                code = run_ranks(rank_command, size, args.verbose, file.fileno())
            if code:
                return code
            said = json.loads(output.read_bytes())
            rows = [Row(**row) for row in said["rows"]]
            first = Path(folder, f"tp{size}.safetensors")
            for tp in tqdm(sizes, "traces", unit=" traces", leave=False, disable=not sys.stderr.isatty()):
                path = Path(folder, f"tp{tp}.safetensors")
                split = said["split"] if tp == size else ",".join(["1"] * tp)
                with open(os.devnull, "wb") as file:
                    code = run_ranks(trace_command(args, ids, split, path), tp, args.verbose, file.fileno())
                if code:
                    return code
                if tp < size:
                    rows += bits_of_files([first, path], [f"on {counted(tp, 'rank')}"])
                    path.unlink()  # a trace of a long prompt is large
        return show(said["heading"], rows, "minitp check")

    def prepare(self, args, source):
        """Return the prompt's tokens; refuse a prompt or options that the model does not allow."""
        from minitp.cli.inputs import check_passes, prompt_tokens

        for option, value, least, most in (
            ("--batch", args.batch, 1, MOST_SEQUENCES),
            ("--repeats", args.repeats, 1, MOST_REPEATS),
        ):
            if not least <= value <= most:
                raise InputError(f"{option} {value}: expected {least} to {most}")
        if args.prompt is not None and Path(args.prompt).suffix in (".safetensors", ".npz"):
            raise InputError(f"{args.prompt}: bits compares two or more recordings; add the other ones")
        ids = prompt_tokens(args, source)
        check_passes(args, source, ids)
        check_room(source, len(ids))
        return ids

    def run(self, args, comm, source, prepared):
        """Run the variants on the ranks; rank 0 prints the results, or sends them to the launcher."""
        from tqdm import tqdm

        from minitp.bits.run import bits_of_model
        from minitp.cli.load_progress import load

        model, _ = load(args, comm, source, args.path)
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        with tqdm(desc="bits", unit=" layers", leave=False, disable=hidden) as bar:
            rows = bits_of_model(source, model, prepared, args.batch, args.repeats, bar)
        heading = (
            f"{source.name} on {source.ranks}, {model.device.dtype.name}: "
            f"{counted(len(prepared), 'token')}, {counted(source.plan.layers, 'layer')}; each run is "
            "compared with one pass over the prompt alone"
        )
        if os.environ.get(SOCKET_VARIABLE):
            if comm.rank == 0:
                said = {"heading": heading, "split": source.shares, "rows": list(map(asdict, rows))}
                write_out(json.dumps(said))
            return 0
        if comm.rank == 0:
            show(heading, rows, "minitp check")
        return 0 if all(row.outcome == "same" for row in rows) else 1


def check_room(source, tokens):
    """Refuse a prompt whose steps do not fit on the disk, and warn of one that needs much of it."""
    from minitp.bits.variants import temporary_nbytes

    folder, needed = tempfile.gettempdir(), temporary_nbytes(source, tokens)
    free = shutil.disk_usage(folder).free
    text = f"{counted(tokens, 'token')} need up to {nbytes_text(needed)} of temporary files in {folder}"
    way_out = "use a shorter prompt or fewer --layers, or set TMPDIR to another folder"
    if needed > free:
        raise InputError(f"{text}, which has only {nbytes_text(free)}; {way_out}")
    from_launcher = os.environ.get(SOCKET_VARIABLE) or os.environ.get(ALONE_VARIABLE)  # which has warned
    if needed > LARGE and not from_launcher:
        print(f"minitp: warning: {text}; {way_out}", file=sys.stderr)


def compare_recordings(args):
    """Compare the recordings that are given instead of a prompt; return the exit code."""
    from minitp.bits.run import bits_of_files

    if args.tokens is not None:
        raise InputError(
            "bits needs a PROMPT, --tokens 1,2,3, or two or more recordings, and only one of them"
        )
    rows = bits_of_files(args.inputs)
    return show(f"each recording is compared with {args.inputs[0]}", rows, "minitp judge")


def trace_command(args, ids, split, path):
    """Return the command line of a rank, one for each share, that traces the prompt's prefill to a file."""
    options = {
        "--model": args.model,
        "--revision": args.revision,
        "--layers": args.layers,
        "--dtype": args.dtype,
        "--device": args.device,
        "--comm": args.comm,
    }
    command = [*WORKER, "trace", "--tokens", ",".join(map(str, ids)), "--split", split, "-o", str(path)]
    command += ["--steps", "prefill/*", *(["--share-gpu"] if args.share_gpu else [])]
    return command + [
        str(word) for name, value in options.items() if value is not None for word in (name, value)
    ]


def show(heading, rows, judge):
    """Print the table, the reasons and the verdict; return the exit code."""
    table = [("run", "bits", "first step that changes", "elements", "largest difference")]
    for row in rows:
        where = row.step if row.rank is None or not row.step else f"{row.step} rank {row.rank}"
        count = f"{row.elements} of {row.size}" if row.step else ""
        table.append((row.title, WORDS[row.outcome], where, count, row.largest))
    lines = [heading, "", *aligned(table, "<<<><"), ""]
    titles = {}  # the runs with the same reasons
    for row in rows:
        titles.setdefault(tuple(row.why), []).append(row.title)
    for why, same in titles.items():
        if why:
            lines += [f"{'; '.join(same)}:", *(f"  {line}" for line in why)]
    ok = all(row.outcome == "same" for row in rows)
    lines += [*([] if ok else [""]), judged(verdict(rows, judge), ok, sys.stdout)]
    write_out("\n".join(lines) + "\n")
    return 0 if ok else 1


def verdict(rows, judge):
    """Return the last line; `judge` is the command that names a wrong step."""
    changed = [row for row in rows if row.outcome != "same"]
    runs = counted(len(rows), "run")
    if not changed:
        return f"all bits are the same in {runs} ({counted(sum(row.arrays for row in rows), 'array')})"
    said = f"bits change in {len(changed)} of {runs}"
    races = [row.title for row in rows if row.outcome == "race"]
    larger = [row.title for row in rows if row.outcome == "larger"]
    if races:
        said += f"; at random {', '.join(races)}"
    if larger:
        said += f"; not by rounding {', '.join(larger)}; {judge} can name the wrong step"
    return said if races or larger else f"{said}, by rounding only"
