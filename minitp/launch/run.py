"""The launcher: a process outside MPI that starts the ranks of a command and ends after them."""

import sys

from minitp.errors import InputError, RankError, shown
from minitp.launch.signals import Terminated
from minitp.launch.supervisor import rank_processes
from minitp.util.environment import check_world, ranks_wanted
from minitp.util.format import counted
from minitp.util.run_module import RUN_MODULE
from minitp.util.shares import shares_in

WORKER = [*RUN_MODULE, "minitp"]


def run_ranks(command, size, verbose=False, stdout=1):
    """Start `size` ranks of `command`, wait until they end, and return the exit code of the job.

    Rank 0 writes to the file descriptor `stdout`, by default that of this process.

    The code is 3 if a rank dies or fails, after a line on stderr that names the rank; 130 on Ctrl-C; 143 on
    SIGTERM, within `ended_by_signals`. No process of the job is left when this returns.
    """
    with rank_processes(size, verbose, streams=(stdout, 2)) as job:
        try:
            job.start(command)
            return job.watch()
        except RankError as error:
            print(f"minitp: {error}", file=sys.stderr)
            return error.exit_code
        except Terminated:
            return 143
        except KeyboardInterrupt:
            return 130


def ranks_to_start(tp, device, model, layers=None, revision=None, split=None, replicas=1):
    """Return the ranks of each replica that --tp or --split asks for; "auto" is at most one per head.

    Parameters
    ----------
    tp, device, model, layers, revision, split, replicas
        The values of the options with these names.

    Raises
    ------
    InputError
        If --tp is not the number of shares.
    """
    if (shares := ranks_of_split(tp, split)) is not None:
        return shares
    size = ranks_wanted(tp, device, replicas)
    if tp != "auto" or size == 1:
        return size  # without reading config.json
    from minitp.loading.source import open_config  # imports numpy

    return ranks_for(open_config(model, layers, revision), tp, device, replicas)


def ranks_of_replica(options, world):
    """Return the ranks of each replica: `world` ranks of mpirun divided, or else those to start.

    Parameters
    ----------
    options : object
        An object with the options tp, device, model, layers, revision, split and perhaps replicas.
    world : int or None
        The number of ranks that mpirun has started; None outside mpirun.
    """
    replicas = getattr(options, "replicas", 1)  # not every command has this option
    if world is None:
        model = options.model, options.layers, options.revision
        return ranks_to_start(options.tp, options.device, *model, options.split, replicas)
    if replicas > 1:  # otherwise the ranks check --tp together
        check_world(options.tp, world, replicas)
    return world // replicas


def ranks_for(config, tp, device, replicas=1):
    """Return the ranks of each replica that --tp asks for, for a model whose Config is known."""
    size = ranks_wanted(tp, device, replicas)
    return min(size, config.num_attention_heads) if tp == "auto" else size


def ranks_of_split(tp, split):
    """Return the number of shares in a value of --split, or None if it has none.

    Raises
    ------
    InputError
        If --tp is another number.
    """
    shares = shares_in(split)
    if shares is None:
        return None
    if tp != "auto" and ranks_wanted(tp) != len(shares):
        raise InputError(
            f"--tp {tp}, but --split {shown(split)} is for {counted(len(shares), 'rank')}; omit --tp"
        )
    return len(shares)
