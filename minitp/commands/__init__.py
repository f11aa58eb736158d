"""What the commands do on a rank, and what the front checks for them beforehand; one file a command."""

import importlib
import os
import sys

from minitp.errors import InputError
from minitp.job import SOCKET_VARIABLE
from minitp.model_source import open_model


def find(command, name):
    """`name` in minitp/commands/COMMAND.py; others are not imported, for most of a start is imports."""
    return getattr(importlib.import_module(f"minitp.commands.{command}"), name)


def with_ranks(command):
    """The class that says what a command does on a rank."""
    return find(command, command.capitalize())


def check_input(args, tp):
    """Raise InputError for whatever can be found wrong before ranks are started."""
    source = open_model(args.model, tp, args.layers)
    warn_of_unread_fields(source)
    with_ranks(args.command).prepare(args, source)


def run(args, comm, caller=None):
    """The command, on this rank; returns the exit code. `caller` is whom it serves, if it serves one."""
    command, source, fingerprint = with_ranks(args.command), None, None
    with comm.agreed():  # rank 0 first, for it may have to download
        if comm.rank == 0:
            source = open_model(args.model, comm.size, args.layers)
            if SOCKET_VARIABLE not in os.environ:  # else the front has said it
                warn_of_unread_fields(source)
    with comm.agreed():
        if comm.rank != 0:
            source = open_model(args.model, comm.size, args.layers)
        job = command.prepare(args, source) if comm.rank == 0 else None
        fingerprint = source.fingerprint()
    check_it_is_one_model(comm, source.name, fingerprint)
    job = comm.broadcast(job)
    if args.command == "ranks":
        return command.run(args, comm, source, caller)
    return command.run(args, comm, source, job)


def check_it_is_one_model(comm, name, fingerprint):
    """AgreedError on all ranks if a name means different models where they are; all ranks call this."""
    first, *others = comm.exchange(fingerprint)
    with comm.agreed():
        for rank, other in enumerate(others, start=1):
            parts = [part for part in first if first[part] != other[part]]
            if parts:
                raise InputError(
                    f"--model {name}: {comm.name(rank)} finds another model than {comm.name(0)} "
                    f"(in {' and '.join(parts)}); give all hosts the same files"
                )


def warn_of_unread_fields(source):
    if source.config.rope.rope_type == "longrope":
        print(
            f"minitp: warning: {source.name}: rope_type 'longrope' is supported up to its original context, "
            f"which ends at {source.config.max_position_embeddings} tokens",
            file=sys.stderr,
        )
    where = "config.json" if source.gguf is None else "the metadata"
    for name in source.config.unread:
        print(
            f"minitp: warning: {where} of {source.name} has a field {name!r} that minitp does not know; "
            "if it changes the maths, the results are wrong",
            file=sys.stderr,
        )


def run_here(args, tp):
    """A command that needs no ranks; `tp` is what it is told of them. Returns the exit code."""
    return find(args.command, args.command)(args, tp)
