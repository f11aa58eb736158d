"""The bits of runs of one prompt: models whose sums depend on the shapes, races, and wrong computations."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from check_models import SHAPE, write_models
from one_core import run_threads

from minitp.bits import difference
from minitp.bits.difference import bit_difference, differing
from minitp.bits.run import bits_of_model
from minitp.bits.variants import MOST_DECODED
from minitp.device import Device
from minitp.load import load_model
from minitp.loading.source import open_model

PROMPT = [100, 3, 40, 60, 80, 15]  # fewer than 8 tokens: NumPy adds up to 7 numbers one after the other
AGAIN, BATCH = "the same run again, 2 times", "in a batch of 3 sequences"
CHUNKS, ONE, EACH = "in two chunks", "one token per pass", "one token per pass, in a batch of 3"
ALL = [AGAIN, BATCH, CHUNKS, ONE, EACH]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directories of the models, by name."""
    return write_models(tmp_path_factory.mktemp("bits"), SHAPE)


class RowByRow:
    """NumPy with a matrix product whose bits do not depend on the number of rows.

    `change(a, b, product)` may replace a product.
    """

    def __init__(self, change=lambda a, b, product: product):
        self._change = change

    def __getattr__(self, name):
        return getattr(np, name)

    def matmul(self, a, b, dtype):
        columns = np.ascontiguousarray(np.swapaxes(b, -1, -2).astype(dtype))  # [.., k, m]
        terms = a.astype(dtype)[..., :, None, :] * columns[..., None, :, :]  # [.., n, k, m]
        return self._change(a, b, terms.sum(-1))


def rows_of(directory, tp=1, ids=PROMPT, dtype="float32", change=lambda model: None, batch=3):
    """Return the rows by title; change(model) spoils the Model of a rank, whose device is a RowByRow."""
    source = open_model(str(directory), tp)

    def rank(comm):
        model = load_model(source, comm, Device(RowByRow(), np.dtype(dtype)))
        change(model)
        return bits_of_model(source, model, ids, batch, 2)

    by_rank = run_threads(tp, rank)
    assert all(rows == by_rank[0] for rows in by_rank)
    return {row.title: row for row in by_rank[0]}


def in_product(weight, change):
    """Return a `change` of rows_of: change(a, b, product) for products with a weight of layer 1."""

    def spoil(model):
        w = getattr(model.weights.layers[1], weight)

        def changed(a, b, product):
            return change(a, b, product) if b is w else product

        object.__setattr__(model, "device", replace(model.device, xp=RowByRow(changed)))

    return spoil


def backwards(a, b, product):
    """Add the terms of a product in the opposite order if there are more rows than one sequence has."""
    if len(a) <= len(PROMPT):
        return product
    return RowByRow().matmul(a[:, ::-1], b[::-1], np.float32)


def outcomes(rows):
    return {title: row.outcome for title, row in rows.items()}


SAME = dict.fromkeys(ALL, "same")


@pytest.mark.parametrize("name", ["biased", "window", "gemma3", "mixture"])
@pytest.mark.parametrize(("tp", "dtype"), [(1, "float32"), (2, "float32"), (3, "bfloat16")])
def test_the_bits_of_a_batch_invariant_model_never_change(name, tp, dtype, models):
    assert outcomes(rows_of(models[name], tp, dtype=dtype)) == SAME


def test_an_order_that_depends_on_the_batch_is_found(models):
    rows = rows_of(models["tied"], 2, change=in_product("w_gate_up", backwards))
    assert outcomes(rows) == SAME | {BATCH: "rounding"}
    row = rows[BATCH]
    assert row.step == "batch/layers.1.mlp.gate"
    assert row.why[0].startswith(f"a product of {3 * len(PROMPT)} rows, not {len(PROMPT)}: ")
    assert row.why[1].startswith("confirmed")
    assert row.why[2].endswith("mlp.up")
    assert 0 < row.elements < row.size
    assert "ulp at [" in row.largest


