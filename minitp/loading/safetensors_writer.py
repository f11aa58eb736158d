"""A writer of safetensors files that writes tensor by tensor, so a file may be larger than memory.

A file begins with a header that says where each tensor lies, which is known only at the end. So space for the
header is reserved at the start and filled last, padded with spaces, which the format allows.

    8 bytes: the header's length | header, JSON | spaces | tensor | tensor | ..
"""

import json
import os

import numpy as np

from minitp.util.format import counted

ENTRY_BYTES = 160  # upper bound for a header entry without its name: dtype, shape and two offsets

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
}


class TensorWriter:
    """A safetensors file that is written tensor by tensor.

    The file has a temporary name until it is closed, so a file with the final name is always complete.

    >>> import tempfile, pathlib
    >>> from safetensors.numpy import load_file
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "two.safetensors"
    >>> with TensorWriter(path, names=["a", "b"], metadata={"what": "an example"}) as file:
    ...     file.write("a", np.arange(3.0))
    >>> load_file(path)["a"].tolist()
    [0.0, 1.0, 2.0]

    Parameters
    ----------
    path : Path
    names : iterable of str
        The names of all tensors that may be written, which determine the space reserved for the header.
    metadata : dict of str to str

    Attributes
    ----------
    metadata : dict of str to str
        The metadata, which is written last. It may be replaced by metadata that is not longer.
    """

    def __init__(self, path, names, metadata):
        self.metadata = metadata
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        self._entries = {}
        self._end = 0  # bytes of tensors so far
        room = len(json.dumps(metadata)) + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + 64
        self._room = -(-room // 8) * 8
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed in __exit__
        self._file.seek(8 + self._room)

    def write(self, name, array):
        """Add a tensor; `array` may have any shape and memory order, and a dtype in DTYPES."""
        array = np.asarray(array, order="C")
        start, self._end = self._end, self._end + array.nbytes
        dtype = DTYPES[array.dtype.name]
        self._entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, self._end]}
        self._file.write(array.reshape(-1).view(np.uint8).data)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._write_header()
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _write_header(self):
        header = json.dumps({"__metadata__": self.metadata, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(
                f"{self._path}: the header needs {counted(len(header), 'byte')}, but only {self._room} are "
                "reserved"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
