"""The header of a GGUF file: metadata, and the type, shape and place of each tensor.

The format (docs/gguf.md of ggml), all numbers little-endian:

    magic "GGUF" | version u32 | number of tensors u64 | number of metadata entries u64
    entries: key, type u32, value              a string is its length u64 and UTF-8 bytes,
    tensors: name, dimensions u32, each u64,   an array its items' type u32, its length u64 and the items
             type u32, offset u64
    padding to a multiple of general.alignment, then the tensors' data

Dimensions come innermost first. A quantized tensor's rows are divided into blocks of 32 or 256 numbers, each
block a few bytes; the `gguf` library dequantizes the blocks. The library could read the header too, but it
takes 2 s for the 100,000 strings of a small vocabulary, and every rank reads them; this module takes 0.1 s.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from minitp.errors import InputError
from minitp.util.files import why_unreadable
from minitp.util.format import counted

VERSIONS = (2, 3)
ALIGNMENT = 32  # unless general.alignment says otherwise

# Metadata types: code -> struct's format letter.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # not quantized


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type (F16, Q4_K, ..), shape (outermost first), file, and first byte in the file."""

    type: gguf.GGMLQuantizationType
    shape: tuple
    start: int
    file: "GgufHeader"

    @property
    def block(self):
        """The size of a block, as (numbers, bytes)."""
        return gguf.GGML_QUANT_SIZES[self.type]

    @property
    def row_bytes(self):
        numbers, nbytes = self.block
        return self.shape[-1] // numbers * nbytes

    @property
    def nbytes(self):
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def dtype(self):
        """The dtype that reading yields (safetensors' name): the tensor's own, or F32 if it is quantized."""
        return self.type.name if self.type.name in FLOATS else "F32"


class GgufHeader:
    """The header of one GGUF file, which is memory-mapped.

    Attributes
    ----------
    path : Path
    bytes : mmap
    metadata : dict of str to number, str or list
    tensors : dict of str to GgufTensor

    Raises
    ------
    InputError
        if the file does not exist, is not a GGUF file or is truncated.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: {why_unreadable(path, error)}") from error
        except ValueError:
            raise InputError(f"{path}: the file is empty; download or copy it again") from None
        try:
            self._read_header()
        except (struct.error, ValueError, IndexError, ZeroDivisionError, TypeError) as error:
            raise InputError(f"{path}: truncated, or not a GGUF file: {error}") from error
        self._check()

    def _read_header(self):
        if self.bytes[:4] != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file; --model needs a directory or a .gguf file")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            kind = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
            raise InputError(f"{self.path}: this GGUF file {kind}; expected little-endian, version 2 or 3")
        tensors, entries = self._number("Q"), self._number("Q")
        self.metadata = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        raw = {}  # name -> type, shape, offset in the data
        for _ in range(tensors):
            name, dimensions = self._string(), self._number("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"tensor {name} has {counted(dimensions, 'dimension')}")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            raw[name] = (self._type(name, self._number("I")), shape, self._number("Q"))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        data = -(-self._at // alignment) * alignment
        self.tensors = {name: GgufTensor(t, shape, data + at, self) for name, (t, shape, at) in raw.items()}

    def _number(self, letter):
        layout = struct.Struct("<" + letter)
        (value,) = layout.unpack_from(self.bytes, self._at)
        self._at += layout.size
        return value

    def _string(self):
        length = self._number("Q")
        text = self.bytes[self._at : self._at + length]
        if len(text) < length:
            raise IndexError(f"a string of {counted(length, 'byte')} begins at byte {self._at}")
        self._at += length
        return text.decode("utf-8")

    def _value(self, kind):
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(self._letter(kind))
        of, length = self._number("I"), self._number("Q")
        if of in (STRING, ARRAY):
            return [self._value(of) for _ in range(length)]
        layout = struct.Struct(f"<{length}{self._letter(of)}")
        values = layout.unpack_from(self.bytes, self._at)
        self._at += layout.size
        return list(values)

    def _letter(self, kind):
        if kind not in NUMBERS:
            raise InputError(f"{self.path}: damaged: a metadata value has the unknown type {kind}")
        return NUMBERS[kind]

    def _type(self, name, code):
        try:
            return gguf.GGMLQuantizationType(code)
        except ValueError:
            raise InputError(
                f"{self.path}: tensor {name} is of type {code}, which this version of the gguf package "
                "does not know; pip install --upgrade gguf"
            ) from None

    def _check(self):
        for name, tensor in self.tensors.items():
            if tensor.shape[-1] % tensor.block[0]:
                raise InputError(
                    f"{self.path}: tensor {name} has rows of {tensor.shape[-1]} numbers, expected a multiple "
                    f"of {tensor.block[0]}, the block size of {tensor.type.name}"
                )
            if tensor.start + tensor.nbytes > len(self.bytes):
                raise InputError(
                    f"{self.path}: truncated: tensor {name} ends at byte {tensor.start + tensor.nbytes}, "
                    f"but the file ends at byte {len(self.bytes)}; download it again"
                )
