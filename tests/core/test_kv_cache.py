"""Tests of the KV caches: paged and contiguous ones agree, and smaller dtypes lose no more than they must."""

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
CLOSE = 1e-5  # relative to the largest logit: sums of up to 48 float32 terms in another order, in 2 layers
LENGTHS = [
    (5, 1, 1, 9, 1),
    (1, 1, 14, 1, 1),
    (17, 1, 3, 1, 1),
]  # tokens per pass, for each of three sequences


def passes():
    """Return the token ids of each sequence, for each pass."""
    rng = np.random.default_rng(1)
    return [[rng.integers(0, 256, n).tolist() for n in lengths] for lengths in zip(*LENGTHS, strict=True)]


@pytest.mark.parametrize("kv_dtype", ["auto", "float16", "int8"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_paged_and_contiguous_caches_return_the_same_bits(block_size, kv_dtype):
    """Three sequences grow in one pool, with their blocks in random order."""
    rng, dtype = np.random.default_rng(0), np.dtype(np.float32)
    pool = BlockPool(np, dtype, 2, 3, 8, blocks=90, block_size=block_size, kv_dtype=kv_dtype)
    paged = [PagedCache(pool, []) for _ in LENGTHS]
    contiguous = [KVCache(np, dtype, 2, 3, 8, kv_dtype=kv_dtype) for _ in LENGTHS]
    free = rng.permutation(90).tolist()
    for number in range(len(LENGTHS[0])):
        for cache, reference, lengths in zip(paged, contiguous, LENGTHS, strict=True):
            n = lengths[number]
            grow(cache, n, free)
            first = int(rng.integers(0, cache.length + 1))
            for layer in range(2):
                k, v = rng.standard_normal((2, 3, n, 8)).astype(np.float32)
                actual = cache.append(layer, k, v, first)
                expected = reference.append(layer, k, v, first)
                assert np.array_equal(actual[0], expected[0])
                assert np.array_equal(actual[1], expected[1])
            cache.advance(n)
            reference.advance(n)


def grow(cache, tokens, free):
    """Give a PagedCache enough blocks for `tokens` more positions."""
    while len(cache.block_table) * cache.pool.block_size < cache.length + tokens:
        cache.block_table.append(free.pop())


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("shape", "tp"), [("plain", 1), ("plain", 3), ("window", 2), ("uneven", 4)])
def test_a_model_with_paged_caches(tmp_path, shape, tp, block_size):
    """The logits are close but not equal: BLAS may add in another order if arrays are aligned differently."""
    source = open_model(str(write_tiny(tmp_path, **SHAPES[shape])), tp)

    def rank(comm):
        model = load_model(source, comm, open_device("float32"))
        pool = model.new_pool(blocks=90, block_size=block_size)
        for pair in pool.storage[0]:
            pair.values[:] = 55  # earlier contents of a block must not matter
        free = np.random.default_rng(0).permutation(90).tolist()
        paged, contiguous = [PagedCache(pool, []) for _ in LENGTHS], [model.new_cache() for _ in LENGTHS]
        results = []
        for tokens in passes():
            for ids, cache in zip(tokens, paged, strict=True):
                grow(cache, len(ids), free)
            results.append(
                [
                    model.forward_batch(list(zip(tokens, caches, strict=True)), logits_at=slice(None))
                    for caches in (paged, contiguous)
                ]
            )
        return results

    for actual, expected in run_threads(tp, rank)[0]:
        np.testing.assert_allclose(actual, expected, rtol=CLOSE, atol=CLOSE * np.abs(expected).max())


def test_two_sequences_share_full_blocks(tmp_path):
    """The second sequence begins with two full blocks of the first, and continues in its own blocks."""
    model = load_model(open_model(str(write_tiny(tmp_path)), 1), SingleRank(), open_device("float32"))
    pool, ids = model.new_pool(blocks=8, block_size=4), list(range(40, 54))
    model.forward(ids[:11], PagedCache(pool, [5, 2, 7]))
    before = [storage.values.copy() for pair in pool.storage for storage in pair]
    second = PagedCache(pool, [5, 2, 0, 1], length=8)
    logits = model.forward(ids[8:], second, logits_at=slice(None))
    whole = model.forward(ids, model.new_cache(), logits_at=slice(8, None))
    # The first 8 tokens went through products with another number of rows, which BLAS adds in another order.
    np.testing.assert_allclose(logits, whole, rtol=CLOSE, atol=CLOSE * np.abs(whole).max())
    storages = [storage for pair in pool.storage for storage in pair]
    for storage, old_values in zip(storages, before, strict=True):
        for block in (5, 2, 7):
            slots = slice(4 * block, 4 * block + 4)
            assert np.array_equal(storage.values[:, slots], old_values[:, slots], equal_nan=True)


def test_a_position_without_a_block_is_rejected():
    cache = PagedCache(BlockPool(np, np.float32, 1, 2, 4, blocks=3, block_size=4), [1])
    with pytest.raises(IndexError, match=r"position 4 has no slot: the block table has only 4 slots"):
        cache.append(0, np.zeros((2, 5, 4), np.float32), np.zeros((2, 5, 4), np.float32))


def random_heads(n, scale=1.0, dtype=np.float32):
    """Return random keys or values of two heads, [2, n, 8]."""
    return (scale * np.random.default_rng(n).standard_normal((2, n, 8))).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_int8_errors_are_at_most_half_a_quantum(dtype, scale):
    """A quantum is 1/127 of a head's largest element; the bound also allows for rounding to the dtype."""
    cache = KVCache(np, np.dtype(dtype), 1, 2, 8, kv_dtype="int8")
    k, v = random_heads(9, scale, dtype), random_heads(7, scale, dtype)[:, [0, 1, 2, 3, 4, 5, 6, 6, 6]]
    k[:, :, 0] *= 50  # an outlier in each key
    for x, stored in zip((k, v), cache.append(0, k, v), strict=True):
        assert stored.dtype == dtype
        x, stored = x.astype(np.float64), stored.astype(np.float64)
        largest = np.abs(x).max(axis=-1, keepdims=True)
        rounding = 0.5 * ml_dtypes.finfo(dtype).eps * largest
        assert (np.abs(stored - x) <= largest / 254 * (1 + 1e-6) + 2 * rounding).all()
        assert (np.abs(stored - x) > largest / 1000).any(), "no rounding to int8 has taken place"


def test_int8_keeps_zeros():
    cache = KVCache(np, np.dtype(np.float32), 1, 2, 8, kv_dtype="int8")
    for stored in cache.append(0, np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32)):
        assert (stored == 0).all()


