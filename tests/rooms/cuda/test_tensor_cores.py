"""Tests of sums on tensor cores: the model in Python, its copy in C++, and the bound derived from it."""

import math
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler
from mma_chain import COLUMNS, ROWS, mma_chain, numbers, relative_error
from on_gpu import model_on_gpu, run_on_gpus
from tiny import write_tiny

from minitp.check import expected
from minitp.check.difference import difference_of
from minitp.check.run import check_model
from minitp.check.sums import IN_FLOAT32, TENSOR_CORES, sums_of
from minitp.cuda.kernels.linear import Linear
from minitp.device import DTYPES, Device
from minitp.loading.source import open_model
from minitp.ops import soft_cap

HALVES = ("float16", "bfloat16")
VOLTA, AMPERE, HOPPER = (TENSOR_CORES[capability] for capability in (70, 75, 90))

# Relative errors of `logits_partial` on an H200, of random weights and inputs: dtype, width, error.
MEASURED = [("bfloat16", 4096, 4.2e-6), ("float16", 4096, 4.8e-6), ("bfloat16", 576, 4.9e-7)]


# --- the model ------------------------------------------------------------------------------------------


def exponent(x, smallest):
    """Return the e with 2^e <= |x| < 2^(e + 1) of a Fraction x, but at least `smallest`."""
    return max(math.frexp(x)[1] - 1, smallest)


def cut_off(x, e):
    """Truncate x to a multiple of 2^e."""
    unit = Fraction(2) ** e
    return int(x / unit) * unit


def one_product(a, b, sums):
    """Compute the sum of a[i] * b[i] in Fractions, as the text of sums.py describes it."""
    smallest = int(np.log2(float(ml_dtypes.finfo(a.dtype).smallest_normal)))
    a, b = ([Fraction(float(x)) for x in row] for row in (a, b))
    total = Fraction(0)
    for start in range(0, len(a), sums.block):
        pairs = list(zip(a[start : start + sums.block], b[start : start + sums.block], strict=True))
        exponents = [exponent(x, smallest) + exponent(y, smallest) for x, y in pairs if x * y]
        exponents.append(exponent(total, -126) if total else -108 - sums.bits)
        last = max(exponents) - sums.bits
        total = sum((cut_off(x * y, last) for x, y in pairs), cut_off(total, last))
        total = cut_off(total, exponent(total, -149) - 23)
    return np.float32(float(total))


@pytest.mark.parametrize("sums", TENSOR_CORES.values(), ids=["90", "75", "70"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spread", [0, 3, 9])
def test_the_model_does_what_its_docstring_says(dtype, sums, spread):
    """Check also a width that is not a multiple of a block, and zeros."""
    a, b = numbers(DTYPES[dtype], 39, spread)
    a = a[:4]
    a[:, ::7] = 0
    expected = [[one_product(x, y, sums) for y in b] for x in a]
    np.testing.assert_array_equal(sums.matmul(a, b.T), expected)


@pytest.mark.parametrize(("sums", "result"), [(VOLTA, 0), (AMPERE, -0.5), (HOPPER, -0.75)])
def test_a_published_example(sums, result):
    """Check 2^23 - 2^23 - 0.5 - 0.25 - 0.125 (exactly -0.875) against Xie et al.'s GPU results (table 8)."""
    a, b = np.zeros((2, 1, 2 * sums.block), np.float16)
    a[0, 0], b[0, 0] = 2**13, 2**10
    a[0, sums.block : sums.block + 4] = -(2**13), 0.5, 0.25, 0.125
    b[0, sums.block : sums.block + 4] = 2**10, -1, -1, -1
    assert sums.matmul(a, b.T) == result


def test_sums_of_several_heads_and_many_rows():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 600, 24)).astype(np.float16)
    b = rng.standard_normal((3, 24, 40)).astype(np.float16)
    together = HOPPER.matmul(a, b)
    assert (together.dtype, together.shape) == (np.float32, (3, 600, 40))
    np.testing.assert_array_equal(together[1, 17:18], HOPPER.matmul(a[1, 17:18], b[1]))
    np.testing.assert_allclose(together, np.matmul(a, b, dtype=np.float32), atol=1e-5)


