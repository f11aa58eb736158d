"""`minitp ranks`, an internal command: a rank that `LLM`, `minitp chat` or `minitp serve` has started."""

import json
import os

from minitp.cli.command import Command, refuse_unknown_mpi
from minitp.engine.options import EngineOptions
from minitp.errors import InputError
from minitp.util import environment
from minitp.util.environment import ALONE_VARIABLE, SOCKET_VARIABLE


class RanksCommand(Command):
    """The command `minitp ranks`, which --help does not list."""

    name = "ranks"
    inputs = "JSON"
    description = "An internal command: a rank that LLM, minitp chat or minitp serve has started."

    def add_options(self, parser):
        parser.groups["input"].add_argument(
            "options", nargs="?", metavar="JSON", help="the fields of EngineOptions"
        )

    def start(self, args, rank_command):
        """Run this rank and return its exit code."""
        if not os.environ.get(SOCKET_VARIABLE):
            raise InputError("minitp ranks is internal; use LLM, minitp chat or minitp serve, which start it")
        try:
            options = EngineOptions(**json.loads(args.options))
        except (TypeError, ValueError) as error:
            raise InputError(f"minitp ranks: {error}") from error
        world = environment.world_size(os.environ)
        environment.divide_cores(os.environ)
        from minitp.engine.client import join_world, run_alone_for_caller

        if world is not None:
            return join_world(options, world)
        if not os.environ.get(ALONE_VARIABLE):
            refuse_unknown_mpi()
        return run_alone_for_caller(options)