def test_float16_rounds_once():
    cache = KVCache(np, np.dtype(np.float32), 1, 2, 8, kv_dtype="float16")
    k, v = random_heads(5), random_heads(6)[:, :5]
    stored = cache.append(0, k, v)
    assert np.array_equal(stored[0], k.astype(np.float16).astype(np.float32))
    assert np.array_equal(stored[1], v.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("kv_dtype", "bytes_per_head"), [("auto", 8 * 4), ("float16", 8 * 2), ("int8", 8 + 4)]
)
def test_a_growing_cache_keeps_its_contents(kv_dtype, bytes_per_head):
    x = random_heads(20)
    small, large = (KVCache(np, np.dtype(np.float32), 1, 2, 8, n, kv_dtype) for n in (1, 20))
    assert large.nbytes == 2 * 2 * 20 * bytes_per_head  # keys and values, 2 heads, 20 positions
    for start, stop in ((0, 1), (1, 4), (4, 5), (5, 20)):
        results = []
        for cache in (small, large):
            results.append(cache.append(0, x[:, start:stop], -x[:, start:stop], first=min(start, 3)))
            cache.advance(stop - start)
        for grown, reserved in zip(*results, strict=True):
            assert grown.shape == (2, stop - min(start, 3), 8)
            assert np.array_equal(grown, reserved)


def test_kv_dtype_of_the_command(tmp_path):
    """A smaller cache dtype changes the perplexity a little, and float16 less than int8."""
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
