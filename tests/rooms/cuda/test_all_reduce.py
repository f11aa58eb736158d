"""Tests of all_reduce.cu, run on the CPU: ranks are processes, and their regions are shared memory."""

import mmap
import multiprocessing
import time

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.comm.base import _sum_in_rank_order
from minitp.cuda.kernels.all_reduce import AllReduce, region_bytes

DTYPES = (np.float16, ml_dtypes.bfloat16)
EPS = 1e-5


class Host:
    """Memory shared by ranks, which are forked from this process and run a function.

    Attributes
    ----------
    regions : uint64 [ranks]
    missing : int32 [ranks, 1]
    """

    def __init__(self, dtype, ranks, max_rows, width, patience_s=20.0):
        self.dtype, self.ranks, self.max_rows, self.width = dtype, ranks, max_rows, width
        self.patience_s = patience_s
        self._memory = [shared((region_bytes(ranks, max_rows, width),), np.uint8) for _ in range(ranks)]
        self.regions = np.array([m.__array_interface__["data"][0] for m in self._memory], np.uint64)
        self.missing = shared((ranks, 1), np.int32)
        self._all_reduce(0)  # compiles it once

    def run(self, function, ranks=None):
        """Run function(rank, all_reduce) in one process per rank; all must exit with 0."""
        fork = multiprocessing.get_context("fork")
        ranks = range(self.ranks) if ranks is None else ranks
        processes = [fork.Process(target=lambda r=r: function(r, self._all_reduce(r))) for r in ranks]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout=30)
            assert [process.exitcode for process in processes] == [0] * len(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()

    def _all_reduce(self, rank):
        calls = np.zeros(self.max_rows, np.uint64)
        compiler = CpuCompiler(self.dtype)
        missing = self.missing[rank]
        return AllReduce(compiler, rank, self.regions, calls, missing, self.width, self.patience_s)


def shared(shape, dtype):
    """Return zeros that later forked processes share."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype, size).reshape(shape)


def results(shape, dtype):
    """Return NaNs that later forked processes share."""
    array = shared(shape, dtype)
    array[...] = np.nan
    return array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 1, 8), (3, 3, 8), (4, 3, 4096), (2, 2, 576)])
def test_sums_are_the_same_bits_on_all_ranks(dtype, ranks, rows, width):
    calls = 30
    host = Host(dtype, ranks, rows + 1, width)
    partial = np.random.default_rng(0).normal(size=(calls, ranks, rows, width)).astype(dtype)
    partial[0] = -0.0
    partial[1::2, 1:-1] *= dtype(2**-12)  # the order of the sum decides whether these are lost
    partial[1::2, -1] = -(partial[1::2, 0] * dtype(2**12))
    partial[1::2, 0] *= dtype(2**12)
    out = results((ranks, calls, rows, width), dtype)
    used = [rows if call % 3 else 1 for call in range(calls)]  # some blocks skip a call

    def work(rank, all_reduce):
        time.sleep(0.05 * rank)
        for call, n in enumerate(used):
            all_reduce(partial[call, rank, :n], out[rank, call, :n])

    host.run(work)
    for call, n in enumerate(used):
        expected = _sum_in_rank_order(list(partial[call, :, :n]))  # [n, D]
        for rank in range(ranks):
            np.testing.assert_array_equal(bits(out[rank, call, :n]), bits(expected))
            assert np.isnan(out[rank, call, n:]).all()
    assert not host.missing.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 3, 8), (4, 1, 4096), (3, 2, 576)])
def test_residual_and_norm(dtype, biased, ranks, rows, width):
    layers = 6
    draw = np.random.default_rng(1)
    host = Host(dtype, ranks, rows, width)
    partial = draw.normal(size=(layers, ranks, rows, width)).astype(dtype)
    weight, bias = draw.normal(size=(2, layers, width)).astype(dtype)  # [layers, D] each
    start = draw.normal(size=(rows, width)).astype(dtype)
    residual, normed = (results((ranks, layers, rows, width), dtype) for _ in range(2))

    def work(rank, all_reduce):
        x = start.copy()  # [T, D]
        for layer in range(layers):
            added = bias[layer] if biased else None
            all_reduce.add_and_norm(
                partial[layer, rank], x, weight[layer], normed[rank, layer], EPS, bias=added
            )
            residual[rank, layer] = x

    host.run(work)
    x = start
    for layer in range(layers):
        out = _sum_in_rank_order(list(partial[layer]))  # [T, D]
        x = x + (out + bias[layer] if biased else out)  # [T, D]
        expected = ops.rms_norm(np, x, weight[layer], EPS)  # [T, D]
        for rank in range(ranks):
            np.testing.assert_array_equal(bits(residual[rank, layer]), bits(x))
            np.testing.assert_array_equal(bits(normed[rank, layer]), bits(normed[0, layer]))
        # The kernel sums in another order, so the rms may differ by a float32 rounding, and a value near a
        # tie may round to the other side.
        close = np.finfo(np.float16).eps if dtype == np.float16 else 2**-7
        found = normed[0, layer].astype(np.float32)  # [T, D]
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2 * close)
        assert (normed[0, layer] == expected).mean() > 0.99


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_calls_with_a_different_rank_late_each_time(ranks):
    calls, width = 150, 256
    host = Host(np.float16, ranks, 1, width)
    terms = np.arange(1, ranks + 1)[None, :] + np.arange(calls)[:, None]  # [calls, ranks]: all sums differ
    out = results((ranks, calls, 1, width), np.float16)

    def work(rank, all_reduce):
        for call in range(calls):
            if call % 10 == rank:
                time.sleep(0.003)
            all_reduce(np.full((1, width), terms[call, rank], np.float16), out[rank, call])

    host.run(work)
    np.testing.assert_array_equal(out, np.broadcast_to(terms.sum(1)[None, :, None, None], out.shape))


def test_many_replays_with_random_delays(monkeypatch):
    """Check sums of 1 to 64 rows while every rank sleeps at random around each access to a flag.

    A rank that does not wait for another one, or a slot that is written too early, changes a sum.
    """
    monkeypatch.setenv("CUDA_ON_CPU_DELAY", "200")
    replays, ranks, most_rows, width = 40, 3, 64, 16
    host = Host(np.float16, ranks, most_rows, width)
    rows = np.random.default_rng(2).choice([1, 1, 2, 3, 8, most_rows], replays)
    terms = np.arange(1, ranks + 1)[None, :] + np.arange(replays)[:, None]  # [replays, ranks]
    shape = (ranks, replays, most_rows, width)
    out, residual = results(shape, np.float16), results(shape, np.float16)

    def work(rank, all_reduce):
        sleep, ones = np.random.default_rng(rank), np.ones((most_rows, width), np.float16)
        for replay, n in enumerate(rows):
            time.sleep(sleep.choice([0, 0, 0, 0.001]))
            partial = np.full((n, width), terms[replay, rank], np.float16) * ones[:n]
            partial += np.arange(n, dtype=np.float16)[:, None]  # another value in each row
            all_reduce(partial, out[rank, replay, :n])
            residual[rank, replay, :n] = 0
            all_reduce.add_and_norm(partial, residual[rank, replay, :n], ones[0], ones[:n].copy(), EPS)

    host.run(work)
    for replay, n in enumerate(rows):
        expected = terms[replay].sum() + ranks * np.arange(n)[None, :, None]
        np.testing.assert_array_equal(out[:, replay, :n] - expected, 0)
        np.testing.assert_array_equal(residual[:, replay, :n] - expected, 0)
    assert not host.missing.any()


@pytest.mark.parametrize("absent", [0, 2])
def test_a_missing_rank_is_named(absent):
    rows, width, patience_s = 2, 64, 1.0
    host = Host(np.float16, 3, rows, width, patience_s)
    others = [rank for rank in range(3) if rank != absent]
    out, normed = (results((3, 3, rows, width), np.float16) for _ in range(2))
    seconds = shared((3, 3), np.float64)

    def work(rank, all_reduce):
        ones, x = np.ones((2, rows, width), np.float16)  # [T, D] each
        for call in range(3):
            started = time.perf_counter()
            if call < 2:
                all_reduce(ones, out[rank, call])
            else:
                all_reduce.add_and_norm(ones, x, ones[0], normed[rank, call], EPS)
            seconds[rank, call] = time.perf_counter() - started
            if call == 0 and rank == absent:
                return

    host.run(work)  # the absent rank takes part in the first call only
    for rank in others:
        assert host.missing[rank, 0] == 1 + absent
        np.testing.assert_array_equal(out[rank, 0], 3)
        assert np.isnan(out[rank, 1]).all()
        assert np.isnan(normed[rank]).all()
        assert patience_s < seconds[rank, 1] < 2 * patience_s  # both rows wait at the same time
        assert seconds[rank, 2] < patience_s / 2


def test_too_many_rows_and_a_wrong_width_are_rejected():
    host = Host(np.float16, 2, 2, 64)
    with pytest.raises(ValueError, match="3 rows"):
        host._all_reduce(0)(np.zeros((3, 64), np.float16), np.zeros((3, 64), np.float16))
    with pytest.raises(ValueError, match="rows of 12"):
        AllReduce(CpuCompiler(np.float16), 0, host.regions, np.zeros(2, np.uint64), host.missing[0], 12)


def bits(x):
    return x.view(np.uint16)
