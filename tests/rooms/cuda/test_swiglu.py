"""Tests of swiglu.cu and join_columns.cu, run on the CPU, against the explicit operations."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.join_columns import JoinColumns
from minitp.cuda.kernels.swiglu import Swiglu


@pytest.mark.parametrize(("dtype", "unit"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
@pytest.mark.parametrize(("rows", "columns", "stride"), [(1, 8, 8), (3, 5, 8), (2, 300, 304), (5, 512, 512)])
def test_swiglu(dtype, unit, rows, columns, stride):
    draw = np.random.default_rng(columns)
    gate_up = draw.normal(scale=4, size=(rows, 2 * columns)).astype(dtype)  # [T, 2 F]
    gate_up[0, 0] = -200  # where exp(-x) would overflow
    out = np.full((rows, stride), np.nan, dtype)  # [T, F and padding]
    Swiglu(CpuCompiler(dtype))(gate_up, out)
    expected = ops.swiglu(np, gate_up).astype(np.float32)  # [T, F]
    # Both compute the same formula in float32, so only results near a tie may differ, by one unit.
    np.testing.assert_allclose(out[:, :columns].astype(np.float32), expected, rtol=unit, atol=1e-30)
    assert (out[:, :columns] == expected.astype(dtype)).mean() > 0.99
    np.testing.assert_array_equal(out[:, columns:].astype(np.float32), 0)


@pytest.mark.parametrize("widths", [[5], [4, 4], [3, 2, 2], [300, 1, 299, 300]])
@pytest.mark.parametrize("rows", [1, 3])
def test_join_columns(widths, rows):
    draw = np.random.default_rng(sum(widths))
    parts = [draw.normal(size=(rows, n)).astype(np.float32) for n in widths]  # [B, V_r] each
    gathered = np.full((len(widths), rows, max(widths)), np.nan, np.float32)  # [ranks, B, widest]
    for rank, part in enumerate(parts):
        gathered[rank, :, : part.shape[1]] = part
    out = np.full((rows, sum(widths) + 3), np.nan, np.float32)  # [B, V and more]
    JoinColumns(CpuCompiler(np.float16), np, widths)(gathered, out[:, : sum(widths)])
    np.testing.assert_array_equal(out[:, : sum(widths)], np.concatenate(parts, axis=1))
    assert np.isnan(out[:, sum(widths) :]).all()
