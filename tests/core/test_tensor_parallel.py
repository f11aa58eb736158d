"""Tests of N ranks against one rank, equal where sums are exact and close elsewhere, and of the collectives.

The ranks are threads of this process.
"""

import itertools
import threading
import time
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from tiny import UNEVEN

from minitp import ops
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.errors import AgreedError, InputError, RankError
from minitp.generate import prefill
from minitp.loading.config import parse_config
from minitp.loading.random_weights import RandomWeights
from minitp.loading.weights import Loader
from minitp.model import Model
from minitp.oracle import Oracle
from minitp.shard import make_plan
from minitp.util.shares import split_evenly

SIZES = range(2, 10)


def run_ranks(tp, function, seconds=30):
    """Call run_threads(tp, function), and fail if it takes longer than `seconds`."""
    outcome = []

    def run():
        try:
            outcome.append((run_threads(tp, function), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"the ranks are not done after {seconds} s"
    results, error = outcome[0]
    if error is not None:
        raise error
    return results


def same_bits(arrays):
    return len({(array.shape, array.dtype, array.tobytes()) for array in arrays}) == 1


# --- products of small integers, whose sums are exact ---------------------------------------------------


def integers(*shape):
    """Return float32 integers from -3 to 3: sums of a hundred products stay below 2^24, so they are exact."""
    return np.random.default_rng(shape).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("columns", [3, 18, 37])  # sometimes fewer than ranks, and seldom a multiple of them
def test_concatenated_column_parallel_slices_equal_the_product(tp, columns):
    x, w, bias = integers(5, 64), integers(64, columns), integers(columns)
    whole = ops.column_parallel(np, x, w, bias)
    ranges = split_evenly(columns, tp)

    def rank_part(comm):
        own = slice(*ranges[comm.rank])
        y_r = ops.column_parallel(np, x, w[:, own], bias[own])
        return comm.all_gather(y_r, [stop - start for start, stop in ranges])

    assert same_bits([whole, *run_ranks(tp, rank_part)])


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("rows", [3, 18, 37])
def test_summed_row_parallel_terms_equal_the_product(tp, rows):
    x, w = integers(5, rows), integers(rows, 64)
    whole = ops.row_parallel(np, x, w)
    ranges = split_evenly(rows, tp)

    def rank_part(comm):
        own = slice(*ranges[comm.rank])
        return comm.all_reduce(ops.row_parallel(np, x[:, own], w[own]))

    assert same_bits([whole, *run_ranks(tp, rank_part)])


def test_row_parallel_terms_may_be_added_in_any_order():
    x, w = integers(4, 9), integers(9, 8)
    terms = [ops.row_parallel(np, x[:, slice(*own)], w[slice(*own)]) for own in split_evenly(9, 4)]
    sums = [sum(order[1:], start=order[0]) for order in itertools.permutations(terms)]
    assert same_bits([ops.row_parallel(np, x, w), *sums])


def test_a_column_parallel_and_a_row_parallel_product_need_one_all_reduce():
    """The columns that a rank computes in the first product are the inputs of its rows in the second."""
    x, first, second = integers(2, 8), integers(8, 10), integers(10, 6)

    def rank_part(comm):
        own = slice(*split_evenly(10, comm.size)[comm.rank])
        return comm.all_reduce(ops.row_parallel(np, ops.column_parallel(np, x, first[:, own]), second[own]))

    assert same_bits([run_ranks(n, rank_part)[0] for n in (1, 2, 3, 4, 7)])


# --- the whole model ------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", **UNEVEN, "attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
    "few columns": {**LLAMA, "intermediate_size": 3, "num_key_value_heads": 1},
    "few tokens": {**LLAMA, "vocab_size": 3},
    "few tokens, tied": {**LLAMA, "vocab_size": 3, "tie_word_embeddings": True},
    "window": {"model_type": "mistral", **UNEVEN, "sliding_window": 5},
}
every_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 101, 14)]


def tokens_of(fields):
    """Return TOKENS, or as many tokens of a smaller vocabulary."""
    return [token % fields["vocab_size"] for token in TOKENS]


