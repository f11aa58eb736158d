"""Files of named arrays, .safetensors or NumPy's .npz, which are read one array at a time."""

import json
import tokenize
import zipfile
import zlib
from dataclasses import dataclass

import ml_dtypes  # registers bfloat16 with NumPy, so that the safetensors library can return it
import numpy as np
from safetensors import SafetensorError, safe_open

from minitp.errors import InputError
from minitp.util.files import why_unreadable

NPY = b"\x93NUM"  # first bytes of an .npy file
ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # first bytes of a zip archive; the second is for an empty one
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
}
SAFETENSORS_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
SAFETENSORS_DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}
BROKEN = (ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
BROKEN += (MemoryError, tokenize.TokenError)  # of the header of a .npy file


@dataclass(frozen=True)
class Entry:
    """An array's shape, and NumPy's name of its dtype."""

    shape: tuple
    dtype: str


class TensorFile:
    """A file of named arrays; opening it reads only the headers.

    Attributes
    ----------
    path : Path
    entries : dict of str to Entry
        Shape and dtype of each array by name, in the order of the file.
    metadata : dict of str to str
        Metadata of the file; empty for .npz.
    unfit : dict of str to (shape, reason)
        Arrays that the file has and that cannot be used.
    """

    def __init__(self, path, entries, metadata, unfit=None):
        self.path, self.entries, self.metadata, self.unfit = path, entries, metadata, unfit or {}

    def read(self, name):
        """Return an array in float64, in its own shape; raise InputError if its dtype is not supported."""
        return self.read_as_stored(name).astype(np.float64)

    def read_as_stored(self, name):
        """Return an array in its own shape and dtype; raise InputError if its dtype is not supported."""
        dtype = self.entries[name].dtype
        if dtype not in SAFETENSORS_DTYPES.values():
            raise InputError(
                f"{self.path}: {name} has dtype {dtype}, expected float16, bfloat16, float32, float64 or "
                "integers"
            )
        try:
            return self._read(name)
        except (*BROKEN, SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: {name} cannot be read: {error}") from error

    def blame(self, name, tolerance):
        """Return which ranks have a part of an array that differs; "" if the file is not of ranks."""
        return ""

    def _read(self, name):
        raise NotImplementedError


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def __init__(self, path):
        with safe_open(
            path, framework="np"
        ):  # check the header, which is then read again for the order of the arrays
            pass
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        entries = {
            name: Entry(tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in in_order
        }
        super().__init__(path, entries, metadata)
        self._file = safe_open(path, framework="np")

    def _read(self, name):
        return self._file.get_tensor(name)


class NpzFile(TensorFile):
    """A file written by numpy.savez or savez_compressed."""

    def __init__(self, path):
        self._zip = zipfile.ZipFile(path)
        names = [name.removesuffix(".npy") for name in self._zip.namelist() if name.endswith(".npy")]
        super().__init__(path, {name: self._header(name) for name in names}, {})

    def _header(self, name):
        with self._zip.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            if version[0] not in readers:
                raise ValueError(f"{name} has .npy version {version[0]}, expected 1 or 2")
            shape, _, dtype = readers[version[0]](file)
        return Entry(shape, "bfloat16" if dtype.str == "|V2" else dtype.name)  # NumPy writes bfloat16 as V2

    def _read(self, name):
        with self._zip.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return array.view(ml_dtypes.bfloat16) if self.entries[name].dtype == "bfloat16" else array


def open_dump(path):
    """Open a TensorFile; the format is recognized by the content, not by the file's name.

    Raises
    ------
    InputError
        if the file cannot be read, has another format, or has no arrays.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == NPY:
            raise InputError(f"{path}: an .npy file has one array without a name; write numpy.savez's .npz")
        dump = (NpzFile if start in ZIPS else SafetensorsFile)(path)
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from error
    except (*BROKEN, SafetensorError) as error:
        raise InputError(f"{path}: not a valid .safetensors or .npz file: {error}") from error
    if not dump.entries:
        raise InputError(f"{path}: the file has no arrays; write it with safetensors or numpy.savez")
    return dump
