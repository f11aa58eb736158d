"""Writing results to stdout, which may be a pipe that nobody reads any more, or a full disk."""

import os
import sys

from minitp.errors import RankError


def write_out(text):
    """Write to stdout at once; False if nobody reads it any more (`| head`)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again at exit
        if isinstance(error, BrokenPipeError):
            return False
        raise RankError(f"stdout cannot be written: {error.strerror}") from error
    return True


def prepare_streams():
    """Make stdin, stdout and stderr usable whatever the shell has handed over."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed (`>&-`): the next file opened would take its number
            mode = "w" if number else "r"
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # of characters that the locale lacks
