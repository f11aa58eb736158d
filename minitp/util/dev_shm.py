"""The folder /dev/shm of Linux, whose files are the shared memory of the ranks on a host.

MPICH 5 deletes its file there when it ends, so a killed job would leave about a megabyte per rank. The name
is not needed once all ranks have mapped the file, so it is deleted then, and however the job ends, the kernel
frees the memory.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from minitp.errors import RankError
from minitp.util import format

FOLDER = "/dev/shm"
RANK_BYTES = 3 << 19  # needed for each rank; MPICH crashes (SIGBUS) if it finds less
AMPLE_BYTES = 64 << 20  # Docker's default size
LARGER = "enlarge it (docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm)"


def delete_mapped_files(pid="self"):
    """Delete the names of the files of MPICH that a process has mapped; the process keeps the memory."""
    with suppress(OSError):  # the process has ended, or is another user's
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if path.startswith(f"{FOLDER}/mpich_") and not path.endswith("(deleted)"):
                with suppress(FileNotFoundError):  # another rank has deleted it
                    os.unlink(path)


def check_room(ranks, starting=True):
    """Raise RankError unless there is enough shared memory for this number of ranks on this host.

    With `starting`, the free memory counts; once some ranks have taken their parts, only the size does.
    """
    if sys.platform != "linux":
        return
    if not os.access(FOLDER, os.W_OK):
        state = "cannot be written" if os.path.isdir(FOLDER) else "does not exist"
        raise RankError(f"{FOLDER} {state}, but ranks on one host need it; mount a writable tmpfs there")
    size, free = _room()
    if (free if starting else size) < ranks * RANK_BYTES:
        raise RankError(
            f"{format.counted(ranks, 'rank')} {'needs' if ranks == 1 else 'need'} "
            f"{format.size(ranks * RANK_BYTES)} of shared memory, but {described()}"
        )


def is_small():
    """Return whether less than AMPLE_BYTES are free."""
    return sys.platform == "linux" and os.path.isdir(FOLDER) and _room()[1] < AMPLE_BYTES


def described():
    """Return the size of the folder, its free space and the way out, for an error."""
    size, free = _room()
    return f"{FOLDER} has only {format.size(size)}, with {format.size(free)} free; {LARGER}"


def _room():
    """Return (size, free bytes); a tmpfs without a limit says 0."""
    found = os.statvfs(FOLDER)
    if found.f_blocks == 0:
        return sys.maxsize, sys.maxsize
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
