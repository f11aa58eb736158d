"""The places of a sequence in a dump: in batches, after padding, and in passes that begin anywhere."""

import numpy as np
import pytest
from bit_recordings import RECORDED, module_outputs, next_number, read, row_of
from safetensors.numpy import save_file

from minitp.bits.names import LETTERS
from minitp.errors import InputError
from minitp.trace.names import split_name

TOKENS = [3, 50, 7, 7, 91]
ROUTER = "model.layers.0.mlp.gate"


@pytest.fixture
def alone():
    """The outputs of the modules of a mixture for a prompt, [1, T, ..]; those of the router are [T, E]."""
    found = module_outputs()
    for layer in range(2):
        gate = found.pop(f"model.layers.{layer}.mlp.gate_proj")
        found[f"model.layers.{layer}.mlp"] = found.pop(f"model.layers.{layer}.mlp.down_proj")
        found.pop(f"model.layers.{layer}.mlp.up_proj")
        found[f"model.layers.{layer}.mlp.gate"] = gate[0, :, :4].copy()
    found["input_ids"] = np.array([TOKENS])
    return found


def in_batch(outputs, index, left=0, right=0, count=3):
    """Return the outputs in a batch, with rows of padding before and after those of sequence `index`."""
    rng, found = np.random.default_rng(0), {}
    for name, array in outputs.items():
        rows = array[0] if name not in flat(outputs) else array  # [T, ..]
        rows = np.pad(rows, [(left, right), *[(0, 0)] * (rows.ndim - 1)])  # [W, ..]
        others = rng.permuted(rows, axis=0) + rows.dtype.type(1)  # the tokens and rows of the neighbors
        batch = np.stack([rows if n == index else others for n in range(count)])  # [count, W, ..]
        found[name] = batch.reshape(-1, *batch.shape[2:]) if name in flat(outputs) else batch
    return found


def flat(outputs):
    return [name for name in outputs if name.endswith("mlp.gate")]


def write(folder, name, arrays):
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / name)
    return folder / name


PLACES = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 3), (1, 0, 2), (0, 2, 0), (2, 3, 0), (1, 2, 1)]
WITHOUT = {"nothing": [], "tokens": ["input_ids"], "norms": ["input_ids", "layernorm"]}


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize(("index", "left", "right"), PLACES)
def test_a_sequence_is_found_in_a_batch(index, left, right, without, alone, tmp_path):
    alone = {name: x for name, x in alone.items() if not any(part in name for part in WITHOUT[without])}
    first, batch = write(tmp_path, "a", alone), in_batch(alone, index, left, right)
    for pair in ((first, write(tmp_path, "b", batch)), (tmp_path / "b", first)):
        row = row_of(*pair)
        assert (row.outcome, row.arrays, row.positions, row.why) == ("same", len(alone), 5, ())
    width = left + 5 + right
    next_number(batch[ROUTER], (index * width + left + 3, 2))
    row = row_of(first, write(tmp_path, "c", batch))
    assert (row.outcome, row.step, row.elements) == ("rounding", ROUTER, 1)
    assert row.largest.startswith("1 ulp at [3, 2]")
    assert row.why[0].startswith(f"a product of {3 * width} rows, not 5: ")


def test_rows_that_have_no_axis_of_sequences_at_all(alone, tmp_path):
    """The tokens of all sequences follow each other, as in vLLM."""
    rows = {name: x if name in flat(alone) else x[0] for name, x in alone.items()}
    batch = {name: np.concatenate((x[1:] + x.dtype.type(1), x, x[2:3])) for name, x in rows.items()}
    first = write(tmp_path, "a", alone)
    row = row_of(first, write(tmp_path, "b", batch))
    assert (row.outcome, row.positions) == ("same", 5)
    next_number(batch["model.layers.1.mlp"], (4 + 2, 7))
    row = row_of(first, write(tmp_path, "c", batch))
    assert (row.outcome, row.step) == ("rounding", "model.layers.1.mlp")


def test_positions_show_the_padding_if_tokens_do_not(alone, tmp_path):
    del alone["input_ids"]
    rng, left = np.random.default_rng(1), {}
    for name, array in alone.items():
        rows = array if name in flat(alone) else array[0]
        rows = np.concatenate((rows[:2] * 0, rng.standard_normal(rows.shape, dtype=np.float32)))
        left[name] = rows if name in flat(alone) else rows[None]
    row = row_of(write(tmp_path, "a", alone), write(tmp_path, "b", left))
    assert any("paired by their number" in line for line in row.why)  # nothing is alike: another model
    left["position_ids"] = np.array([[1, 1, 0, 1, 2, 3, 4]])
    alone["position_ids"] = np.arange(5)[None]
    row = row_of(write(tmp_path, "a", alone), write(tmp_path, "b", left))
    assert (row.outcome, row.positions) == ("larger", 5)
    assert not any("paired by their number" in line for line in row.why)


def test_a_batch_without_the_sequence_is_refused(alone, tmp_path):
    batch = {name: x[3:] if name in flat(alone) else x[1:] for name, x in in_batch(alone, 0).items()}
    batch |= {name: batch[name][2:] for name in flat(alone)}
    with pytest.raises(InputError, match="nothing shows which rows belong together: the tokens differ or"):
        row_of(
            write(tmp_path, "a", alone), write(tmp_path, "b", {**batch, "input_ids": batch["input_ids"] + 9})
        )


# --- passes that begin anywhere -------------------------------------------------------------------------


