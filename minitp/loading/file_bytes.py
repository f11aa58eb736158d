"""Reading of bytes from anywhere in a file, by several threads at once."""

import mmap
import os
import weakref

import numpy as np

from minitp.errors import InputError
from minitp.util.files import how_to_replace, why_unreadable


class FileBytes:
    """An open file whose bytes are read into arrays of the caller, or viewed where the system has them.

    Reading copies consecutive bytes fastest. A view suits what is scattered: only its pages are touched.

    Parameters
    ----------
    path : Path

    Raises
    ------
    InputError
        if the file cannot be opened, or ends before the bytes that are read.
    """

    def __init__(self, path):
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: {why_unreadable(path, error)}") from error

    def read(self, start, out):
        """Fill `out`, a contiguous array, with the bytes from `start` on."""
        rest = memoryview(out.reshape(-1).view(np.uint8))
        while rest:
            try:
                count = os.preadv(self._descriptor, [rest], start)
            except OSError as error:
                raise InputError(f"{self._path}: cannot be read: {error.strerror}") from error
            if count == 0:
                self._refuse(start + len(rest))
            start, rest = start + count, rest[count:]

    def view(self, start, nbytes):
        """Return the bytes from `start` on, uint8 [nbytes], without reading them yet."""
        if os.fstat(self._descriptor).st_size < start + nbytes:  # touching them would end the process
            self._refuse(start + nbytes)
        return np.frombuffer(self._mapped, np.uint8, nbytes, start)

    def _refuse(self, needed):
        size = os.fstat(self._descriptor).st_size
        raise InputError(
            f"{self._path}: truncated at byte {size}, but its header describes at least {needed}; "
            f"{how_to_replace(self._path)}"
        )
