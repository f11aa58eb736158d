"""The bits of recordings in files: traces, recordings of transformers, and dumps without metadata."""

import json

import ml_dtypes
import numpy as np
import pytest
from bit_recordings import PROMPT, RECORDED, next_number, read, row_of
from one_core import run_threads
from paths import GOLDENS, PROBED
from safetensors.numpy import save_file

from minitp.bits.recording import LETTERS
from minitp.cli.main import main
from minitp.device import open_device
from minitp.errors import InputError
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.names import split_name
from minitp.trace.record import passes_of, wanted_steps
from minitp.trace.write import write_trace


def test_a_recording_has_the_bits_of_its_copy(changed):
    row = row_of(RECORDED, changed(lambda arrays, metadata: None))
    assert (row.outcome, row.step, row.positions) == (
        "same",
        "",
        len(read(RECORDED)[0]["prefill/tokens"]) + 1,
    )
    assert row.arrays == len(read(RECORDED)[0])


def test_the_first_changed_step_is_found_and_not_those_after_it(changed):
    def change(arrays, metadata):
        next_number(arrays["prefill/layers.1.attn.q"], (0, 2, 1))
        arrays["prefill/layers.1.attn.q_rope"][0, 2] *= np.float32(1.0001)
        next_number(arrays["prefill/layers.1.mlp.gate"], (1, 0))

    row = row_of(RECORDED, changed(change))
    assert (row.outcome, row.step, row.elements) == ("rounding", "prefill/layers.1.attn.q", 1)
    assert row.largest.startswith("1 ulp at [0, 2, 1]: ")
    assert "the shapes are the same" in row.why[0]
    assert row.why[-1] == "bits also change for equal inputs in mlp.gate"


def test_a_changed_key_is_an_input_of_later_queries(changed):
    def change(arrays, metadata):
        next_number(arrays["prefill/layers.0.attn.k_cache"], (0, 3, 1))  # not written as in k_rope
        arrays["prefill/layers.0.attn.probs"][:, 3:] += np.float32(1e-7)

    row = row_of(RECORDED, changed(change))
    assert row.step == "prefill/layers.0.attn.k_cache"
    assert not [line for line in row.why if "bits also change" in line]

    def before(arrays, metadata):
        change(arrays, metadata)
        arrays["prefill/layers.0.attn.probs"][:, 1] += np.float32(1e-7)  # this query does not see the key

    assert row_of(RECORDED, changed(before)).why[-1].endswith("attn.probs")


def test_a_difference_that_is_not_rounding(changed):
    def change(arrays, metadata):
        arrays["prefill/layers.1.mlp.act"][2] *= np.float32(1.01)

    row = row_of(RECORDED, changed(change))
    assert (row.outcome, row.step) == ("larger", "prefill/layers.1.mlp.act")
    assert row.why[1].startswith("not rounding: ")


def test_nan_with_the_same_bits_and_zeros_of_both_signs(changed, tmp_path):
    def nan(arrays, metadata):
        arrays["prefill/layers.0.mlp.act"][0, 0] = np.nan
        arrays["prefill/layers.0.mlp.up"][0, 0] = 0.0

    def other_zero(arrays, metadata):
        nan(arrays, metadata)
        arrays["prefill/layers.0.mlp.up"][0, 0] = -0.0

    first = changed(nan, "a.safetensors")
    assert row_of(first, changed(nan)).outcome == "same"
    row = row_of(first, changed(other_zero, "c.safetensors"))
    assert row.largest == "the sign of zero at [0, 0]: 0 and -0"


def test_bfloat16_is_compared_in_its_own_bits(tmp_path):
    a = {"prefill/layers.0.attn.norm": np.ones((2, 3), ml_dtypes.bfloat16)}
    b = {"prefill/layers.0.attn.norm": a["prefill/layers.0.attn.norm"].copy()}
    b["prefill/layers.0.attn.norm"].view(np.uint16)[1, 2] += 1
    for name, arrays in (("a", a), ("b", b)):
        save_file(arrays, tmp_path / name)
    row = row_of(tmp_path / "a", tmp_path / "b")
    assert (row.outcome, row.largest) == ("rounding", "1 ulp at [1, 2]: 1 and 1.0078125")