def test_infinity_and_nan():
    a = np.array([[np.inf, 1], [np.inf, -np.inf], [np.nan, 1], [60000, 60000]], np.float16)
    b = np.array([[1, 1], [1, 0]], np.float16)
    with np.errstate(invalid="ignore"):
        found = HOPPER.matmul(a, b)
    np.testing.assert_array_equal(
        found, [[np.inf, np.inf], [np.nan, np.nan], [np.nan, np.nan], [120000, 60000]]
    )


def device(name, is_gpu, capability="90"):
    cuda = SimpleNamespace(Device=lambda: SimpleNamespace(compute_capability=capability))
    return SimpleNamespace(dtype=np.dtype(DTYPES[name]), is_gpu=is_gpu, cupy=SimpleNamespace(cuda=cuda))


def test_which_devices_sum_on_tensor_cores(cupy):
    by_capability = {"70": VOLTA, "75": AMPERE, "80": AMPERE, "89": AMPERE, "90": HOPPER, "120": HOPPER}
    for capability, sums in by_capability.items():
        assert sums_of(device("bfloat16", True, capability)) is sums
    others = device("float32", True), device("float16", True, "61"), Device(np, np.dtype(np.float16))
    for other in others:
        assert sums_of(other) is IN_FLOAT32


# --- the stand-in's tensor cores ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("width", "spread"), [(16, 0), (16, 9), (80, 3), (576, 0), (576, 9)])
def test_mma_agrees_with_the_model(dtype, width, spread):
    dtype = np.dtype(DTYPES[dtype])
    a, b = numbers(dtype, width, spread, blocks=3)
    a[0, 3], b[2] = 0, 0
    out = np.empty((len(a), COLUMNS), np.float32)
    mma_chain(CpuCompiler(dtype), a, b, out)
    np.testing.assert_array_equal(out, HOPPER.matmul(a, b.T))


@pytest.mark.parametrize("dtype", HALVES)
def test_cublas_agrees_with_the_model(dtype, cupy):
    from minitp.cuda.arrays import Arrays

    a, b = numbers(np.dtype(DTYPES[dtype]), 576)
    found = Arrays(cupy).matmul(cupy.asarray(a), cupy.asarray(b).T, dtype=np.float32)
    np.testing.assert_array_equal(cupy.asnumpy(found), HOPPER.matmul(a, b.T))


# --- the bound ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width", "measured"), MEASURED)
def test_errors_have_the_size_measured_on_a_gpu(dtype, width, measured):
    a, b = numbers(np.dtype(DTYPES[dtype]), width, blocks=4)
    out = np.empty((len(a), COLUMNS), np.float32)
    mma_chain(CpuCompiler(a.dtype), a, b, out)
    assert relative_error(out, a.astype(float) @ b.T.astype(float)) == pytest.approx(measured, rel=0.15)


