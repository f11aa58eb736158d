"""Steps that only copy or look up: no change of their bits is rounding."""

import numpy as np
import pytest
from bit_recordings import changed_copy, next_number, row_of
from check_models import SHAPE, write_models
from one_core import run_threads
from safetensors.numpy import save_file

from minitp.bits.run import bits_of_model
from minitp.device import Device
from minitp.load import load_model
from minitp.loading.source import open_model

RANKS = 2


def with_terms(arrays, metadata):
    """Add the steps of a run on one rank whose bits are those of embed and logits."""
    arrays["prefill/embed_partial"] = arrays["prefill/embed"].copy()
    arrays["prefill/logits_partial"] = arrays["prefill/logits"].copy()


@pytest.fixture
def complete(tmp_path):
    return changed_copy(tmp_path, with_terms, "complete.safetensors")


@pytest.mark.parametrize(
    "step", ["embed_partial", "embed", "layers.1.attn.k_cache", "layers.0.attn.v_cache", "logits"]
)
def test_a_copy_with_another_last_bit_is_no_rounding(step, complete, tmp_path):
    def change(arrays, metadata):
        with_terms(arrays, metadata)
        next_number(arrays[f"prefill/{step}"].reshape(-1), 3)

    row = row_of(complete, changed_copy(tmp_path, change))
    assert (row.outcome, row.step, row.elements) == ("larger", f"prefill/{step}", 1)
    assert row.why[0].startswith("a copy of equal inputs: ")
    assert row.why[1].startswith("not rounding: this step only copies (its ")


@pytest.mark.parametrize(
    ("position", "first", "outcome"),
    [(2, 5, "rounding"), (2, 4, "rounding"), (4, 4, "larger"), (2, 0, "larger")],
)
def test_only_inputs_that_are_recorded_are_known(position, first, outcome, tmp_path):
    """The pass has the keys of five positions, and their rows in k_rope from `first` on."""
    keys = np.ones((2, 5, 4), np.float32)
    other = keys.copy()
    next_number(other, (1, position, 0))
    for name, array in (("a", keys), ("b", other)):
        found = {"layers.0.attn.k_cache": array, "layers.0.mlp.norm": np.ones((5 - first % 5, 3), np.float32)}
        if first < 5:
            found["layers.0.attn.k_rope"] = keys[:, first:].copy()
        found["positions"] = np.arange(first % 5, 5)
        save_file({f"decode.1/{step}": x for step, x in found.items()}, tmp_path / name)
    assert row_of(tmp_path / "a", tmp_path / "b").outcome == outcome


def test_rounded_inputs_are_copied_to_a_cache_of_another_dtype(complete, tmp_path):
    """A conversion rounds, but always to the same bits; a change before it is none of the copy."""

    def in_16_bits(change):
        def both(arrays, metadata):
            with_terms(arrays, metadata)
            arrays["prefill/layers.0.attn.v_cache"] = arrays["prefill/layers.0.attn.v"].astype(np.float16)
            change(arrays)

        return both

    def other_input(arrays):
        for step in ("v", "v_cache"):
            next_number(arrays[f"prefill/layers.0.attn.{step}"], (0, 2, 1))

    def other_copy(arrays):
        next_number(arrays["prefill/layers.0.attn.v_cache"], (0, 2, 1))

    first = changed_copy(tmp_path, in_16_bits(lambda arrays: None), "first.safetensors")
    row = row_of(first, changed_copy(tmp_path, in_16_bits(other_input)))
    assert (row.outcome, row.step) == ("rounding", "prefill/layers.0.attn.v")
    row = row_of(first, changed_copy(tmp_path, in_16_bits(other_copy)))
    assert (row.outcome, row.step) == ("larger", "prefill/layers.0.attn.v_cache")


def test_the_zeros_of_other_ranks_may_change_the_sign_of_a_zero(tmp_path):
    def change(zero):
        def change(arrays, metadata):
            arrays["prefill/embed"][0, 0] = zero

        return change

    first = changed_copy(tmp_path, change(-0.0), "first.safetensors")
    assert row_of(first, changed_copy(tmp_path, change(0.0))).outcome == "rounding"


@pytest.mark.parametrize("step", ["embed", "attn.v_cache"])
def test_a_copy_in_the_runs_of_a_model(step, tmp_path):
    """One bit of a step changes on one rank, in a batch."""
    source = open_model(str(write_models(tmp_path, SHAPE)["tied"]), RANKS)

    def rank(comm):
        model = load_model(source, comm, Device(np, np.dtype("float32")))
        forward = model.forward_batch

        def forward_batch(parts, logits_at, record=None):
            def changing(block=None, layer=None, sequence=None):
                space = record(block, layer, sequence)
                return Changing(space) if len(parts) > 1 and comm.rank == 1 else space

            return forward(parts, logits_at, *([changing] if record else []))

        class Changing:
            def __init__(self, space):
                object.__setattr__(self, "space", space)

            def __getattr__(self, name):
                return getattr(self.space, name)

            def __setattr__(self, name, array):
                if name == step.rpartition(".")[2]:
                    array = array.copy()
                    array[..., -1, -1] = np.nextafter(array[..., -1, -1], np.float32(np.inf))
                setattr(self.space, name, array)

        model.forward_batch = forward_batch
        return bits_of_model(source, model, [3, 1, 4, 1, 5, 9], 2, 1)

    row = next(row for row in run_threads(RANKS, rank)[0] if row.title == "in a batch of 2 sequences")
    assert row.outcome == "larger"
    assert [line for line in row.why if "not rounding: this step only copies" in line]
