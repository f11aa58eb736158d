"""Writing a safetensors file tensor by tensor: what is written need not fit in memory.

The format begins with a header that says where each tensor lies, so it can only be known at the end. Room for
it is kept in front and filled last; what is left of the room is spaces, as the format allows.

    8 bytes: the header's length | header, JSON | spaces | tensor | tensor | ..
"""

import json
import os

import numpy as np

ENTRY_BYTES = 160  # of a header entry beside its name: dtype, shape and two offsets, with room to spare

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
}


class TensorWriter:
    """A safetensors file that grows.

    It is written under another name and takes its own when it is closed, so that there is never half a file.

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
        All tensors that may come, for the room of the header.
    metadata : dict of str to str

    Attributes
    ----------
    metadata : dict of str to str
        What is written in the end. It may be replaced by another that is not longer.
    """

    def __init__(self, path, names, metadata):
        self.metadata = metadata
        self._path = path
        self._beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        self._entries = {}
        self._end = 0  # of the data so far
        room = len(json.dumps(metadata)) + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + 64
        self._room = -(-room // 8) * 8
        self._file = open(self._beside, "wb")  # noqa: SIM115  closed in __exit__
        self._file.seek(8 + self._room)

    def write(self, name, array):
        """Add a tensor; `array` of any shape and memory order, of a dtype in DTYPES."""
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
                os.replace(self._beside, self._path)
        finally:
            self._file.close()
            self._beside.unlink(missing_ok=True)

    def _write_header(self):
        header = json.dumps({"__metadata__": self.metadata, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"{self._path}: a header of {len(header)} bytes, and room for {self._room}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
