"""Tests of rms_norm.cu, run on the CPU, against `ops.rms_norm`."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.rms_norm import RmsNorm

DTYPES = (np.float16, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (1, 4096), (3, 576), (5, 72), (2, 2048 + 8)])
@pytest.mark.parametrize("added", ["nothing", "residual", "residual and bias"])
def test_rms_norm(dtype, rows, width, added):
    draw = np.random.default_rng(width)
    x, addend = draw.normal(size=(2, rows, width)).astype(dtype)  # [T, D] each
    weight = draw.normal(size=width).astype(dtype)  # [D]
    bias = draw.normal(size=width).astype(dtype)  # [D]
    out = np.full_like(x, np.nan)  # [T, D]
    sums = {"nothing": x.copy(), "residual": x + addend, "residual and bias": x + (addend + bias)}
    before = sums[added]  # [T, D]
    addends = {"nothing": (), "residual": (addend,), "residual and bias": (addend, bias)}[added]
    RmsNorm(CpuCompiler(dtype))(x, weight, out, 1e-5, *addends)
    np.testing.assert_array_equal(x, before)
    expected = ops.rms_norm(np, before, weight, 1e-5)  # [T, D]
    # The kernel sums in another order, so the rms may differ by a float32 rounding, and a value near a tie
    # may round to the other side.
    close = np.finfo(np.float16).eps if dtype == np.float16 else 2**-7
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2 * close)
    assert (out == expected).mean() > 0.99


def test_a_row_of_zeros_stays_zero():
    x = np.zeros((1, 16), np.float16)
    out = np.full_like(x, np.nan)
    RmsNorm(CpuCompiler(np.float16))(x, np.ones(16, np.float16), out, 1e-5)
    np.testing.assert_array_equal(out, 0)
