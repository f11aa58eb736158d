"""Tests of attention_decode.cu, run on the CPU, against the explicit operations of attention."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.attention_decode import AttentionDecode

F16, BF16 = np.float16, ml_dtypes.bfloat16
DTYPES = (F16, BF16)
PADDING = 4  # columns of out after the last head


class Case:
    """A batch over a paged cache in which everything that no query may read is NaN."""

    def __init__(self, dtype, lengths, groups, head_dim, block_size=16, window=None):
        draw = np.random.default_rng(head_dim + sum(lengths))
        self.block_size, self.window = block_size, window
        stops = np.cumsum(groups).tolist()
        self.groups = list(zip([0, *stops[:-1]], stops, strict=True))
        self.lengths = np.array(lengths, np.int32)  # [B]
        self.q = draw.normal(size=(len(lengths), stops[-1], head_dim)).astype(dtype)  # [B, H, d]
        counts = [-(-length // block_size) for length in lengths]
        # Block 0 belongs to no sequence; the unused ends of tables point there.
        self.block_table = np.zeros((len(lengths), max(counts) + 1), np.int32)  # [B, max_blocks]
        free = draw.permutation(sum(counts)) + 1
        for row, count in zip(self.block_table, counts, strict=True):
            row[:count], free = free[:count], free[count:]
        if len(lengths) > 1:  # the last two sequences share a prefix
            shared = min(counts[-2:]) // 2
            self.block_table[-1, :shared] = self.block_table[-2, :shared]
        slots = (1 + sum(counts)) * block_size
        self.k, self.v = np.full((2, len(groups), slots, head_dim), np.nan, dtype)  # [K, slots, d] each
        for b in range(len(lengths)):
            seen = self.seen(b)
            for cache in (self.k, self.v):
                cache[:, seen] = draw.normal(size=cache[:, seen].shape).astype(dtype)

    def seen(self, b):
        """Return the slots of a sequence's visible keys, int [W]."""
        length = self.lengths[b]
        positions = np.arange(max(0, length - self.window) if self.window else 0, length)
        blocks = self.block_table[b, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def launcher(self, processors, max_context=None, has_clusters=False):
        dtype, (batch, _, head_dim) = self.q.dtype, self.q.shape
        context = max_context or int(self.lengths.max())
        shape = (self.groups, head_dim, self.block_size, batch, context, processors, self.window)
        return AttentionDecode(CpuCompiler(dtype, has_clusters), np, *shape)

    def run(self, launcher):
        batch, heads, head_dim = self.q.shape
        out = np.full((batch, heads * head_dim + PADDING), np.nan, self.q.dtype)
        launcher(self.q, self.k, self.v, self.block_table, self.lengths, out)
        assert np.isnan(out[:, -PADDING:]).all()
        return out[:, :-PADDING]

    def check(self, out):
        """Compare with the explicit operations, within two roundings each.

        Both round the values' weights to 16 bits (the kernel before dividing by their sum, the operations
        after it), and then the result. Each rounding is at most half an eps of the mean of the values'
        magnitudes.
        """
        eps = float(ml_dtypes.finfo(out.dtype).eps)
        for b, length in enumerate(self.lengths):
            if length == 0:
                np.testing.assert_array_equal(out[b], 0)
                continue
            k, v = self.k[:, self.seen(b)], self.v[:, self.seen(b)]  # [K, W, d] each
            scores = ops.attention_scores(np, self.q[b][:, None], k, self.groups)  # [H, 1, W]
            probs = ops.softmax(np, scores)  # [H, 1, W]
            expected = ops.attention_context(np, probs, v, self.groups)[0].astype(np.float32)  # [H d]
            v32 = np.abs(v.astype(np.float32))
            magnitude = ops.attention_context(np, probs, v32, self.groups)[0]  # [H d]
            error = np.abs(out[b].astype(np.float32) - expected)
            assert (error <= 2 * eps * magnitude).all(), (b, (error / magnitude).max() / eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 5])
@pytest.mark.parametrize("processors", [1, 24, 48])
def test_lengths(dtype, block_size, processors):
    lengths = [1, 2, 15, 16, 17, 0, 63, 64, 65, 128, 129, 200]
    case = Case(dtype, lengths, (1, 2), 24, block_size)
    launcher = case.launcher(processors)
    assert launcher.splits(len(lengths)) == {1: 1, 24: 2, 48: 4}[processors]
    case.check(case.run(launcher))


@pytest.mark.parametrize("window", [1, 39, 40, 41, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_window(dtype, window):
    case = Case(dtype, [40, 150, 1], (3, 1), 24, 16, window)
    case.check(case.run(case.launcher(132)))


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(F16, 8), (BF16, 24), (F16, 64), (BF16, 80), (F16, 128), (BF16, 128), (BF16, 256)]
)
@pytest.mark.parametrize("groups", [(1, 2), (3, 1), (8,), (4, 4)])
def test_heads(dtype, head_dim, groups):
    case = Case(dtype, [70, 5], groups, head_dim)
    case.check(case.run(case.launcher(132)))


@pytest.mark.parametrize("groups", [(9,), (3, 20)])
def test_groups_with_more_heads_than_a_block_computes(groups):
    case = Case(F16, [70, 0, 7], groups, 24)
    case.check(case.run(case.launcher(132)))


def test_a_second_launch_gives_the_same_bits():
    case = Case(F16, [300, 0, 65, 10], (2, 1), 64)
    launcher = case.launcher(132)
    first = case.run(launcher)
    case.check(first)
    assert not launcher._counters.any()
    np.testing.assert_array_equal(case.run(launcher), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("processors", "splits", "cluster"), [(8, 2, 2), (32, 8, 8), (96, 24, 8)])
def test_clusters(dtype, processors, splits, cluster):
    """Check with one cluster and with several, of which some or some blocks have no keys."""
    case = Case(dtype, [1500, 700, 0, 65], (1, 2), 24)
    launcher = case.launcher(processors, has_clusters=True)
    assert (launcher.splits(4), launcher.cluster(4)) == (splits, cluster)
    first = case.run(launcher)
    case.check(first)
    assert not launcher._counters.any()
    np.testing.assert_array_equal(case.run(launcher), first)


PROCESSORS = 132  # of an H100 or H200


@pytest.mark.parametrize("has_clusters", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])  # Llama 3 8B and Mistral 7B, whole and with TP=4
def test_long_contexts_fill_every_wave(kv_heads, has_clusters):
    """Check the blocks of 16,384 keys without a window; docs/performance.md states them."""
    launcher = Case(F16, [1], (4,) * kv_heads, 8).launcher(PROCESSORS, 16384, has_clusters)
    for batch in (1, 2, 4, 8, 16, 32, 64):
        splits = launcher.splits(batch)
        blocks, slots = splits * kv_heads * batch, 2 * PROCESSORS
        assert blocks / slots > 0.95 * -(-blocks // slots)  # the last wave is as full as the others
        assert blocks <= 2 * slots
        assert splits % launcher.cluster(batch) == 0


def test_splits_fill_the_gpu_but_are_not_too_small():
    case = Case(F16, [1], (4,) * 8, 8)
    launcher = case.launcher(PROCESSORS, 32768)
    assert [launcher.splits(batch) for batch in (1, 2, 8, 33, 64)] == [32, 16, 4, 1, 1]
    assert case.launcher(PROCESSORS, 1000).splits(1) == 16  # 64 keys each
