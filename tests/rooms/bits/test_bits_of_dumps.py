"""The bits of dumps: names and layouts of other engines, batches, and arrays that do not fit."""

import numpy as np
from bit_recordings import (
    PROMPT,
    RECORDED,
    in_batch,
    module_outputs,
    next_number,
    read,
    row_of,
)
from fake_transformers import FakeLlama, FakeTensor
from paths import GOLDENS
from safetensors.numpy import save_file

import minitp.probe


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
