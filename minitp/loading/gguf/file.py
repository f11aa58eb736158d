"""The GGUF file or files of a model, whose tensors are dequantized slice by slice as they are read.

A large model may be split into files, name-00001-of-00003.gguf and so on, each with its own header and its
own tensors. The first one has the metadata of the model, and all of them `split.no` and `split.count`.
"""

import os
import re
from pathlib import Path

import gguf
import numpy as np

from minitp.errors import InputError
from minitp.loading.gguf.header import FLOATS, GgufHeader
from minitp.util.format import counted

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class GgufFile:
    """An open model in GGUF format, whose headers have been checked.

    Parameters
    ----------
    path : str or Path
        The file, or any part of a model that is split into several files.

    Attributes
    ----------
    path : Path
        The file, or the first part.
    metadata : dict of str to number, str or list
    tensors : dict of str to GgufTensor

    Raises
    ------
    InputError
        if a file or part does not exist, is not a GGUF file, is truncated, does not belong to the others, or
        has a tensor of a type that cannot be dequantized.
    """

    def __init__(self, path):
        headers = open_parts(path)
        self.path, self.metadata = headers[0].path, headers[0].metadata
        self.tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != expected:
            raise InputError(
                f"{self.path}: the model's parts have {counted(len(self.tensors), 'tensor')}, expected "
                f"{expected}; download them again, all from the same place"
            )
        for kind in {tensor.type for tensor in self.tensors.values()}:
            try:
                gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
            except NotImplementedError:
                raise InputError(
                    f"{self.path}: has tensors of type {kind.name}, which the gguf package cannot "
                    "dequantize; use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K"
                ) from None

    def read(self, name, rows, columns):
        """Read part of a matrix, dequantized; a vector counts as a matrix of one row.

        Only the blocks that hold the columns are read and dequantized.

        Parameters
        ----------
        name : str
        rows : slice or array of int
            The rows to read; an array may list them in any order.
        columns : slice

        Returns
        -------
        array [rows, columns]
            In float32 for a quantized tensor, else in the tensor's dtype.
        """
        tensor, (numbers, nbytes) = self.tensors[name], self.tensors[name].block
        packed = np.frombuffer(tensor.file.bytes, np.uint8, tensor.nbytes, tensor.start)  # [all bytes]
        first, last = columns.start // numbers, -(-columns.stop // numbers)  # blocks
        packed = packed.reshape(-1, tensor.row_bytes)[:, first * nbytes : last * nbytes]
        packed = packed[rows]  # [rows, bytes]
        if tensor.type.name in FLOATS:
            return packed.view(FLOATS[tensor.type.name])  # [rows, columns]
        if 0 in packed.shape:
            return np.empty((len(packed), columns.stop - columns.start), np.float32)
        values = gguf.quants.dequantize(packed, tensor.type)  # float32 [rows, columns of the blocks]
        start = columns.start - first * numbers
        return values[:, start : start + columns.stop - columns.start]  # [rows, columns]


def open_parts(path):
    """Return the GgufHeader of each part of the model that `path` belongs to, in order; usually only one."""
    path = Path(path)
    given = GgufHeader(path)
    count = given.metadata.get("split.count", 1)
    if count <= 1:
        return [given]
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise InputError(
            f"{path}: one of {count} parts of a model; name the parts as llama-gguf-split does "
            f"(name-00001-of-{count:05d}.gguf, ..), so that the others can be found"
        )
    headers = []
    for number in range(count):
        part = path.with_name(f"{named[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not os.path.lexists(part):  # a link that leads nowhere has its own error
            raise InputError(
                f"{path}: the model has {counted(count, 'part')}, and {part.name} is missing; "
                "download or copy it, too"
            )
        header = GgufHeader(part)
        found = header.metadata.get("split.no"), header.metadata.get("split.count")
        if found != (number, count):
            raise InputError(
                f"{part}: expected part {number + 1} of {count}, but its split.no is {found[0]} and its "
                f"split.count {found[1]}; download it again"
            )
        headers.append(header)
    return headers
