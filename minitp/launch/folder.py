"""The folder of a job, for the supervisor's socket and the output of the ranks."""

import os
import tempfile
from pathlib import Path

from minitp.errors import InputError, one_line

LONGEST_PARENT = 80  # bytes; a Unix socket's path may have 103 (macOS) or 107 (Linux)


def make_folder():
    """Return a new folder, whose path leaves room for the name of a Unix socket."""
    try:
        parent = tempfile.gettempdir()
        if len(os.fsencode(parent)) > LONGEST_PARENT:
            parent = "/tmp"
        return Path(tempfile.mkdtemp(prefix="minitp-", dir=parent))
    except OSError as error:
        raise InputError(
            f"no folder for the ranks' socket: {one_line(error)[:150]}; set TMPDIR to a folder that can be "
            f"written, with a path of at most {LONGEST_PARENT} bytes"
        ) from error
