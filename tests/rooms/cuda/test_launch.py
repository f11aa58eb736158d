"""Tests of launches with attributes, through the stand-in's driver, and of the structs of CUDA's header."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from minitp.cuda import launch
from minitp.cuda.compiler import Compiler
from minitp.errors import RankError

# Members of CUlaunchConfig and CUlaunchAttribute in cuda.h, with the fields that stand for them.
MEMBERS = {
    ("CUlaunchConfig", "gridDimX"): launch.LaunchConfig.grid,
    ("CUlaunchConfig", "blockDimX"): launch.LaunchConfig.block,
    ("CUlaunchConfig", "sharedMemBytes"): launch.LaunchConfig.shared_mem,
    ("CUlaunchConfig", "hStream"): launch.LaunchConfig.stream,
    ("CUlaunchConfig", "attrs"): launch.LaunchConfig.attributes,
    ("CUlaunchConfig", "numAttrs"): launch.LaunchConfig.attribute_count,
    ("CUlaunchAttribute", "id"): launch.LaunchAttribute.id,
    ("CUlaunchAttribute", "value"): launch.LaunchAttribute.value,
}
SIZES = {"CUlaunchConfig": launch.LaunchConfig, "CUlaunchAttribute": launch.LaunchAttribute}
NUMBERS = {
    "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION": launch.CLUSTER_DIMENSION,
    "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION": launch.PROGRAMMATIC_STREAM_SERIALIZATION,
}


def test_offsets_and_sizes():
    """Compare with the numbers that a C++ program printed with the headers of CUDA 13.0."""
    assert [field.offset for field in MEMBERS.values()] == [0, 12, 24, 32, 40, 48, 0, 8]
    assert [ctypes.sizeof(struct) for struct in SIZES.values()] == [56, 72]
    assert list(NUMBERS.values()) == [4, 6]


def cuda_include():
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parent.parent] if nvcc else []
    found = [path for root in (*roots, Path("/usr/local/cuda")) for path in (root / "include").glob("cuda.h")]
    return found[0].parent if found else None


@pytest.mark.skipif(cuda_include() is None, reason="CUDA's headers are missing")
def test_structs_match_the_installed_header(tmp_path):
    expressions = [
        *(f"offsetof({struct}, {member})" for struct, member in MEMBERS),
        *(f"sizeof({struct})" for struct in SIZES),
        *NUMBERS,
    ]
    lines = "".join(f'printf("%d ", static_cast<int>({one}));' for one in expressions)
    source = tmp_path / "sizes.cpp"
    source.write_text(
        f"#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\nint main() {{ {lines} }}\n"
    )
    subprocess.run(["g++", f"-I{cuda_include()}", source, "-o", tmp_path / "sizes"], check=True)
    printed = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout
    fields = [field.offset for field in MEMBERS.values()]
    assert list(map(int, printed.split())) == [
        *fields,
        *map(ctypes.sizeof, SIZES.values()),
        *NUMBERS.values(),
    ]


def normed(cupy, **options):
    """Launch rms_norm with `options` while a graph is captured; return (the launch, its result)."""
    kernel = Compiler(cupy, np.dtype(np.float16)).kernel("rms_norm.cu", "rms_norm")
    x, weight, out = cupy.ones((2, 8), np.float16), cupy.ones(8, np.float16), cupy.zeros((2, 8), np.float16)
    numbers = np.int32(8), np.int32(8), np.float32(1), np.float32(0)
    args = x, None, None, None, weight, out, *numbers
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        kernel((2,), (32,), args, **options)
        graph = stream.end_capture()
        graph.launch(stream)
    return graph.launches[0], cupy.asnumpy(out)


@pytest.mark.parametrize(("dependent", "cluster"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_attributes_are_captured(cupy, dependent, cluster):
    made, out = normed(cupy, dependent=dependent, cluster=cluster)
    assert (made.grid, made.block) == ((2, 1, 1), (32, 1, 1)) if dependent or cluster > 1 else ((2,), (32,))
    assert (made.dependent, made.cluster) == (dependent, cluster)
    assert (out == 1).all()


def test_an_older_gpu_gets_plain_launches(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", "80")
    assert not Compiler(cupy, np.dtype(np.float16)).has_clusters
    made, out = normed(cupy, dependent=True)
    assert (made.dependent, made.cluster) == (False, 1)
    assert (out == 1).all()
    with pytest.raises(ValueError, match="clusters of 2 blocks"):
        normed(cupy, cluster=2)


def test_an_older_driver_gets_plain_launches(cupy, monkeypatch):
    monkeypatch.setattr(launch, "driver_launch", lambda: None)
    assert not normed(cupy, dependent=True)[0].dependent


def test_a_refused_launch_is_an_error(cupy, monkeypatch):
    monkeypatch.setattr(launch, "driver_launch", lambda: lambda *_: 912)
    x, out = cupy.ones((2, 8), np.float16), cupy.zeros((2, 8), np.float16)
    kernel = Compiler(cupy, np.dtype(np.float16)).kernel("rms_norm.cu", "rms_norm")
    with pytest.raises(RankError, match="CUDA driver refuses a launch of rms_norm with CUresult 912"):
        kernel((2,), (32,), (x, None, x[0], out), dependent=True)
