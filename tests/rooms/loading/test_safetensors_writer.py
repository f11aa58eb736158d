"""Tests of TensorWriter: valid and complete files, and little memory."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from minitp.loading.safetensors_writer import DTYPES, TensorWriter


def read(path):
    """Return the tensors and the metadata of a file."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def write(path, arrays, metadata=None, names=None):
    with TensorWriter(path, names or arrays, metadata or {}) as file:
        for name, array in arrays.items():
            file.write(name, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_any_dtype_shape_and_order_are_read_back(dtype, tmp_path):
    base = np.arange(24).reshape(2, 3, 4).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    arrays = {"c": base, "f": np.asfortranarray(base), "view": base[:, ::2, 1:].transpose(2, 0, 1)}
    arrays |= {"scalar": base[1, 1, 1].reshape(()), "empty": base[:, :0], "odd": base[0, 0, :3]}
    write(tmp_path / "a.safetensors", arrays)
    tensors, _ = read(tmp_path / "a.safetensors")
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(tensors[name], array)


def test_unsupported_dtype_leaves_no_file(tmp_path):
    with pytest.raises(KeyError, match="complex128"):
        write(tmp_path / "a.safetensors", {"a": np.ones(2), "b": np.ones(2, complex)})
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_previous_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.ones(2)})
    before = path.read_bytes()
    with pytest.raises(KeyError, match="complex128"):
        write(path, {"a": np.zeros(5), "b": np.ones(2, complex)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_names_of_any_kind_fit_into_the_header(tmp_path):
    names = ["", "x" * 5000, 'quoted "\\" name', "é" * 500, "日本語 🎉", *[f"{i}" for i in range(3000)]]
    # Shapes and offsets with as many digits as possible, as if a petabyte came before them.
    arrays = {name: np.zeros((10**9, 0, 10**9), np.float32) for name in names}
    metadata = {
        "config": json.dumps({"é": "日本語 \u2028 🎉" * 100}, ensure_ascii=False),
        "kinds": '"' * 1000,
    }
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, names, metadata) as file:
        file._end = 10**15
        for name, array in arrays.items():
            file.write(name, array)
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert length % 8 == 0
    parsed = json.loads(header[8 : 8 + length])
    assert parsed.pop("__metadata__") == metadata
    assert set(parsed) == set(names)
    assert parsed["日本語 🎉"] == {
        "dtype": "F32", "shape": [10**9, 0, 10**9], "data_offsets": [10**15, 10**15]
    }  # fmt: skip


def test_long_metadata_with_any_characters(tmp_path):
    metadata = {"model": "日本語 🎉 é" * 1000, "config": json.dumps({"a": '\\"\u2028' * 1000})}
    write(tmp_path / "a.safetensors", {"a": np.ones(2)}, metadata)
    assert read(tmp_path / "a.safetensors")[1] == metadata


def test_tensors_may_be_omitted_and_metadata_may_shrink(tmp_path):
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, ["a", "b", "c"], {"ids": "[1, 2, 30000]"}) as file:
        file.write("b", np.arange(3))
        file.metadata = {"ids": "[1, 2, 3]"}
    tensors, metadata = read(path)
    assert metadata == {"ids": "[1, 2, 3]"}
    assert list(tensors) == ["b"]
    assert tensors["b"].tolist() == [0, 1, 2]


def test_header_that_does_not_fit_leaves_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="the header needs"),
        TensorWriter(tmp_path / "a.safetensors", ["a"], {"ids": ""}) as file,
    ):
        file.metadata = {"ids": "1, " * 1000}
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_bounded_while_a_file_is_written(tmp_path):
    count, size = 64, 1 << 20
    tracemalloc.start()
    try:
        with TensorWriter(tmp_path / "a.safetensors", map(str, range(count)), {}) as file:
            for i in range(count):
                file.write(str(i), np.full(size, i, np.uint8).view(np.float32))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * size  # an array and the file's buffers, not 64 arrays
    assert (tmp_path / "a.safetensors").stat().st_size > count * size
