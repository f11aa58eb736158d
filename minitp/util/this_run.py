"""Facts about this run of a command: version, date, machine, and the command line that repeats it."""

import platform
import re
import shlex
import sys
from datetime import date
from itertools import pairwise

import minitp
from minitp.util.environment import cores, cpu_name
from minitp.util.format import counted
from minitp.util.shares import MEASURED


def facts(command, tp=None, gpu=None, split=None):
    """Return (name, text) pairs that a reader needs to judge and repeat the run.

    Parameters
    ----------
    command : str
        The subcommand that is running: check, compare or bench.
    tp : int or None
        The number of ranks, where the command has ranks.
    gpu : str or None
        The GPU's name, if the ranks compute on GPUs.
    split : str or None
        The ranks' shares, as in "3,1".
    """
    line = command_line(command, tp, split=split)
    system = f"{counted(cores(), 'core')}, {platform.system()} {platform.machine()}"
    return [
        *([("command", line)] if line else []),
        ("machine", ", ".join(filter(None, (gpu, cpu_name(), system)))),
        ("minitp", minitp.__version__),
        ("date", date.today().isoformat()),
    ]


def command_line(command, tp=None, argv=None, split=None):
    """Return the shell command that repeats this run, or "" if another program called minitp.

    `--tp` is added where it was left out, because its default depends on the machine. If the devices decided
    the shares, `--split` gets the numbers.

    >>> command_line("check", 2, ["check", "Once upon a time"])
    "minitp check 'Once upon a time' --tp 2"
    >>> command_line("check", 2, ["check", "--split", "auto", "--tp", "2"], "2.4,1")
    'minitp check --split 2.4,1 --tp 2'
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] != [command]:
        return ""
    if split is not None:
        measured = re.compile(rf"(--split=)({'|'.join(MEASURED)})")
        argv = [
            split if word in MEASURED and before == "--split" else measured.sub(rf"\g<1>{split}", word)
            for before, word in pairwise([command, *argv])
        ]
    if tp is not None and not any(word == "--tp" or word.startswith("--tp=") for word in argv):
        argv = [*argv, "--tp", str(tp)]
    return shlex.join(["minitp", *argv])