# The logits are about 1, and each goes through some ten sums of 20 to 54 float32 products, so roundings of
# 1e-7 add up to a few 1e-6. A head, column or position in the wrong place changes a logit by at least 0.01.
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_source(fields):
    """Return the config and the random weights of a model."""
    config = parse_config(fields, "config.json")
    tensors = make_plan(config, 1).tensors
    return config, RandomWeights({name: shard.shape for name, shard in tensors.items()}, seed=1)


def make_model(fields, comm, dtype="float32"):
    config, source = make_source(fields)
    plan, device = make_plan(config, comm.size), open_device(dtype)
    return Model(config, plan, Loader(plan, comm.rank, source, device).load(), comm, device)


def in_chunks(fields, comm, sizes, dtype="float32"):
    """Run tokens through the model in passes of these sizes, and return all logits [T, V]."""
    model, tokens = make_model(fields, comm, dtype), tokens_of(fields)
    cache = model.new_cache()
    logits, start = [], 0
    for size in sizes:
        logits.append(model.forward(tokens[start : start + size], cache, logits_at=slice(None)))
        start += size
    assert start == cache.length == len(tokens)
    return np.concatenate(logits)


def whole_prompt(fields, comm, dtype="float32"):
    return in_chunks(fields, comm, [len(TOKENS)], dtype)


def on_one_rank(function):
    return run_ranks(1, function)[0]


@every_model
def test_any_number_of_ranks_gives_the_same_logits(fields):
    reference = on_one_rank(partial(whole_prompt, fields))
    assert reference.shape == (len(TOKENS), fields["vocab_size"])
    assert reference.std() > 0.5
    for tp in SIZES:
        logits = run_ranks(tp, partial(whole_prompt, fields))
        assert same_bits(logits)
        np.testing.assert_allclose(logits[0], reference, **CLOSE, err_msg=f"tp {tp}")


@every_model
@pytest.mark.parametrize("tp", [1, 4, 9])
def test_the_ranks_agree_with_the_oracle(fields, tp):
    _, source = make_source(fields)
    oracle = Oracle(fields, lambda name: source.read(name, tuple(slice(0, n) for n in source.shapes[name])))
    logits = run_ranks(tp, partial(whole_prompt, fields))[0]
    np.testing.assert_allclose(logits, oracle.logits(tokens_of(fields)), **CLOSE)


@every_model
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("sizes", [[1] * 14, [3, 3, 3, 3, 2], [7, 7], [9, 1, 1, 3], [13, 1]], ids=str)
def test_decoding_and_chunked_prefill_match_a_single_pass(fields, tp, sizes):
    """The later passes read earlier keys and values from the cache, and the window moves forward."""
    whole = on_one_rank(partial(whole_prompt, fields))
    logits = run_ranks(tp, lambda comm: in_chunks(fields, comm, sizes))
    assert same_bits(logits)
    np.testing.assert_allclose(logits[0], whole, **CLOSE)


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 14, 512])
@pytest.mark.parametrize("name", ["llama", "window"])
def test_prefill_in_chunks_returns_the_last_logits(name, chunk):
    fields = MODELS[name]

    def rank_part(comm):
        model = make_model(fields, comm)
        cache = model.new_cache()
        last = prefill(model, cache, TOKENS, chunk)
        assert cache.length == len(TOKENS)
        return last

    expected = on_one_rank(partial(whole_prompt, fields))[-1]
    np.testing.assert_allclose(run_ranks(3, rank_part)[0], expected, **CLOSE)