def test_an_order_of_decoding_is_found(models):
    def change(a, b, product):
        return RowByRow().matmul(a[:, ::-1], b[::-1], np.float32) if len(a) == 1 else product

    rows = rows_of(models["tied"], change=in_product("w_down", change))
    assert outcomes(rows) == SAME | {ONE: "rounding", EACH: "rounding"}
    assert rows[ONE].step == "token.0/layers.1.mlp.out_partial"
    assert rows[ONE].why[0].startswith("a product of 1 row, not 6")
    assert rows[EACH].step == "batch.token.0/layers.1.mlp.out_partial"
    assert rows[EACH].why[0].startswith("a product of 3 rows, not 1")


def test_the_rank_whose_bits_change_is_named(models):
    spoil = in_product("w_gate_up", backwards)
    rows = rows_of(models["tied"], 3, change=lambda model: spoil(model) if model.comm.rank == 1 else None)
    assert outcomes(rows) == SAME | {BATCH: "rounding"}
    assert (rows[BATCH].step, rows[BATCH].rank) == ("batch/layers.1.mlp.gate", 1)


def test_a_race_is_found_by_the_same_run(models):
    rng = np.random.default_rng(0)

    def change(a, b, product):
        order = rng.permutation(a.shape[-1])
        return RowByRow().matmul(a[:, order], b[order], np.float32)

    row = rows_of(models["tied"], change=in_product("w_o", change))[AGAIN]
    assert (row.outcome, row.step) == ("race", "again.1/layers.1.attn.out_partial")
    assert "differs from itself" in row.why[0]


def test_a_rare_race_is_found_by_a_later_repetition(models):
    calls = []

    def change(a, b, product):
        calls.append(len(a))
        return np.nextafter(product, np.float32(np.inf)) if len(calls) == 3 else product

    row = rows_of(models["tied"], change=in_product("w_o", change))[AGAIN]
    assert (row.outcome, row.step) == ("race", "again.2/layers.1.attn.out_partial")


def test_a_change_that_its_block_does_not_repeat_is_not_confirmed(models):
    calls = []

    def change(a, b, product):
        calls.append(len(a))
        first = len(a) == 3 * len(PROMPT) and calls.count(len(a)) == 1
        return np.nextafter(product, np.float32(np.inf)) if first else product

    rows = rows_of(models["tied"], change=in_product("w_o", change))
    assert outcomes(rows) == SAME | {BATCH: "rounding"}
    assert rows[BATCH].why[1].startswith("not confirmed")


