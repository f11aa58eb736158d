"""Functions that write results to stdout, which may be a closed pipe or a full disk."""

import os
import sys

from minitp.errors import RankError


def write_out(text):
    """Write to stdout and flush; return False if the reader has closed the pipe (`| head`)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would fail again at exit
        if isinstance(error, BrokenPipeError):
            return False
        raise RankError(f"cannot write to stdout: {error.strerror}") from error
    return True


def prepare_streams():
    """Make stdin, stdout and stderr usable even if the shell has closed them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed (`>&-`): the next opened file would get its number
            mode = "w" if number else "r"
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout does not have it
        sys.stdout.reconfigure(errors="replace")  # for characters that the locale cannot encode
