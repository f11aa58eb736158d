"""Find and run the module of each command, imported when it is needed: most of a start is imports.

A module for ranks has `prepare(args, source)`, which refuses what can be found wrong and returns what `run`
needs, and `run(args, comm, source, job)`, on every rank. The others have `run(args, tp)`, for one process.
Both return the exit code.
"""

from minitp.load import open_source
from minitp.loading.source import open_model, warn_of_unread_fields


def module_of(command):
    """The module of a command."""
    if command == "generate":
        from minitp.cli import generate as module
    elif command == "trace":
        from minitp.cli import trace as module
    elif command == "check":
        from minitp.cli import check as module
    elif command == "perplexity":
        from minitp.cli import perplexity as module
    elif command == "bench":
        from minitp.cli import bench as module
    elif command == "compare":
        from minitp.cli import compare as module
    elif command == "shard":
        from minitp.cli import shard as module
    elif command == "plan":
        from minitp.cli import plan as module
    elif command == "serve":
        from minitp.cli import serve as module
    elif command == "chat":
        from minitp.cli import chat as module
    return module


def check_input(args, tp):
    """Raise InputError for whatever can be found wrong before ranks are started."""
    source = open_model(args.model, tp, args.layers)
    warn_of_unread_fields(source)
    module_of(args.command).prepare(args, source)


def run_on_rank(args, comm):
    """The command, on this rank."""
    command, job = module_of(args.command), None
    source = open_source(comm, args.model, args.layers)
    with comm.agreed():
        if comm.rank == 0:
            job = command.prepare(args, source)
    return command.run(args, comm, source, comm.broadcast(job))