# --- other passes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Traces of one model by (tp or shares, passes): a prompt at once, and a prompt with decoded tokens."""
    folder, paths = tmp_path_factory.mktemp("traces"), {}
    for ranks, tokens, decode in ((1, 5, 2), (2, 5, 2), ("5,1", 5, 2), (1, 7, 0)):
        tp, split = (2, ranks) if isinstance(ranks, str) else (ranks, None)
        source, device = open_model(str(GOLDENS / "llama2"), tp, split=split), open_device("float32")
        path = paths[ranks, decode] = folder / f"{ranks}.{decode}.safetensors"
        passes = passes_of(tokens, decode)
        wanted = wanted_steps(source.plan, passes, ["prefill/*"] + ["decode.*"] * (decode > 0))
        ids = PROMPT
        if not decode:  # the same tokens as in the traces with decoded ones
            ids = json.loads(read(paths[1, 2])[1]["token_ids"])

        def rank(comm, source=source, device=device, path=path, ids=ids, passes=passes, wanted=wanted):
            write_trace(path, source, load_model(source, comm, device), ids, passes, wanted)

        run_threads(tp, rank)
    return paths


def test_decoding_is_compared_with_a_prefill_of_the_same_tokens(traces):
    row = row_of(traces[1, 0], traces[1, 2])
    assert row.positions == 7
    assert row.outcome == "rounding"
    assert row.arrays == 49 * 3
    back = row_of(traces[1, 2], traces[1, 0])
    assert (back.positions, back.outcome) == (7, "rounding")


def in_passes(arrays, stops):
    """Return the steps of a prefill, divided into passes that end at `stops`."""
    found, start = {}, 0
    for number, stop in enumerate(stops):
        pass_name = f"decode.{number}" if number else "prefill"
        for name, array in arrays.items():
            letters = LETTERS[split_name(name)[2]]
            cuts = {"T": slice(start, stop), "S": slice(0, stop)}
            part = array[tuple(cuts.get(letter, slice(None)) for letter in letters)]
            found[name.replace("prefill", pass_name)] = np.ascontiguousarray(part)
        start = stop
    return found


@pytest.mark.parametrize("stops", [(7,), (5, 6, 7), (1, 4, 7)])
def test_rows_are_compared_by_position(traces, tmp_path, stops):
    arrays = in_passes(read(traces[1, 0])[0], stops)
    save_file(arrays, tmp_path / "b")
    row = row_of(traces[1, 0], tmp_path / "b")
    assert (row.outcome, row.positions, row.arrays) == ("same", 7, 44 * len(stops))
    assert row_of(tmp_path / "b", traces[1, 0]).outcome == "same"
    last = f"decode.{len(stops) - 1}" if len(stops) > 1 else "prefill"
    arrays[f"{last}/layers.1.attn.context"][-1] *= np.float32(2)
    save_file(arrays, tmp_path / "c")
    row = row_of(traces[1, 0], tmp_path / "c")
    assert (row.outcome, row.step) == ("larger", f"{last}/layers.1.attn.context")


@pytest.mark.parametrize("ranks", [1, 2])
def test_unequal_shares_change_only_roundings(traces, ranks):
    row = row_of(traces[ranks, 2], traces["5,1", 2])
    assert row.outcome == "rounding"
    assert ranks == 1 or row.why[0].startswith("the ranks have shares 5,1, not 1,1, and products of other")


def test_other_numbers_of_ranks(traces):
    row = row_of(traces[2, 2], traces[1, 2])
    assert row.outcome == "rounding"
    # Which of the two comes first depends on the kernels that the library has for the shapes of this CPU.
    reasons = (
        "a rank multiplies by all of the weight, not one of 2 parts of it",
        "the sum over the ranks: 1 term, not 2",
    )
    assert any(reason in row.why[0] for reason in reasons)
    assert row.why[-1].endswith("of 2 rounded terms or 1 rounded term")
    assert row.arrays == 3 * (49 - 1 - 2 * 2)  # terms of sums are not compared


