"""A Hugging Face checkpoint: the location of each tensor, checked before any data is loaded."""

import json
import math
import os
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes  # also registers bfloat16, which the safetensors library can then return
import numpy as np
from safetensors import SafetensorError, safe_open

from minitp.errors import InputError
from minitp.loading.file_bytes import FileBytes
from minitp.loading.kinds import explain_directory
from minitp.loading.quantized import hint_for, refuse_quantized_tensor
from minitp.util.files import how_to_replace, read_json, require_readable

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

# Buffers that some checkpoints have besides the weights. Their values follow from config.json or are not
# used, and transformers passes over them, too.
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|attn\.bias|attention\.bias"
    r"|masked_bias|position_ids|num_batches_tracked)$"
)


@dataclass(frozen=True)
class TensorInfo:
    """The file, dtype (safetensors' name) and shape of one tensor.

    For a part of a joined tensor, `part_of` is the joined tensor's name and `first_row` is the part's first
    row in it. `start` is the position in the file of the tensor's first byte, or the joined tensor's.
    """

    file: Path
    dtype: str
    shape: tuple
    part_of: str | None = None
    first_row: int = 0
    start: int = 0


class Checkpoint:
    """The tensors of a directory: `model.safetensors`, or several files with `model.safetensors.index.json`.

    The constructor reads only headers; `read` and `read_into` read one slice of one tensor.

    Attributes
    ----------
    tensors : dict of str to TensorInfo

    Raises
    ------
    InputError
        if a file is missing, truncated or not a safetensors file, or lacks a tensor that the index lists.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self._open_files = threading.local()  # file handles per thread, because ranks may be threads
        self._file_bytes, self._opening = {}, threading.Lock()  # path -> FileBytes, shared by threads
        single = self.directory / "model.safetensors"
        index = self.directory / "model.safetensors.index.json"
        if os.path.lexists(single):
            self.tensors = _read_header(single)
        elif os.path.lexists(index):
            self.tensors = self._read_index(index)
        else:
            raise InputError(f"--model {directory}: the directory {explain_directory(directory)}")

    def _read_index(self, index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise InputError(f"{index}: expected an object from tensor names to file names as 'weight_map'")
        tensors = {}
        for name in sorted(set(weight_map.values())):
            header = _read_header(self.directory / name)
            for tensor in (tensor for tensor, file in weight_map.items() if file == name):
                if tensor not in header:
                    raise InputError(
                        f"{self.directory / name}: tensor {tensor} is missing, but {index.name} lists it"
                    )
            # A file may hold a tensor that the index does not name or lists in another file.
            tensors |= {t: info for t, info in header.items() if weight_map.get(t, name) == name}
        return tensors

    def split_joined(self, plan):
        """Replace each joined tensor by its parts, under the names that the plan uses."""
        joined = {}
        for shard in plan.tensors.values():
            if shard.part_of is not None:
                joined.setdefault(shard.part_of, []).append(shard)
        for name, parts in joined.items():
            shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
            self._expect(name, shape)
            info = self.tensors.pop(name)
            for part in parts:
                location = {"part_of": name, "first_row": part.first_row}
                self.tensors[part.name] = replace(info, shape=part.shape, **location)

    def _expect(self, name, shape):
        """Reject a checkpoint in which a tensor is missing or has the wrong shape."""
        info = self.tensors.get(name)
        if info is None:
            refuse_quantized_tensor(self.tensors, name, self.directory)
            raise InputError(f"{self.directory}: tensor {name} is missing, expected shape {list(shape)}")
        if info.shape != shape:
            raise InputError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}"
            )

    def check(self, plan, layers_in_file):
        """Reject a checkpoint in which a tensor is missing, misshapen, unexpected or of an unsupported dtype.

        `layers_in_file` is the number of layers in config.json; the plan may have fewer.
        """
        for name, shard in plan.tensors.items():
            self._expect(name, shard.shape)
            info = self.tensors[name]
            if info.dtype not in DTYPES:
                raise InputError(
                    f"{info.file}: tensor {name} has dtype {info.dtype}, expected one of "
                    f"{', '.join(DTYPES)}{hint_for(info.dtype)}"
                )
        skipped = tuple(f"model.layers.{i}." for i in range(plan.layers, layers_in_file))
        for name, info in self.tensors.items():
            if name in plan.tensors or BUFFERS.search(name) or name.startswith(skipped):
                continue
            if name == "lm_head.weight":  # a copy of tied embeddings; the loader compares the two
                continue
            raise InputError(
                f"{info.file}: tensor {name} is not part of the model that config.json describes"
            )

    def read(self, name, index):
        """Read one slice of a tensor, in the file's dtype; `index` is a tuple of slices."""
        info = self.tensors[name]
        if 0 in [s.stop - s.start for s in index]:
            index = tuple(slice(0, 0) for _ in index)
        elif info.part_of is not None:
            rows, *columns = index
            index = (slice(rows.start + info.first_row, rows.stop + info.first_row), *columns)
        try:
            return self._open(info.file).get_slice(info.part_of or name)[index]
        except SafetensorError as error:
            raise InputError(f"{info.file}: tensor {name} cannot be read: {error}") from error

    def read_into(self, name, index, out):
        """Read one slice of a tensor into `out`, a host array of its shape, rounded to the dtype of `out`.

        Several threads may call this at once. Whole rows in the dtype of `out` are copied only once, from the
        system's page cache.
        """
        if out.size == 0:
            return
        info, (rows, *columns) = self.tensors[name], index
        dtype, row_shape = np.dtype(DTYPES[info.dtype]), info.shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        start = info.start + (info.first_row + rows.start) * row_bytes
        file = self._bytes_of(info.file)
        if out.dtype == dtype and out.shape[1:] == row_shape and out.flags.c_contiguous:
            file.read(start, out)
        else:
            stored = file.view(start, len(out) * row_bytes).view(dtype)  # [n] or [n * in]
            out[...] = stored.reshape(len(out), *row_shape)[(slice(None), *columns)]

    def _bytes_of(self, path):
        with self._opening:
            if path not in self._file_bytes:
                self._file_bytes[path] = FileBytes(path)
            return self._file_bytes[path]

    def _open(self, path):
        handles = self._open_files.__dict__
        if path not in handles:
            handles[path] = safe_open(path, framework="np")
        return handles[path]


def _read_header(path):
    if os.path.lexists(path):
        require_readable(path)  # the library would report any failure as a missing file
    try:
        with safe_open(path, framework="np") as file:
            tensors, starts = {}, _starts(path)
            for name in file.keys():  # noqa: SIM118  not a dict
                piece = file.get_slice(name)
                shape = tuple(piece.get_shape())
                tensors[name] = TensorInfo(path, piece.get_dtype(), shape, start=starts[name])
            return tensors
    except FileNotFoundError:
        raise InputError(f"{path}: listed in the index, but missing") from None
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise InputError(
            f"{path}: truncated, or not a safetensors file ({reason[:100]}); {how_to_replace(path)}"
        ) from error


def _starts(path):
    """Return the position of each tensor's first byte in a safetensors file with a valid header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
