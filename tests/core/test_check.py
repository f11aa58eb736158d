"""Tests of `check`: it blames every faulty step and no correct one."""

import tempfile

import ml_dtypes
import numpy as np
import pytest
from check_models import (
    DTYPES,
    GOLDENS,
    MODELS,
    NAMES,
    PROMPT,
    SHAPE,
    blame,
    write_models,
)
from faults import FAULTS, Fault, places_of
from faulty_model import FaultyModel, hook_ops
from one_core import run_threads
from tiny import write_tiny

from minitp.check.run import check_model
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading import random_weights
from minitp.loading.source import open_model
from minitp.loading.weights import Loader
from minitp.trace.names import AFTER, BEFORE, LAYER, step_names

SPLITS = ("3,1", "1,5", "2,3,1", "5,1,1,2")  # unequal shares of the ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The directories of the models, by name."""
    return write_models(tmp_path_factory.mktemp("check"), SHAPE)


def cases():
    for number, fault in enumerate(FAULTS):
        for tp, layer, rank in places_of(number):
            yield pytest.param(
                fault, tp, layer, rank, id=f"{fault.name}, {tp} ranks, layer {layer} rank {rank}"
            )


def check(directory, tp, ids, decode=0, dtype="float32", make=load_model, layers=None, split=None):
    """Return rank 0's CheckResult; make(source, comm, device) returns the Model of a rank."""
    source, device = open_model(str(directory), tp, layers, split=split), open_device(dtype)
    results = run_threads(tp, lambda comm: check_model(source, make(source, comm, device), ids, decode))
    return results[0]


def check_fault(directory, fault, tp, layer, *ranks, split=None):
    def make(source, comm, device):
        if not fault.everywhere and comm.rank not in ranks:
            return load_model(source, comm, device)
        weights = Loader(source.plan, comm.rank, source.tensors, device).load()
        return FaultyModel(fault, layer, source, weights, comm, device)

    return check(directory, tp, PROMPT, fault.decode, fault.dtype, make, split=split)


@pytest.mark.parametrize(("fault", "tp", "layer", "rank"), list(cases()))
def test_a_fault_is_blamed_on_its_step_and_rank(fault, tp, layer, rank, models, monkeypatch):
    hook_ops(monkeypatch)
    result = check_fault(models[fault.model], fault, tp, layer, rank)
    assert blame(result) == fault.blame(layer, rank, result.passes)


@pytest.mark.parametrize("split", ["3,1", "2,3,1"])
def test_a_fault_is_blamed_on_its_rank_if_the_shares_are_unequal(split, models, monkeypatch):
    hook_ops(monkeypatch)
    fault, tp = next(fault for fault in FAULTS if fault.name == "norm weight missing"), split.count(",") + 1
    result = check_fault(models["biased"], fault, tp, 1, tp - 1, split=split)
    assert blame(result) == fault.blame(1, tp - 1, result.passes)


def test_a_correct_rank_is_not_blamed_if_all_others_are_faulty(models, monkeypatch):
    hook_ops(monkeypatch)
    fault = next(fault for fault in FAULTS if fault.name == "norm weight missing")
    result = check_fault(models["biased"], fault, 3, 1, 0, 2)
    steps = (f"{pass_.name}/layers.1.attn.norm" for pass_ in result.passes)
    assert blame(result) == [(step, rank) for step in steps for rank in (0, 2)]


def test_every_step_is_blamed_by_some_fault():
    """A step that `check` did not look at would make a test above fail."""
    blamed = {
        step for fault in FAULTS for step in fault.steps.split() if not step.endswith((".weight", ".bias"))
    }
    assert blamed == {*BEFORE, *LAYER, *AFTER}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_total_errors_grow_after_a_fault(models, monkeypatch):
    hook_ops(monkeypatch)
    fault = next(fault for fault in FAULTS if fault.name == "norm weight missing")
    result = check_fault(models["biased"], fault, 3, 1, 1)
    totals = {(f.name, f.rank): f.total.relative for f in result.findings if f.total is not None}
    # A few float32 roundings of 6e-8, against norm weights that differ from 1 by about 0.1.
    assert totals["prefill/layers.0.mlp.residual", 1] < 1e-5
    assert totals["prefill/layers.1.attn.norm", 0] < 1e-5
    assert totals["prefill/layers.1.attn.norm", 1] > 1e-2
    assert all(totals["prefill/logits", rank] > 1e-4 for rank in range(3))


WIDENED = {  # dtype of the run -> an operation, the wider dtype of its result, its step, the finding's note
    "bfloat16": ("rms_norm", np.float32, "attn.norm", "dtype float32, expected bfloat16"),
    "float32": ("attention_scores", np.float64, "attn.scores", "dtype float64, expected float32"),
}


