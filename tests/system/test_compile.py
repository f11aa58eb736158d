"""Tests that every kernel compiles for the GPUs that minitp supports, without register spills."""

import re
import shutil
import subprocess

import pytest
from cuda_on_cpu import CUDA

from minitp.cuda.compiler import compile_options
from minitp.cuda.kernels.linear import NORM_BYTES

ARCHITECTURES = ("80", "90a")  # A100; H100 and H200
LEAST_SHARED = 99 << 10  # bytes of shared memory per block on sm_86, sm_89 and sm_120

PAGED = [{"HEAD_DIM": head_dim, "BLOCK_SIZE": 16} for head_dim in (64, 128)]
PAGED += [{"HEAD_DIM": 256, "BLOCK_SIZE": 16, "SOFT_CAP": 1}]  # needs the most registers
GEMMA = {"PLUS_ONE": 1, "GELU": 1, "SOFT_CAP": 1}

LINEAR = [
    {"TOKEN_TILES": 1, "PAIR_TILES": 1, "NORM": 1},
    {"TOKEN_TILES": 2, "PAIR_TILES": 1},
    {"TOKEN_TILES": 4, "PAIR_TILES": 2},
    {"TOKEN_TILES": 8, "PAIR_TILES": 2},
]

# The variants that need the most registers: with NORM, split, and with the most tiles of pairs.
SPLIT_LINEAR = [
    {"TOKEN_TILES": 1, "PAIR_TILES": 1, "NORM": 1, "SPLITS": 4},
    {"TOKEN_TILES": 1, "PAIR_TILES": 1, "NORM": 1},
    {"TOKEN_TILES": 2, "PAIR_TILES": 2, **GEMMA},
    {"TOKEN_TILES": 4, "PAIR_TILES": 2, "SPLITS": 2},
    {"TOKEN_TILES": 8, "PAIR_TILES": 2},
    {"TOKEN_TILES": 8, "PAIR_TILES": 4},
]

# Each file with the macros that it is compiled with; macros that change the code have each of their values.
VARIANTS = {
    "swiglu.cu": [{}],
    "join_columns.cu": [{}],
    "all_reduce.cu": [{"RANKS": 2}, {"RANKS": 8}],
    "attention_decode.cu": PAGED,
    "attention_prefill.cu": PAGED,
    "begin_decode.cu": [{}],
    "cache_write.cu": [{"HEAD_DIM": 128}],
    "expert_linear.cu": LINEAR,
    "expert_sum.cu": [{}],
    "heads.cu": [{"PLUS_ONE": 1}],
    "linear.cu": SPLIT_LINEAR,
    "read_memory.cu": [{}],
    "rms_norm.cu": [{}, {"POST_NORM": 1, "PLUS_ONE": 1}],
    "route.cu": [{}],
    "sample.cu": [{}],
}


def test_the_list_has_all_kernels():
    assert set(VARIANTS) == {path.name for path in CUDA.glob("*.cu")}


def cases():
    """Yield (dtype, file, defines); a kernel without numbers of 16 bits is the same in both dtypes."""
    for file, variants in VARIANTS.items():
        code = re.sub("//.*", "", (CUDA / file).read_text())
        has_halves = re.search(r"\b(Half|to_half|to_float|rounded|BFLOAT16)", code)
        dtypes = ("float16", "bfloat16") if has_halves else ("float16",)
        for dtype in ("bfloat16",) if file == "expert_linear.cu" else dtypes:  # its product is linear.cu's
            for defines in variants:
                yield dtype, file, defines


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, CUDA's compiler, is missing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "file", "defines"), list(cases()))
def test_compiles_without_spills(tmp_path, file, defines, dtype, architecture):
    import ml_dtypes

    options = compile_options(getattr(ml_dtypes, dtype, None), **defines)
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-cubin", *options, target, "-Xptxas", "-v", f"-I{CUDA}", "-o", tmp_path / "out.cubin"]
    done = subprocess.run([*command, CUDA / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills
    assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills), spills
    shared = max((int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)), default=0)
    assert shared + NORM_BYTES * defines.get("NORM", 0) <= LEAST_SHARED
