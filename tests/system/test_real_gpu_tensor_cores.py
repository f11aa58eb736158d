"""Tests that a real GPU's tensor cores sum like the model in `sums`, and within the bound of `check`.

The tests print the errors; run this file with `-s` to see them.
"""

import ml_dtypes
import numpy as np
import pytest
from mma_chain import COLUMNS, mma_chain, numbers, relative_error
from real_gpu import HALVES, NEEDS_GPU

from minitp.check import expected
from minitp.check.difference import difference_of
from minitp.check.sums import TensorCoreSums, sums_of
from minitp.cuda.gpu import with_dtype

pytestmark = NEEDS_GPU

MODELS = [TensorCoreSums(block, bits) for block in (4, 8, 16, 32) for bits in (23, 24, 25, 26)]
OUTPUTS = 1024


@pytest.fixture(params=HALVES)
def half_gpu(gpu, request):
    """The Gpu with a 16-bit dtype."""
    return with_dtype(gpu, request.param, None)


def compiler_of(gpu):
    from minitp.cuda.compiler import Compiler

    return Compiler(gpu.cupy, gpu.dtype)


@pytest.mark.parametrize(("width", "spread"), [(16, 0), (16, 9), (32, 0), (576, 0), (576, 9), (4096, 0)])
def test_mma_agrees_with_the_model(half_gpu, width, spread):
    """Compare the bits; if they differ, the message says which other model fits."""
    a, b = numbers(half_gpu.dtype, width, spread, blocks=8)
    on_gpu, out = [half_gpu.from_host(x) for x in (a, b)], half_gpu.cupy.empty((len(a), COLUMNS), np.float32)
    mma_chain(compiler_of(half_gpu), *on_gpu, out)
    found = half_gpu.to_host(out)
    unequal = {model: int((found != model.matmul(a, b.T)).sum()) for model in MODELS}
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    print(
        f"\nmma, {half_gpu.dtype}, {width} terms, spread {spread}: error {relative_error(found, exact):.2e}"
    )
    table = "\n".join(f"  {model}: {count} of {found.size} differ" for model, count in unequal.items())
    assert unequal[sums_of(half_gpu)] == 0, f"capability {capability(half_gpu)}\n{table}"


def capability(gpu):
    return gpu.cupy.cuda.Device().compute_capability


@pytest.mark.parametrize("width", [64, 128, 576, 4096])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_float32_results_are_within_the_bound(half_gpu, width, tokens):
    """Check products by cuBLAS, in the shapes of prompts and scores, and by the kernel of a decode pass."""
    from minitp.cuda.kernels.linear import Linear

    rng, dtype = np.random.default_rng([width, tokens]), half_gpu.dtype
    x = rng.standard_normal((tokens, width)).astype(dtype)
    w = (rng.standard_normal((OUTPUTS, width)) * width**-0.5).astype(dtype)
    on_gpu = [half_gpu.from_host(array) for array in (x, w)]
    by_linear = half_gpu.cupy.empty((tokens, OUTPUTS), np.float32)
    Linear(compiler_of(half_gpu)).logits(*on_gpu, by_linear)
    results = {
        "cuBLAS": half_gpu.to_host(half_gpu.xp.matmul(on_gpu[0], on_gpu[1].T, dtype=np.float32)),
        "Linear": half_gpu.to_host(by_linear),
    }
    sums = sums_of(half_gpu)
    should = expected.linear(x, w, dtype=np.float32, sums=sums)
    relative, absolute = should.bounds(np.float32)
    chain, lines, wrong = sums.matmul(x, w.T), [], False
    for name, found in results.items():
        error = difference_of(found, should.value)
        lines.append(
            f"  {name}: error {error.relative:.2e}, allowed {relative:.2e}; at most {error.absolute:.2e}, "
            f"allowed {absolute:.2e}; {(found == chain).mean():.0%} of the numbers are those of one chain"
        )
        wrong |= error.relative > relative or error.absolute > absolute
    report = "\n".join([f"{dtype}, {tokens} tokens, {width} terms", *lines])
    print("\n" + report)
    assert not wrong, report


def test_a_result_in_16_bits_is_within_the_bound_of_a_cpu(half_gpu):
    """Check sums of 14336 terms of one sign, whose errors depend most on how they are summed."""
    rng, dtype = np.random.default_rng(0), half_gpu.dtype
    x = np.abs(rng.standard_normal((7, 14336))).astype(dtype)
    w = (np.abs(rng.standard_normal((256, 14336))) / 120).astype(dtype)
    on_gpu = [half_gpu.from_host(array) for array in (x, w)]
    found = half_gpu.to_host(half_gpu.xp.matmul(on_gpu[0], on_gpu[1].T))
    should = expected.linear(x, w)
    error, (relative, absolute) = difference_of(found, should.value), should.bounds(dtype)
    print(f"\n{dtype}, 14336 terms: error {error.relative:.2e}, allowed {relative:.2e}")
    assert error.relative <= relative
    assert error.absolute <= absolute
    assert relative < 2 * float(ml_dtypes.finfo(dtype).eps)