def test_positions_after_the_first_other_token_are_left_out(traces, tmp_path):
    arrays, metadata = read(traces[1, 2])
    ids = json.loads(metadata["token_ids"])
    metadata["token_ids"] = str([*ids[:5], (ids[5] + 1) % 100, *ids[6:]])
    save_file(arrays, tmp_path / "b", metadata)
    row = row_of(traces[1, 2], tmp_path / "b")
    assert (row.outcome, row.positions) == ("same", 5)
    assert row.why == ("positions from 5 on are not compared: the tokens differ",)


def test_dumps_without_metadata(traces, tmp_path):
    arrays, _ = read(traces[1, 2])
    np.savez(tmp_path / "a.npz", **arrays)
    next_number(arrays["decode.1/layers.0.mlp.act"], (0, 3))
    np.savez(tmp_path / "b.npz", **{name.removeprefix("prefill/"): x for name, x in arrays.items()})
    row = row_of(tmp_path / "a.npz", tmp_path / "b.npz")
    assert (row.outcome, row.step, row.positions) == ("rounding", "decode.1/layers.0.mlp.act", 7)


# --- refusals and the command ---------------------------------------------------------------------------


def test_recordings_that_do_not_fit_are_refused(changed, tmp_path):
    other = str(PROBED / "qwen2.safetensors")
    with pytest.raises(InputError, match="recordings of different models"):
        row_of(RECORDED, other)
    with pytest.raises(InputError, match=r"is in float32 and .* in bfloat16: bits can be compared only"):
        row_of(RECORDED, changed(lambda arrays, metadata: metadata.update(dtype="bfloat16")))

    def other_tokens(arrays, metadata):
        metadata["token_ids"] = str([id_ + 1 for id_ in json.loads(metadata["token_ids"])])

    with pytest.raises(InputError, match="recordings of different tokens"):
        row_of(RECORDED, changed(other_tokens))

    def half(arrays, metadata):
        arrays["prefill/embed"] = arrays["prefill/embed"].astype(np.float16)

    with pytest.raises(InputError, match="prefill/embed is float32 in one recording and float16 in the"):
        row_of(RECORDED, changed(half))
    save_file({"x": np.ones(3)}, tmp_path / "x")
    with pytest.raises(InputError, match="no step of the same position in common"):
        row_of(RECORDED, tmp_path / "x")


def test_the_command_compares_files(changed, capsys, tmp_path):
    same = changed(lambda arrays, metadata: None, "same.safetensors")

    def change(arrays, metadata):
        next_number(arrays["prefill/layers.1.attn.q"], (0, 2, 1))

    other = changed(change, "other.safetensors")
    assert main(["bits", str(RECORDED), str(same)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all bits are the same in 1 run (")
    assert main(["bits", str(RECORDED), str(same), str(other)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"each recording is compared with {RECORDED}"
    assert [line.split("  ")[0] for line in out[2:5]] == ["run", str(same), str(other)]
    assert out[-1] == "bits change in 1 of 2 runs, by rounding only"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([str(RECORDED)], "bits compares two or more recordings"),
        (["a", "b", "--tokens", "1,2"], "bits needs a PROMPT, --tokens 1,2,3, or two or more recordings"),
        (["a b", "--batch", "0"], "--batch 0: expected 1 to 64"),
        (["a b", "--repeats", "0"], "--repeats 0: expected 1 to 100"),
        ([], "bits needs a PROMPT or --tokens 1,2,3"),
    ],
)
def test_wrong_arguments(argv, error, capsys):
    model = ["--model", str(GOLDENS / "llama2"), "--tp", "1"]
    assert main(["bits", *argv, *model]) == 2
    assert error in capsys.readouterr().err