@pytest.mark.parametrize("dtype", WIDENED)
def test_a_step_in_too_wide_a_dtype_is_blamed(dtype, models, monkeypatch):
    """The step is blamed for its dtype alone: its numbers are more exact than they need to be."""
    hook_ops(monkeypatch)
    operation, wide, step, note = WIDENED[dtype]
    hooks = {operation: lambda original, *args: original(*args).astype(wide)}
    fault = Fault("wide", step, hooks, decode=0, dtype=dtype)
    first, *others = check_fault(models["biased"], fault, 2, 1, 0).blamed()
    assert (first.name, first.rank, first.note) == (f"prefill/layers.1.{step}", 0, note)
    assert first.ratio <= 1
    for finding in others:  # later steps inherit the wide dtype, or the cache rounds it away
        is_wide = np.dtype(wide).name in finding.note
        assert is_wide or (finding.step.endswith("_cache") and finding.ratio > 1), finding


# --- no false alarms ------------------------------------------------------------------------------------


def check_random_run(directory, tp, seed, dtype, calm=True, split=None):
    """Check that nothing is blamed for a random prompt of 1 to 24 tokens and 0 to 3 decoded ones.

    A model that is not `calm` amplifies small errors, so its total errors have no useful bound.
    """
    rng = np.random.default_rng([tp, seed])
    source = open_model(str(directory), tp)
    ids = rng.integers(0, source.config.vocab_size, rng.integers(1, 25)).tolist()
    decode = int(rng.integers(0, 4))
    result = check(directory, tp, ids, decode, dtype, split=split)
    assert blame(result) == [], (tp, split, dtype, ids, decode)
    assert result.ok
    chunks = 2 * (len(ids) > 1)
    steps = (1 + decode + chunks) * len(step_names(source.plan)) - (chunks // 2) * len(AFTER)
    assert len(result.findings) == tp * (steps + len(source.plan.tensors))
    most = 200 * float(ml_dtypes.finfo(dtype).eps)
    for finding in result.findings:
        known = finding.pass_name != "weights" and finding.kind != "partial"
        assert (finding.total is not None) == known
        # Ten roundings per layer, of 2^-24, 2^-11 or 2^-8, add up to a few dozen, relative to the norm of the
        # whole stream: a single element may be close to zero.
        if calm and finding.step.endswith("residual"):
            assert finding.total.relative < most, finding


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_nothing_is_blamed_in_any_family_at_any_tp(number):
    """Each family also runs with one of the unequal SPLITS, in place of the equal shares of as many ranks."""
    directory, split = GOLDENS / NAMES[number], SPLITS[number % len(SPLITS)]
    for tp in range(1, open_model(str(directory), 1).config.num_attention_heads + 1):
        unequal = split if split.count(",") + 1 == tp else None
        check_random_run(directory, tp, number, DTYPES[(number + tp) % 3], split=unequal)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_blamed_in_the_models_of_the_fault_tests(name, dtype, models):
    tp = (4, 2, 1)[(list(MODELS).index(name) + DTYPES.index(dtype)) % 3]  # each model on each, in some dtype
    check_random_run(models[name], tp, 5, dtype, calm=name != "loud")


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_blamed_with_other_weights_and_shapes(seed, tmp_path):
    fields = {**SHAPE, "num_key_value_heads": (1, 9)[seed % 2], "intermediate_size": (5, 64)[seed // 2]}
    directory = write_tiny(tmp_path / "model", tokenizer=False, seed=seed, **fields)
    for tp in (1, 3, 7):
        check_random_run(directory, tp, seed, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_blamed_if_all_tokens_are_equal(dtype, models):
    """The rows are equal, and so are their errors, which do not average out."""
    for token in range(0, 100, 20):
        assert blame(check(models["biased"], 2, [token] * 12, 2, dtype)) == []


def test_nothing_is_blamed_if_only_the_first_layers_run(models):
    result = check(models["biased"], 3, PROMPT, 1, layers=2)
    assert blame(result) == []
    assert {finding.layer for finding in result.findings} == {None, 0, 1}


def test_nothing_is_blamed_in_a_model_with_random_weights(monkeypatch):
    monkeypatch.setitem(random_weights.MODELS, "tiny", {"model_type": "llama", **SHAPE})
    result = check("random:tiny", 4, PROMPT, 1)
    assert blame(result) == []
    assert len([finding for finding in result.findings if finding.pass_name == "weights"]) == 4 * (3 + 3 * 9)


def test_all_ranks_get_the_same_result_and_no_file_is_left(models, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = open_model(str(models["biased"]), 3)

    def run(comm):
        model = load_model(source, comm, open_device("float32"))
        return check_model(source, model, PROMPT, 1)

    first, *others = run_threads(3, run)
    assert others == [first, first]
    assert first.sequences[0][:-1] == PROMPT
    assert list(tmp_path.iterdir()) == []
