"""The caches: paged and contiguous hold the same, and what smaller dtypes lose is what they must."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from tiny import write_tiny

from minitp.comm import run_threads
from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.kv_cache import KVCache
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.paged_cache import BlockPool, PagedCache

SHAPES = {
    "plain": {},
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "uneven": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
}
CLOSE = 1e-5  # of the largest logit: sums of at most 48 float32 terms in another order, over two layers
LENGTHS = [(5, 1, 1, 9, 1), (1, 1, 14, 1, 1), (17, 1, 3, 1, 1)]  # tokens of each step, of three sequences


def steps():
    """For each step the tokens of each sequence."""
    rng = np.random.default_rng(1)
    return [[rng.integers(0, 256, n).tolist() for n in step] for step in zip(*LENGTHS, strict=True)]


@pytest.mark.parametrize("kv_dtype", ["auto", "float16", "int8"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_paged_reads_what_contiguous_reads(block_size, kv_dtype):
    """Three sequences whose blocks lie in disorder in one pool, and grow as they go: bit for bit."""
    rng, dtype = np.random.default_rng(0), np.dtype(np.float32)
    pool = BlockPool(np, dtype, 2, 3, 8, blocks=90, block_size=block_size, kv_dtype=kv_dtype)
    paged = [PagedCache(pool, []) for _ in LENGTHS]
    contiguous = [KVCache(np, dtype, 2, 3, 8, kv_dtype=kv_dtype) for _ in LENGTHS]
    free = rng.permutation(90).tolist()
    for step in range(len(LENGTHS[0])):
        for sequence, lengths in enumerate(LENGTHS):
            mine, other, n = paged[sequence], contiguous[sequence], lengths[step]
            grow(mine, n, free)
            first = int(rng.integers(0, mine.length + 1))
            for layer in range(2):
                k, v = rng.standard_normal((2, 3, n, 8)).astype(np.float32)
                for a, b in zip(
                    mine.append(layer, k, v, first), other.append(layer, k, v, first), strict=True
                ):
                    assert np.array_equal(a, b)
            mine.advance(n)
            other.advance(n)


def grow(cache, tokens, free):
    """Give a PagedCache blocks for so many more positions."""
    while len(cache.block_table) * cache.pool.block_size < cache.length + tokens:
        cache.block_table.append(free.pop())


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("shape", "tp"), [("plain", 1), ("plain", 3), ("window", 2), ("uneven", 4)])
def test_a_model_with_paged_caches(tmp_path, shape, tp, block_size):
    """The same logits, but for BLAS, which sums in another order where an array begins elsewhere."""
    source = open_model(str(write_tiny(tmp_path, **SHAPES[shape])), tp)

    def rank(comm):
        model = load_model(source, comm, open_device("float32"))
        pool = model.new_pool(blocks=90, block_size=block_size)
        for pair in pool.storage[0]:
            pair.values[:] = 55  # what a block held before must not matter
        free = np.random.default_rng(0).permutation(90).tolist()
        paged, contiguous = [PagedCache(pool, []) for _ in LENGTHS], [model.new_cache() for _ in LENGTHS]
        results = []
        for tokens in steps():
            for ids, cache in zip(tokens, paged, strict=True):
                grow(cache, len(ids), free)
            results.append(
                [
                    model.forward_batch(list(zip(tokens, caches, strict=True)), logits_at=slice(None))
                    for caches in (paged, contiguous)
                ]
            )
        return results

    for mine, expected in run_threads(tp, rank)[0]:
        np.testing.assert_allclose(mine, expected, rtol=CLOSE, atol=CLOSE * np.abs(expected).max())


def test_shared_blocks_hold_what_the_first_sequence_wrote(tmp_path):
    """A second sequence begins with two full blocks of the first, and goes on in its own."""
    model = load_model(open_model(str(write_tiny(tmp_path)), 1), SingleRank(), open_device("float32"))
    pool, ids = model.new_pool(blocks=8, block_size=4), list(range(40, 54))
    model.forward(ids[:11], PagedCache(pool, [5, 2, 7]))
    before = [rows.values.copy() for pair in pool.storage for rows in pair]
    second = PagedCache(pool, [5, 2, 0, 1], length=8)
    logits = model.forward(ids[8:], second, logits_at=slice(None))
    whole = model.forward(ids, model.new_cache(), logits_at=slice(8, None))
    # The first 8 went through products of other row counts, which sum in another order: see test_batch.
    np.testing.assert_allclose(logits, whole, rtol=CLOSE, atol=CLOSE * np.abs(whole).max())
    for rows, was in zip((rows for pair in pool.storage for rows in pair), before, strict=True):
        for block in (5, 2, 7):
            here = slice(4 * block, 4 * block + 4)
            assert np.array_equal(rows.values[:, here], was[:, here], equal_nan=True)


def test_a_position_without_a_block_is_an_error():
    cache = PagedCache(BlockPool(np, np.float32, 1, 2, 4, blocks=3, block_size=4), [1])
    with pytest.raises(IndexError, match=r"position 4 has no slot: the block table has 1 \* 4 slots"):
        cache.append(0, np.zeros((2, 5, 4), np.float32), np.zeros((2, 5, 4), np.float32))


def some(n, scale=1.0, dtype=np.float32):
    return (scale * np.random.default_rng(n).standard_normal((2, n, 8))).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_int8_is_off_by_half_a_step_at_most(dtype, scale):
    """A step is 1/127 of the largest element of a position and head; the rest is rounding of dtype."""
    cache = KVCache(np, np.dtype(dtype), 1, 2, 8, kv_dtype="int8")
    k, v = some(9, scale, dtype), some(7, scale, dtype)[:, [0, 1, 2, 3, 4, 5, 6, 6, 6]]
    k[:, :, 0] *= 50  # an outlier in each
    for x, kept in zip((k, v), cache.append(0, k, v), strict=True):
        assert kept.dtype == dtype
        x, kept = x.astype(np.float64), kept.astype(np.float64)
        largest = np.abs(x).max(axis=-1, keepdims=True)
        rounding = 0.5 * ml_dtypes.finfo(dtype).eps * largest
        assert (np.abs(kept - x) <= largest / 254 * (1 + 1e-6) + 2 * rounding).all()
        assert (np.abs(kept - x) > largest / 1000).any(), "nothing is lost: then it is no int8"


def test_int8_of_zeros_is_zeros():
    cache = KVCache(np, np.dtype(np.float32), 1, 2, 8, kv_dtype="int8")
    for kept in cache.append(0, np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32)):
        assert (kept == 0).all()


def test_float16_is_one_rounding():
    cache = KVCache(np, np.dtype(np.float32), 1, 2, 8, kv_dtype="float16")
    k, v = some(5), some(6)[:, :5]
    kept = cache.append(0, k, v)
    assert np.array_equal(kept[0], k.astype(np.float16).astype(np.float32))
    assert np.array_equal(kept[1], v.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("kv_dtype", "each"), [("auto", 8 * 4), ("float16", 8 * 2), ("int8", 8 + 4)])
def test_a_cache_that_grows_keeps_everything(kv_dtype, each):
    """And takes the bytes that it says: `each` is a position of a head."""
    x = some(20)
    small, large = (KVCache(np, np.dtype(np.float32), 1, 2, 8, n, kv_dtype) for n in (1, 20))
    assert large.nbytes == 2 * 2 * 20 * each
    for start, stop in ((0, 1), (1, 4), (4, 5), (5, 20)):
        found = []
        for cache in (small, large):
            found.append(cache.append(0, x[:, start:stop], -x[:, start:stop], first=min(start, 3)))
            cache.advance(stop - start)
        for grown, reserved in zip(*found, strict=True):
            assert grown.shape == (2, stop - min(start, 3), 8)
            assert np.array_equal(grown, reserved)


def test_kv_dtype_of_the_command(tmp_path):
    """A smaller cache changes the numbers, a little; float16 less than int8."""
    model, text = write_tiny(tmp_path / "model", seed=3), tmp_path / "text"
    text.write_text("It was the best of times, it was the worst of times." * 3)
    values = []
    for kv_dtype in ("auto", "float16", "int8"):
        argv = ["perplexity", text, "--json", "--tp", "1", "--model", model, "--kv-dtype", kv_dtype]
        command = [sys.executable, "-m", "minitp", *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        values.append(json.loads(done.stdout)["perplexity"])
    exact, half, quarter = values
    assert 0 < abs(half - exact) < abs(quarter - exact) < 0.02 * exact
