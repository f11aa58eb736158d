"""`minitp trace`."""

from pathlib import Path

from minitp.cli.inputs import check_output, passes_wanted, prompt_tokens
from minitp.cli.load_progress import load
from minitp.errors import InputError
from minitp.trace.record import wanted_steps
from minitp.trace.write import write_oracle_trace, write_trace
from minitp.util.format import counted
from minitp.util.stdout import write_out


def prepare(args, source):
    """Check the options and the prompt; its tokens, the passes, and the names of the steps to write."""
    ids = prompt_tokens(args, source)
    passes = passes_wanted(args, source, ids)
    check_output(args.output, ".safetensors")
    if args.oracle and args.per_rank:
        raise InputError("--oracle and --per-rank: the oracle has no ranks; leave one of them out")
    return ids, passes, wanted_steps(source.plan, passes, args.steps, args.oracle)


def run(args, comm, source, job):
    """Write the file; say where it is and how large."""
    ids, passes, wanted = job
    path = Path(args.output)
    if args.oracle:
        with comm.agreed():
            if comm.rank == 0:
                write_oracle_trace(path, source, ids, passes, wanted)
    else:
        model, _ = load(args, comm, source, "explicit")
        write_trace(path, source, model, ids, passes, wanted, args.per_rank)
    if comm.rank == 0:
        who = "the oracle, float64" if args.oracle else counted(comm.size, "rank")
        megabytes = path.stat().st_size / 1e6
        tokens = len(ids) + args.decode
        write_out(f"{path}: {tokens} tokens through {source.name} on {who}, {megabytes:.1f} MB\n")
    return 0