def logits(dtype, width, outputs=64):
    """Return x [16, width], w [outputs, width] and the product by `Linear`, whose 8 warps share each sum."""
    x, _ = numbers(dtype, width)
    w = np.concatenate([numbers(dtype, width, seed=seed)[1] for seed in range(outputs // COLUMNS)])
    found = np.empty((ROWS, outputs), np.float32)
    Linear(CpuCompiler(dtype)).logits(x, w, found)
    return x, w, found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [576, 4096])
def test_check_allows_errors_of_tensor_cores_but_not_larger_ones(dtype, width):
    """Check that a chain of all terms and sums of parts are within the bound, and triple the error is not."""
    x, w, in_parts = logits(np.dtype(DTYPES[dtype]), width)
    should = expected.linear(x, w, dtype=np.float32, sums=HOPPER)
    relative, absolute = should.bounds(np.float32)
    for found in (HOPPER.matmul(x, w.T), in_parts, np.matmul(x, w.T, dtype=np.float32)):
        error = difference_of(found, should.value)
        assert error.relative <= relative
        assert error.absolute <= absolute
    chain = relative_error(HOPPER.matmul(x, w.T), should.value)
    assert 2 * chain <= relative <= 2.5 * chain
    if width == 4096:
        assert expected.linear(x, w, dtype=np.float32).bounds(np.float32)[0] < chain, "a CPU's bound"
    wrong = difference_of(in_parts * np.float32(1 + 3 * chain), should.value)
    assert wrong.relative > relative


def test_the_bound_holds_for_few_sums_in_another_order():
    """Check sums of the same terms in another order, where one chain's error may happen to be tiny."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, w = (rng.standard_normal((rows, 2048)).astype(np.float16) for rows in (1, 3))
        order = rng.permutation(2048)
        should = expected.linear(x, w, dtype=np.float32, sums=HOPPER)
        capped = expected.soft_cap(should.not_recorded(np.float32), 100)  # as Gemma 2 does
        found = HOPPER.matmul(x[:, order], w[:, order].T)
        for y, exact in ((found, should), (soft_cap(np, found, 100), capped)):
            error, (relative, absolute) = difference_of(y, exact.value), exact.bounds(np.float32)
            assert error.relative <= relative
            assert error.absolute <= absolute


@pytest.mark.parametrize(("path", "dtype"), [("explicit", "bfloat16"), ("fused", "float16")])
def test_logits_of_a_wide_model_are_within_the_bound(path, dtype, tmp_path, cupy, monkeypatch):
    """Check also that they would exceed a CPU's bound."""
    shape = {
        "hidden_size": 4096,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "vocab_size": 40,
        "head_dim": 8,
    }
    directory = write_tiny(tmp_path, tokenizer=False, **shape)

    def wrong():
        def rank(comm):
            model = model_on_gpu(directory, comm, dtype, path=path)
            return check_model(open_model(str(directory), 1), model, [3, 1, 4, 15, 9, 2, 6], 0)

        return [finding.name for finding in run_on_gpus(1, rank)[0].blamed()]

    assert wrong() == []
    monkeypatch.setattr("minitp.check.rank.sums_of", lambda device: IN_FLOAT32)
    assert wrong() == ["prefill/logits_partial", "prefill.1/logits_partial"]


@pytest.mark.parametrize(("dtype", "sums"), [("bfloat16", HOPPER), ("float32", IN_FLOAT32)])
def test_scores_and_logits_are_summed_as_on_the_device(tiny, cupy, monkeypatch, dtype, sums):
    """Check the arguments, because sums of few terms have similar errors on all devices."""
    used, scores, linear = [], expected.scores, expected.linear

    def observed_scores(*arguments):
        used.append(arguments[-1])
        return scores(*arguments)

    def observed_linear(*arguments, **options):
        if options.get("dtype") == np.float32:
            used.append(options["sums"])
        return linear(*arguments, **options)

    monkeypatch.setattr(expected, "scores", observed_scores)
    monkeypatch.setattr(expected, "linear", observed_linear)

    def rank(comm):
        model = model_on_gpu(tiny, comm, dtype, path="explicit")
        return check_model(open_model(str(tiny), 1), model, [3, 1, 4], 0).ok

    assert run_on_gpus(1, rank) == [True]
    # Three passes: the prompt, and its two chunks, of which only the second has logits.
    assert used == [sums] * (3 * 2 + 2), "the scores of two layers, and the logits"


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits_hides_how_a_result_was_summed(dtype):
    """Check sums of 14336 terms; so for 16-bit results `check` may sum as on a CPU."""
    a, b = numbers(np.dtype(DTYPES[dtype]), 14336, blocks=2)
    plain, truncated = (expected.linear(a, b, sums=sums).bounds(a.dtype) for sums in (IN_FLOAT32, HOPPER))
    assert truncated == pytest.approx(plain, rel=0.05)
