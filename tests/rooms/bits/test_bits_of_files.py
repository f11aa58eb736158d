"""The bits of recordings in files: traces, recordings of transformers, and dumps without metadata."""

import json

import ml_dtypes
import numpy as np
import pytest
from fake_transformers import FakeLlama, FakeTensor
from one_core import run_threads
from paths import GOLDENS, PROBED
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minitp.probe
from minitp.bits.recording import LETTERS
from minitp.bits.run import bits_of_files
from minitp.cli.main import main
from minitp.device import open_device
from minitp.errors import InputError
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.names import split_name
from minitp.trace.record import passes_of, wanted_steps
from minitp.trace.write import write_trace

PROMPT = [3, 50, 7, 7, 91]
RECORDED = PROBED / "llama2.safetensors"


def read(path):
    """Return the arrays and the metadata of a safetensors file."""
    with safe_open(path, framework="np") as file:
        return load_file(path), file.metadata()


@pytest.fixture
def changed(tmp_path):
    """A function that writes a copy of the recording, changed by change(arrays, metadata), and returns it."""

    def changed(change, name="b.safetensors"):
        arrays, metadata = read(RECORDED)
        change(arrays, metadata)
        save_file(arrays, tmp_path / name, metadata)
        return tmp_path / name

    return changed


def row_of(*paths):
    (row,) = bits_of_files(list(map(str, paths)))
    return row


def next_number(array, index):
    array[index] = np.nextafter(array[index], np.float32(np.inf))


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
    assert len(row.why) == 1

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
    a = {"prefill/embed": np.ones((2, 3), ml_dtypes.bfloat16)}
    b = {"prefill/embed": a["prefill/embed"].copy()}
    b["prefill/embed"].view(np.uint16)[1, 2] += 1
    for name, arrays in (("a", a), ("b", b)):
        save_file(arrays, tmp_path / name)
    row = row_of(tmp_path / "a", tmp_path / "b")
    assert (row.outcome, row.largest) == ("rounding", "1 ulp at [1, 2]: 1 and 1.0078125")


# --- other passes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Traces of one model by (tp, passes): a prompt at once, and a prompt with decoded tokens."""
    folder, paths = tmp_path_factory.mktemp("traces"), {}
    for tp, tokens, decode in ((1, 5, 2), (2, 5, 2), (1, 7, 0)):
        source, device = open_model(str(GOLDENS / "llama2"), tp), open_device("float32")
        path = paths[tp, decode] = folder / f"{tp}.{decode}.safetensors"
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


def test_other_numbers_of_ranks(traces):
    row = row_of(traces[2, 2], traces[1, 2])
    assert row.outcome == "rounding"
    assert "a rank multiplies by all of the weight, not 1/2 of it" in row.why[0]
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


# --- names and layouts of other engines -----------------------------------------------------------------