def test_logits_only_at_requested_positions():
    def rank_part(comm):
        model = make_model(LLAMA, comm)
        nothing = model.forward(TOKENS, model.new_cache(), logits_at=None)
        two = model.forward(TOKENS, model.new_cache(), logits_at=np.array([2, 5]))
        return nothing, two

    expected = on_one_rank(partial(whole_prompt, LLAMA))[[2, 5]]
    for nothing, two in run_ranks(2, rank_part):
        assert nothing is None
        np.testing.assert_allclose(two, expected, **CLOSE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ranks_in_16_bits_have_equal_and_close_logits(dtype):
    logits = run_ranks(4, partial(whole_prompt, LLAMA, dtype=dtype))
    assert same_bits(logits)
    assert logits[0].dtype == np.float32
    # The residual stream is rounded five times and the weights once: a few u of the dtype (2^-11 or 2^-8),
    # times the logits, which are up to 3.
    bound = 16 * float(ml_dtypes.finfo(dtype).eps)
    reference = on_one_rank(partial(whole_prompt, LLAMA))
    np.testing.assert_allclose(logits[0], reference, rtol=0, atol=bound)


# --- the collectives of a forward pass ------------------------------------------------------------------


def record_collectives(comm):
    """Record the collectives of `comm` from now on, in two lists: the calls, and the arrays they return."""
    calls, results = [], []

    def recording(name, method):
        def recorded(value=None, *widths):
            columns = value.shape if name == "all_reduce" else [list(w) for w in widths]
            calls.append((name, columns, value.dtype) if isinstance(value, np.ndarray) else (name,))
            result = method(value, *widths)
            if isinstance(result, np.ndarray):
                results.append(result.tobytes())
            return result

        return recorded

    for name in ("all_reduce", "all_gather", "broadcast", "agree"):
        setattr(comm, name, recording(name, getattr(comm, name)))
    return calls, results


@pytest.mark.parametrize("tp", [1, 4, 9])
def test_all_ranks_call_the_same_collectives(tp):
    def rank_part(comm):
        calls, results = record_collectives(comm)
        model = make_model(LLAMA, comm)
        cache = model.new_cache()
        model.forward(TOKENS[:13], cache, logits_at=slice(-1, None))
        model.forward(TOKENS[13:], cache, logits_at=slice(-1, None))
        return calls, results

    recorded = run_ranks(tp, rank_part)
    widths = [stop - start for start, stop in split_evenly(101, tp)]

    def one_pass(tokens):  # one all-reduce for the embedding and two per layer
        all_reduces = [("all_reduce", (tokens, 20), np.dtype(np.float32))] * (1 + 2 * 2)
        return [*all_reduces, ("all_gather", [widths], np.dtype(np.float32))]

    for calls, results in recorded:
        assert calls == one_pass(13) + one_pass(1)
        assert results == recorded[0][1]


def test_the_residual_stream_has_the_same_bits_on_all_ranks(monkeypatch):
    """Every norm reads the stream, so the inputs of the norms are compared."""
    streams = {}  # thread -> the inputs of its norms
    rms_norm = ops.rms_norm

    def recording(xp, x, *arguments):
        streams.setdefault(threading.get_ident(), []).append(x.tobytes())
        return rms_norm(xp, x, *arguments)

    monkeypatch.setattr(ops, "rms_norm", recording)
    run_ranks(4, partial(in_chunks, LLAMA, sizes=[13, 1]))
    assert len(streams) == 4
    first, *others = streams.values()
    assert len(first) == 2 * (2 * 2 + 1)
    assert others == [first] * 3


@pytest.mark.parametrize(
    ("errors", "exit_code", "message"),
    [
        ({1: InputError("no such file")}, 2, "no such file"),
        ({2: ValueError("odd\nvalue")}, 3, "rank 2 failed: ValueError: odd value"),
        ({1: RankError("gone"), 2: InputError("later")}, 3, "rank 1 failed: gone"),
        ({0: MemoryError()}, 3, "rank 0 failed: MemoryError"),
    ],
    ids=["input", "other", "two", "first"],
)
def test_all_ranks_leave_together_when_one_fails(errors, exit_code, message):
    def rank_part(comm):
        calls, _ = record_collectives(comm)
        comm.all_reduce(np.ones((1, 2), np.float32))
        try:
            with comm.agreed():
                if comm.rank in errors:
                    raise errors[comm.rank]
        except AgreedError as error:
            return calls, error.exit_code, str(error)

    for calls, *seen in run_ranks(3, rank_part):
        assert calls == [("all_reduce", (1, 2), np.dtype(np.float32)), ("agree",)]
        assert seen == [exit_code, message]


@pytest.mark.parametrize("tp", [1, 3])
def test_all_ranks_continue_when_none_fails(tp):
    def rank_part(comm):
        with comm.agreed():
            pass
        comm.agree()
        return comm.rank

    assert run_ranks(tp, rank_part) == list(range(tp))


# --- the collectives themselves -------------------------------------------------------------------------

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_gives_all_ranks_the_same_bits(tp, dtype):
    terms = np.random.default_rng(tp).standard_normal((tp, 7, 33)).astype(dtype)
    before = terms.copy()
    sums = run_ranks(tp, lambda comm: comm.all_reduce(terms[comm.rank]))
    assert same_bits(sums)
    assert sums[0].dtype == dtype
    assert same_bits([terms, before])  # no rank's term has changed
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations([terms, *sums], 2))
    exact = terms.astype(np.float64).sum(axis=0)
    # tp - 1 float32 additions, and one rounding to the dtype.
    u = float(ml_dtypes.finfo(dtype).eps) / 2
    bound = tp * 2.0**-24 * np.abs(terms.astype(np.float64)).sum(axis=0) + 1.01 * u * np.abs(exact)
    assert (np.abs(sums[0].astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize(("dtype", "large"), [(np.float16, 2048), (ml_dtypes.bfloat16, 256)])
def test_16_bit_terms_are_added_in_float32_and_rounded_once(dtype, large):
    """The dtype rounds large + 1 to `large`, so adding the ones to it one by one would lose all of them."""
    sums = run_ranks(5, lambda comm: comm.all_reduce(np.array([large if comm.rank == 0 else 1], dtype)))
    assert [float(total[0]) for total in sums] == [large + 4] * 5


def test_all_reduce_of_a_transposed_view():
    terms = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    sums = run_ranks(2, lambda comm: comm.all_reduce(terms[comm.rank].T))
    np.testing.assert_array_equal(sums[0], (terms[0] + terms[1]).T)
    assert same_bits(sums)


@pytest.mark.parametrize("widths", [[4], [3, 2], [1, 5, 2], [2, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_all_gather_of_uneven_columns(widths, rows):
    whole = np.random.default_rng(0).standard_normal((rows, sum(widths)), np.float32)
    starts = [sum(widths[:rank]) for rank in range(len(widths))]

    def rank_part(comm):
        start = starts[comm.rank]
        return comm.all_gather(whole[:, start : start + widths[comm.rank]], widths)

    gathered = run_ranks(len(widths), rank_part)
    assert same_bits([whole, *gathered])
    assert not np.shares_memory(whole, gathered[0])


@pytest.mark.parametrize("tp", [1, 3])
def test_broadcast_returns_the_value_of_rank_0(tp):
    values = run_ranks(tp, lambda comm: comm.broadcast({"token": comm.rank + 7}))
    assert values == [{"token": 7}] * tp


def test_consecutive_collectives_do_not_mix():
    def rank_part(comm):
        seen = []
        for i in range(200):
            seen.append(comm.all_reduce(np.full(2, comm.rank + i, np.float32))[0])
            seen.append(comm.broadcast(i if comm.rank == 0 else None))
        return seen

    expected = [value for i in range(200) for value in (0 + 1 + 2 + 3 * i, i)]
    assert run_ranks(3, rank_part) == [expected] * 3


def test_ranks_wait_for_a_late_rank():
    def rank_part(comm):
        if comm.rank == 1:
            time.sleep(0.3)
        total = comm.all_reduce(np.array([comm.rank], np.float32))
        return float(total[0]), comm.seconds

    (first, first_s), (_, late_s), (last, last_s) = run_ranks(3, rank_part)
    assert (first, last) == (3, 3)
    assert min(first_s, last_s) > 0.2  # `seconds` includes waiting
    assert late_s < 0.2


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "broadcast", "agree"])
def test_a_rank_that_raises_wakes_the_others(failing, collective):
    arguments = {
        "all_reduce": (np.ones((1, 2), np.float32),),
        "all_gather": (np.ones((1, 2), np.float32), [2, 2, 2]),
        "broadcast": (1,),
        "agree": (),
    }[collective]
    woken = []

    def rank_part(comm):
        comm.all_reduce(np.ones(1, np.float32))
        if comm.rank == failing:
            time.sleep(0.05)  # by then the others are waiting
            raise ZeroDivisionError("in the middle")
        try:
            getattr(comm, collective)(*arguments)
        except RankError:
            woken.append(comm.rank)
            raise

    with pytest.raises(ZeroDivisionError, match="in the middle"):
        run_ranks(3, rank_part)
    assert sorted(woken) == [rank for rank in range(3) if rank != failing]