def test_a_wrong_computation_is_told_from_rounding(models):
    def change(a, b, product):
        return product - a[:, -1:] * b[-1:] if len(a) > len(PROMPT) else product  # the last term is left out

    rows = rows_of(models["tied"], 2, change=in_product("w_down", change))
    assert outcomes(rows) == SAME | {BATCH: "larger"}
    assert rows[BATCH].step == "batch/layers.1.mlp.out_partial"
    assert any(
        "batch/layers.1.mlp.out_partial" in line and "not rounding" in line for line in rows[BATCH].why
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_computation_after_a_rounding_change_is_found(models, dtype):
    """The change by rounding is in layer 0, so that all later inputs differ."""

    def spoil(model):
        first, later = model.weights.layers[0].w_qkv, model.weights.layers[1].w_down

        def change(a, b, product):
            if b is first:
                return RowByRow().matmul(a[:, ::-1], b[::-1], np.float32) if len(a) > 6 else product
            return product * np.float32(1.5) if b is later and len(a) > 6 else product

        object.__setattr__(model, "device", replace(model.device, xp=RowByRow(change)))

    rows = rows_of(models["tied"], dtype=dtype, change=spoil)
    assert rows[BATCH].outcome == "larger"
    assert any("layers.1.mlp.out_partial" in line and "not rounding" in line for line in rows[BATCH].why)
    assert rows[AGAIN].outcome == rows[CHUNKS].outcome == "same"


def test_check_clears_a_suspect(models, monkeypatch):
    """A large difference may still be rounding, if the terms of a sum cancel."""
    monkeypatch.setattr(difference, "ROUNDINGS", 0)  # every difference is a suspect
    monkeypatch.setattr(difference, "SUM_ERRORS", 0)
    rows = rows_of(models["tied"], change=in_product("w_qkv", backwards))
    assert outcomes(rows) == SAME | {BATCH: "rounding"}


def test_all_steps_that_change_are_listed(models):
    """The inputs of layer 1 have already changed in layer 0."""

    def spoil(model):
        layers = model.weights.layers
        spoiled, norm = layers[0].w_down, model.norm

        def other_norm(xp, x, weight, eps):
            y = norm(xp, x, weight, eps)
            return np.nextafter(y, np.float32(np.inf)) if weight is layers[1].attn_norm and len(x) > 6 else y

        def change(a, b, product):
            return backwards(a, b, product) if b is spoiled else product

        model.norm = other_norm
        object.__setattr__(model, "device", replace(model.device, xp=RowByRow(change)))

    row = rows_of(models["tied"], change=spoil)[BATCH]
    assert row.step == "batch/layers.0.mlp.out_partial"
    assert row.why[-1] == "bits also change for equal inputs in attn.norm"


def test_the_neighbors_tokens_share_the_experts(models):
    """The order of the sum depends on the number of tokens that an expert has in the batch."""

    def spoil(model):
        weights = [expert.w_down for expert in model.weights.layers[1].experts]

        def change(a, b, product):
            if not any(b is w for w in weights):
                return product
            order = np.roll(np.arange(a.shape[-1]), len(a))
            return RowByRow().matmul(a[:, order], b[order], np.float32)

        object.__setattr__(model, "device", replace(model.device, xp=RowByRow(change)))

    row = rows_of(models["mixture"], change=spoil)[BATCH]
    assert (row.outcome, row.step) == ("rounding", "batch/layers.1.mlp.out_partial")
    assert row.why[1].startswith("confirmed")


def test_a_long_prompt_and_one_of_a_single_token(models):
    ids = (PROMPT * 8)[:40]
    row = rows_of(models["window"], ids=ids, batch=1)[ONE]
    if row.outcome != "same":  # a softmax over more than 7 keys depends on their number
        assert row.step.split("/")[0] == f"token.{40 - MOST_DECODED}"
    assert list(rows_of(models["window"], ids=[5])) == [AGAIN, BATCH]


@pytest.mark.parametrize("name", ["biased", "mixture", "gemma"])
def test_real_products_change_only_by_rounding(models, name):
    source, device = open_model(str(models[name]), 2), Device(np, np.dtype("float32"))

    def rank(comm):
        return bits_of_model(source, load_model(source, comm, device), PROMPT, 3, 1)

    rows = run_threads(2, rank)[0]
    assert rows[0].outcome == "same"
    assert {row.outcome for row in rows} <= {"same", "rounding"}
    assert not [line for row in rows for line in row.why if "not confirmed" in line]


# --- two arrays -----------------------------------------------------------------------------------------


def test_bits_of_nan_and_of_zeros():
    a = np.array([np.nan, 0.0, 1.0], np.float32)
    b = np.array([np.nan, -0.0, 1.0], np.float32)
    assert differing(a, b).tolist() == [False, True, False]
    found = bit_difference(a, b)
    assert (found.elements, found.index, found.ulps) == (1, (1,), 0)
    other = a.copy()
    other.view(np.uint32)[0] += 1  # another NaN
    assert differing(a, other).tolist() == [True, False, False]
    assert bit_difference(a, other).ulps is None


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_units_in_the_last_place_count_the_numbers_in_between(dtype):
    a = np.array([1.0, -1.0, 0.0], dtype)
    tiny = np.array(ml_dtypes.finfo(dtype).smallest_subnormal, dtype)
    b = a.copy()
    bits = b.view(f"u{b.itemsize}")
    bits[0] += 3
    assert bit_difference(a, b).ulps == 3
    assert bit_difference(np.array([-tiny]), np.array([tiny])).ulps == 2
    bits[0] -= 2
    assert (bit_difference(a, b).ulps, bit_difference(a, b).excess <= 1) == (1, True)
    assert bit_difference(a, np.array([1.0, -1.5, 0.0], dtype)).excess > 1


def test_a_value_that_is_finite_in_one_run_only():
    found = bit_difference(np.array([1.0, 2.0], np.float32), np.array([1.0, np.inf], np.float32))
    assert (found.index, found.ulps) == ((1,), None)
    assert found.excess == np.inf