def module_outputs(pass_name="prefill"):
    """Return the recorded steps as the outputs of a model's modules: [1, T, D], by the modules' paths."""
    arrays, found = read(RECORDED)[0], {}
    for layer in range(2):
        path = f"model.layers.{layer}"
        for part, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
            heads = arrays[f"{pass_name}/layers.{layer}.attn.{part}"]  # [n, T, d]
            found[f"{path}.self_attn.{module}"] = heads.transpose(1, 0, 2).reshape(1, heads.shape[1], -1)
        for step, module in (
            ("attn.norm", "input_layernorm"),
            ("attn.out", "self_attn.o_proj"),
            ("mlp.norm", "post_attention_layernorm"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.out", "mlp.down_proj"),
        ):
            found[f"{path}.{module}"] = arrays[f"{pass_name}/layers.{layer}.{step}"][None]
        found[path] = arrays[f"{pass_name}/layers.{layer}.mlp.residual"][None]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def in_batch(outputs, index=2):
    """Return the outputs in a batch of four sequences, of which the others are different."""
    rng, found = np.random.default_rng(0), {}
    for name, array in outputs.items():
        found[name] = rng.standard_normal((4, *array.shape[1:]), dtype=np.float32)
        found[name][index] = array[0]
    return found


def test_modules_in_a_batch_are_compared_by_their_sequence(tmp_path):
    """The names sort in another order than the modules run."""
    alone = module_outputs()
    alone["model.layers.0.mlp.act_fn"] = alone["model.layers.0.mlp.gate_proj"] + 1  # no step of the table
    save_file(alone, tmp_path / "alone")
    outputs = in_batch(alone)
    save_file(outputs, tmp_path / "batch")
    row = row_of(tmp_path / "alone", tmp_path / "batch")
    assert (row.outcome, row.arrays, row.positions, row.why) == ("same", 21, 5, ())
    next_number(outputs["model.layers.0.self_attn.v_proj"], (2, 3, 1))
    next_number(outputs["model.layers.0.mlp.gate_proj"], (2, 3, 1))  # this name comes first
    save_file(outputs, tmp_path / "changed")
    row = row_of(tmp_path / "alone", tmp_path / "changed")
    assert (row.outcome, row.step) == ("rounding", "model.layers.0.self_attn.v_proj")
    assert row.largest.startswith("1 ulp at [3, 1]: ")
    assert row.why[0].startswith("a product of 20 rows, not 5: ")


def test_modules_in_a_decode_pass_are_compared_by_position(tmp_path):
    outputs = module_outputs()
    save_file(outputs, tmp_path / "prefill")
    divided = {f"prefill/{name}": np.ascontiguousarray(x[:, :4]) for name, x in outputs.items()}
    divided |= {f"decode.1/{name}": np.ascontiguousarray(x[:, 4:]) for name, x in outputs.items()}
    save_file(divided, tmp_path / "decode")
    row = row_of(tmp_path / "prefill", tmp_path / "decode")
    assert (row.outcome, row.arrays, row.positions) == ("same", 40, 5)
    next_number(divided["decode.1/model.layers.1.mlp.up_proj"], (0, 0, 7))
    divided["decode.1/model.layers.1.mlp.down_proj"] *= np.float32(1.1)  # its input was not recorded
    save_file(divided, tmp_path / "changed")
    row = row_of(tmp_path / "prefill", tmp_path / "changed")
    assert row.step == "decode.1/model.layers.1.mlp.up_proj"
    assert row.why[0].startswith("a product of 1 row, not 5: ")


def test_steps_in_a_batch(changed):
    def change(arrays, metadata):
        for name, array in arrays.items():
            arrays[name] = np.stack((array + 1, array))

    row = row_of(RECORDED, changed(change))
    assert (row.outcome, row.arrays) == ("same", len(read(RECORDED)[0]))


def test_arrays_of_other_shapes_are_counted(changed):
    def change(arrays, metadata):
        arrays["prefill/embed"] = arrays["prefill/embed"][:, :-1].copy()

    row = row_of(RECORDED, changed(change))
    assert row.outcome == "same"
    assert row.why == ("not compared, because the shapes differ: 1 array, such as prefill/embed",)


def test_arrays_that_are_not_steps_are_compared_whole(tmp_path):
    a = {"blk.0.out": np.ones((2, 3), np.float32), "other": np.ones(4, np.float32)}
    b = {"blk.0.out": a["blk.0.out"].copy(), "other": np.ones(5, np.float32)}
    save_file(a, tmp_path / "a")
    b["blk.0.out"][1, 1] = 1.5
    save_file(b, tmp_path / "b")
    row = row_of(tmp_path / "a", tmp_path / "b")
    assert (row.step, row.elements, row.size, row.arrays) == ("blk.0.out", 1, 6, 1)


def recorded(path, passes):
    """Record a model of transformers whose gate projection in layer 1 rounds a single row differently."""
    model = FakeLlama(GOLDENS / "llama2")
    gate = model.model.layers[1].mlp.gate_proj
    forward = gate.forward

    def by_rows(x):
        out = forward(x).array  # [1, T, F]
        return FakeTensor(np.nextafter(out, np.float32(np.inf)) if out.shape[1] == 1 else out)

    gate.forward = by_rows
    with minitp.probe.record(model, path):
        for ids in passes:
            model(FakeTensor(np.array([ids])))
    return path


def test_a_model_whose_product_depends_on_the_number_of_rows(tmp_path):
    prefill = recorded(tmp_path / "prefill.safetensors", [[*PROMPT, 12]])
    row = row_of(prefill, recorded(tmp_path / "decode.safetensors", [PROMPT, [12]]))
    assert (row.outcome, row.step, row.elements) == ("rounding", "decode.1/layers.1.mlp.gate", 64)
    assert row.why[0].startswith("a product of 1 row, not 6: ")
    assert row_of(prefill, recorded(tmp_path / "again.safetensors", [[*PROMPT, 12]])).outcome == "same"


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