def passes(*stops, of=("tokens", "positions"), names=None):
    """Return the recorded prefill of five tokens in passes that end at `stops`, by the names of steps."""
    arrays, found, start = read(RECORDED)[0], {}, 0
    arrays = {name: x for name, x in arrays.items() if name.startswith("prefill/") and len(name) < 99}
    for number, stop in enumerate(stops):
        pass_name = f"decode.{number}" if number else "prefill"
        for name, array in arrays.items():
            step = name.removeprefix("prefill/")
            letters = LETTERS[split_name(name)[2]]
            if (step in ("tokens", "positions") and step not in of) or step.endswith("logits"):
                continue
            cuts = {"T": slice(start, stop), "S": slice(0, stop)}
            part = array[tuple(cuts.get(letter, slice(None)) for letter in letters)]
            found[f"{pass_name}/{step}"] = part.copy()
        start = stop
    return {name: x for name, x in found.items() if names is None or name.split("/")[0] in names}


def test_a_part_of_the_passes_is_placed(tmp_path):
    whole = write(tmp_path, "whole", passes(3, 4, 5))
    for of in (("tokens", "positions"), ("positions",), ("tokens",), ()):
        for names in (["decode.2"], ["decode.1", "decode.2"], ["prefill", "decode.2"]):
            part = write(tmp_path, "part", passes(3, 4, 5, of=of, names=names))
            for pair in ((whole, part), (part, whole)):
                row = row_of(*pair)
                assert (row.outcome, row.why) == ("same", ()), (of, names)
                assert row.positions == 5  # with those of the keys


def only(arrays, *steps):
    return {name: x for name, x in arrays.items() if name.endswith(steps)}


def test_positions_place_a_pass_whose_tokens_occur_twice(tmp_path):
    """The tokens at positions 2 and 3 are the same."""
    whole = write(tmp_path, "whole", passes(5))
    last = passes(3, 4, 5, names=["decode.1"])
    assert row_of(whole, write(tmp_path, "a", last)).outcome == "same"
    del last["decode.1/positions"]
    with pytest.raises(InputError, match="nothing shows which rows belong together"):
        row_of(whole, write(tmp_path, "b", last))


def test_passes_of_unknown_positions_are_left_out(tmp_path):
    whole = write(tmp_path, "whole", only(passes(3, of=()), "mlp.act"))
    rest = only(passes(3, 4, 5, of=(), names=["prefill", "decode.2"]), "mlp.act")
    row = row_of(whole, write(tmp_path, "part", rest))
    assert (row.outcome, row.positions) == ("same", 3)
    assert row.why == (
        "not compared, because their positions are unknown: decode.2; record tokens or positions, or all "
        "passes from prefill on",
    )
    alone = only(passes(3, 4, 5, of=(), names=["decode.2"]), "mlp.act")
    with pytest.raises(InputError, match="record tokens or positions, or all passes from prefill on"):
        row_of(whole, write(tmp_path, "alone", alone))


def test_two_dumps_of_the_same_decode_passes(tmp_path):
    arrays = passes(3, 4, 5, of=(), names=["decode.1", "decode.2"])
    a = write(tmp_path, "a", arrays)
    next_number(arrays["decode.2/layers.1.attn.k_cache"], (0, 1, 0))
    row = row_of(a, write(tmp_path, "b", arrays))
    assert (row.outcome, row.step) == ("rounding", "decode.2/layers.1.attn.k_cache")
    assert row.largest.startswith("1 ulp at [0, 1, 0]")
    assert row.why[0] == "positions are counted from decode.1, the first pass of both recordings"


def test_no_position_in_common(tmp_path):
    first = write(tmp_path, "a", passes(3))
    with pytest.raises(InputError, match="no position in common: 0 to 2 in the first, 3 to 4 in the second"):
        row_of(first, write(tmp_path, "b", passes(3, 4, 5, names=["decode.1", "decode.2"])))


def test_tokens_that_differ_end_the_comparison(tmp_path):
    arrays = passes(3, 4, 5, of=("tokens",))
    first = write(tmp_path, "a", arrays)
    arrays["decode.2/tokens"] = np.array([0])
    arrays["decode.2/embed"] = arrays["decode.2/embed"] + 1
    row = row_of(first, write(tmp_path, "b", arrays))
    assert (row.outcome, row.positions) == ("same", 4)
    assert row.why == ("positions from 4 on are not compared: the tokens differ",)
    arrays["prefill/tokens"] = np.array([9, 9, 9])
    arrays["decode.1/tokens"] = np.array([9])
    with pytest.raises(InputError, match="the tokens differ"):
        row_of(first, write(tmp_path, "c", arrays))


def test_the_keys_after_padding_in_the_middle_are_left_out(tmp_path):
    """A prefill that is padded at its end, and then decoded tokens: the keys have holes."""
    whole = write(tmp_path, "whole", passes(5))
    arrays = passes(3, 4, 5, of=("tokens",))
    for name, array in arrays.items():
        letters = LETTERS[split_name(name)[2]]
        for letter in letters:
            if letter == "S" or (letter == "T" and name.startswith("prefill")):
                array = np.insert(array, [3, 3], 0, letters.index(letter))
        arrays[name] = array
    row = row_of(whole, write(tmp_path, "part", arrays))
    assert (row.outcome, row.positions) == ("same", 5)
    assert [line.split(":")[0] for line in row.why] == ["not compared, because the shapes differ"]
