"""A temporary file with the steps that a rank has recorded, which may not fit in memory."""

import os
import tempfile

import numpy as np


class StepFile:
    """A temporary file of named arrays. It has no path, so a rank that is killed leaves no file.

    >>> steps = StepFile()
    >>> steps.write("prefill/embed", np.ones((5, 3), np.float32))
    >>> steps.read("prefill/embed").shape, "prefill/logits" in steps
    ((5, 3), False)
    """

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="minitp-check-", buffering=0)  # noqa: SIM115
        self._entries, self._end = {}, 0  # name -> (offset, dtype, shape)
        self.last = None  # name of the array that was written last

    def __contains__(self, name):
        return name in self._entries

    def write(self, name, array):
        """Add an array of any shape, dtype and memory order."""
        array = np.ascontiguousarray(array)
        self._entries[name] = self._end, array.dtype, array.shape
        self.last = name
        bytes_left = memoryview(array.reshape(-1).view(np.uint8))
        while bytes_left:
            written = os.pwrite(self._file.fileno(), bytes_left, self._end)
            self._end += written
            bytes_left = bytes_left[written:]

    @property
    def names(self):
        """The names of the arrays, in the order in which they were written first."""
        return list(self._entries)

    @property
    def nbytes(self):
        """The size of the file."""
        return self._end

    def truncate(self, nbytes):
        """Forget the arrays that were written when the file had this size or more, and free their space."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry[0] < nbytes}
        self._end = nbytes
        os.ftruncate(self._file.fileno(), nbytes)

    def read(self, name):
        """Return an array; raise KeyError if there is none of this name."""
        offset, dtype, shape = self._entries[name]
        array = np.empty(shape, dtype)
        bytes_left = memoryview(array.reshape(-1).view(np.uint8))
        while bytes_left:
            count = os.preadv(self._file.fileno(), [bytes_left], offset)
            if count == 0:
                raise EOFError(f"the temporary file ends before the step {name}")
            offset, bytes_left = offset + count, bytes_left[count:]
        return array
