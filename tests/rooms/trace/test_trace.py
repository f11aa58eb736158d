"""Trace files, read back with the safetensors library, and the recorder."""

import json
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from paths import GOLDENS
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import UNEVEN, write_tiny

from minitp import ops
from minitp.comm import run_threads
from minitp.device import Device, open_device
from minitp.errors import InputError
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.oracle import Oracle
from minitp.trace.assemble import assemble
from minitp.trace.names import (
    AFTER,
    BEFORE,
    INTEGERS,
    LAYER,
    PARTIAL,
    Kind,
    layer_steps,
    split_name,
    step_names,
)
from minitp.trace.record import Recorder, passes_of, wanted_steps
from minitp.trace.write import write_oracle_trace, write_trace

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
PROMPT = [100, 3, 40, 60, 80, 15, 25]
ALL = ["*"]
FACTS = ("format", "source", "model", "config", "tp", "dtype", "layers")

# The values are near 1 and result from some ten sums of 20 to 54 float32 products. Roundings of 6e-8 add up
# to a few times 1e-6. A head, column or position in the wrong place changes the values by 0.01 or more.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = {"llama": {"attention_bias": True, "mlp_bias": True}, "mistral": MISTRAL}
    return {name: write_tiny(root / name, tokenizer=False, **{**UNEVEN, **f}) for name, f in families.items()}


def read(path):
    """Return the tensors and the metadata of a file."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def trace(directory, path, tp=4, decode=0, globs=None, per_rank=False, dtype="float32", ids=PROMPT):
    """Run write_trace on `tp` ranks; return the tensors and metadata of its file."""
    source, device = open_model(str(directory), tp), open_device(dtype)
    passes = passes_of(len(ids), decode)
    wanted = wanted_steps(source.plan, passes, globs)

    def rank(comm):
        write_trace(path, source, load_model(source, comm, device), ids, passes, wanted, per_rank)

    run_threads(tp, rank)
    return read(path)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Return the tensors and metadata of a full trace of four ranks with two decoded tokens."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    return trace(models["llama"], path, decode=2, globs=ALL, per_rank=True)


LLAMA = SimpleNamespace(layers=2, tensors={"model.layers.0.mlp.gate_proj.weight": None})  # a plan
STEPS = step_names(LLAMA)


# --- the contents of the file ---------------------------------------------------------------------------


def test_names_and_shapes_agree_with_the_table(whole):
    tensors, metadata = whole
    sizes = {"D": 20, "d": 6, "H": 9, "K": 3, "Hd": 54, "F": 37, "V": 101}
    steps = {name: array for name, array in tensors.items() if not name.startswith(("rank", "weights/"))}
    passes = json.loads(metadata["passes"])
    assert passes == [["prefill", 0, 7], ["decode.1", 7, 8], ["decode.2", 8, 9]]
    assert set(steps) == {f"{name}/{step}" for name, _, _ in passes for step in STEPS}
    ends = {name: (start, stop) for name, start, stop in passes}
    for name, array in steps.items():
        pass_name, _, step = split_name(name)
        start, stop = ends[pass_name]
        letters = (BEFORE | LAYER | AFTER)[step].split()
        assert array.shape == tuple({**sizes, "T": stop - start, "S": stop}[letter] for letter in letters), (
            name
        )
        assert array.dtype == (np.int64 if step in INTEGERS else np.float32)


def test_metadata_describes_the_run(whole, models):
    tensors, metadata = whole
    fields = json.loads((models["llama"] / "config.json").read_text())
    assert set(metadata) == {*FACTS, "split", "token_ids", "passes", "kinds"}
    assert (metadata["format"], metadata["source"]) == ("minitp-trace-1", "ranks")
    assert metadata["model"] == str(models["llama"])
    assert json.loads(metadata["config"]) == fields
    assert [metadata[name] for name in ("tp", "split", "dtype")] == ["4", "1,1,1,1", "float32"]
    most_probable = [int(tensors[f"{name}/logits"][-1].argmax()) for name in ("prefill", "decode.1")]
    assert json.loads(metadata["token_ids"]) == PROMPT + most_probable
    kinds = json.loads(metadata["kinds"])
    assert set(kinds) == {*BEFORE, *[f"layers.*.{step}" for step in layer_steps(LLAMA)], *AFTER}
    heads, kv_heads = [[0, 3], [3, 5], [5, 7], [7, 9]], [[0, 1], [1, 2], [1, 3], [2, 3]]
    assert kinds["embed"] == {"kind": "replicated", "axis": None, "ranges": []}
    assert kinds["layers.*.mlp.out_partial"]["kind"] == "partial"
    assert kinds["layers.*.attn.probs"] == {"kind": "sharded", "axis": 0, "ranges": heads}
    assert kinds["layers.*.attn.v_cache"] == {"kind": "sharded", "axis": 0, "ranges": kv_heads}
    assert kinds["layers.*.attn.context"]["ranges"] == [[6 * start, 6 * stop] for start, stop in heads]
    assert kinds["layers.*.mlp.up"] == {
        "kind": "sharded",
        "axis": 1,
        "ranges": [[0, 10], [10, 19], [19, 28], [28, 37]],
    }
    assert kinds["logits"]["kind"] == "replicated"
    assert kinds["logits_partial"]["axis"] == 1


def test_the_ranks_parts_make_up_the_whole_array(whole):
    tensors, metadata = whole
    kinds = json.loads(metadata["kinds"])
    checked = 0
    for name, array in tensors.items():
        if name.startswith("rank"):
            continue
        pieces = [tensors[f"rank{rank}/{name}"] for rank in range(4)]
        if name.startswith("weights/"):
            continue  # another test checks the weights
        _, layer, step = split_name(name)
        kind = kinds[step if layer is None else f"layers.*.{step}"]
        if kind["kind"] == "replicated":
            assert all(piece.tobytes() == array.tobytes() for piece in pieces)
        elif kind["kind"] == "partial":
            np.testing.assert_array_equal(sum(map(np.float64, pieces)).astype(np.float32), array)
        else:
            for piece, (start, stop) in zip(pieces, kind["ranges"], strict=True):
                there = np.take(array, range(start, stop), axis=kind["axis"])
                # A head that two ranks hold may differ by rounding.
                np.testing.assert_allclose(piece, there, rtol=0, atol=1e-6, err_msg=name)
        checked += 1
    assert checked == 3 * len(STEPS)
    assert len([name for name in tensors if name.startswith("rank")]) == len(tensors) * 4 // 5


def test_a_head_on_two_ranks_is_taken_from_the_first(whole):
    tensors, _ = whole
    for step in ("k_cache", "v"):
        name = f"decode.1/layers.1.attn.{step}"
        pieces = [tensors[f"rank{rank}/{name}"] for rank in range(4)]
        assert [len(piece) for piece in pieces] == [1, 1, 2, 1]
        np.testing.assert_array_equal(tensors[name], np.concatenate((pieces[0], pieces[1], pieces[2][1:])))


def test_cache_steps_join_the_keys_and_values_of_all_passes(whole):
    tensors, _ = whole
    for layer in range(2):
        for cached, made in (("k_cache", "k_rope"), ("v_cache", "v")):
            rows = [
                tensors[f"{name}/layers.{layer}.attn.{made}"] for name in ("prefill", "decode.1", "decode.2")
            ]
            for n, name in enumerate(("prefill", "decode.1", "decode.2"), start=1):
                cache = tensors[f"{name}/layers.{layer}.attn.{cached}"]
                np.testing.assert_array_equal(cache, np.concatenate(rows[:n], axis=1))


def test_cache_steps_are_limited_to_the_window(models, tmp_path):
    tensors, _ = trace(models["mistral"], tmp_path / "a.safetensors", tp=3, decode=2, globs=ALL)
    keys = [tensors[f"{name}/layers.0.attn.k_rope"] for name in ("prefill", "decode.1", "decode.2")]
    keys = np.concatenate(keys, axis=1)
    np.testing.assert_array_equal(tensors["prefill/layers.0.attn.k_cache"], keys[:, :7])
    np.testing.assert_array_equal(tensors["decode.1/layers.0.attn.k_cache"], keys[:, 4:8])
    np.testing.assert_array_equal(tensors["decode.2/layers.0.attn.k_cache"], keys[:, 5:9])
    seen = np.isfinite(tensors["prefill/layers.1.attn.scores"])
    np.testing.assert_array_equal(seen, np.broadcast_to(np.tri(7) - np.tri(7, k=-4) > 0, (9, 7, 7)))


@pytest.mark.parametrize(("name", "tp"), [("llama", 2), ("llama", 4), ("llama", 9), ("mistral", 3)])
def test_many_ranks_give_the_trace_of_one_rank(name, tp, models, tmp_path):
    alone, metadata = trace(models[name], tmp_path / "1.safetensors", 1, decode=2, globs=ALL)
    ranks, of_ranks = trace(models[name], tmp_path / "n.safetensors", tp, decode=2, globs=ALL)
    assert of_ranks["token_ids"] == metadata["token_ids"]
    assert list(ranks) == list(alone)
    for step, array in ranks.items():
        if step.startswith("weights/") or step.endswith(("/embed", "/embed_partial")):
            np.testing.assert_array_equal(array, alone[step])
        else:
            # Entries of -inf must be at the same positions.
            np.testing.assert_allclose(array, alone[step], **CLOSE, err_msg=step)


@pytest.mark.parametrize("name", ["smollm2", "llama-bias", "mistral-v01", "llama2"])
def test_weights_equal_the_checkpoint(name, tmp_path):
    directory = GOLDENS / name
    tensors, _ = trace(directory, tmp_path / "a.safetensors", globs=["weights/*"], per_rank=True)
    files = {}
    for path in directory.glob("*.safetensors"):
        files |= load_file(path)
    assert {f"weights/{name}" for name in files} == {name for name in tensors if not name.startswith("rank")}
    plan = open_model(str(directory), 4).plan
    for name, expected in files.items():
        np.testing.assert_array_equal(tensors[f"weights/{name}"], expected.astype(np.float32))
        for rank in range(4):
            piece = expected[plan.tensors[name].index(rank)].astype(np.float32)
            np.testing.assert_array_equal(tensors[f"rank{rank}/weights/{name}"], piece)


def test_dtypes_of_a_bfloat16_trace(models, tmp_path):
    tensors, metadata = trace(
        models["llama"], tmp_path / "a.safetensors", decode=1, globs=ALL, per_rank=True, dtype="bfloat16"
    )
    assert metadata["dtype"] == "bfloat16"
    for name, array in tensors.items():
        always_32 = name.endswith((".scores", ".probs", "/logits", "/logits_partial"))
        integers = name.endswith(INTEGERS)
        assert array.dtype == (np.int64 if integers else np.float32 if always_32 else ml_dtypes.bfloat16), (
            name
        )
    weight = "model.layers.1.self_attn.k_proj.weight"
    stored = load_file(models["llama"] / "model.safetensors")[weight]
    np.testing.assert_array_equal(tensors[f"weights/{weight}"], stored.astype(ml_dtypes.bfloat16))
    # 16-bit terms are summed exactly and rounded once.
    name = "prefill/layers.0.mlp.out_partial"
    terms = [tensors[f"rank{rank}/{name}"].astype(np.float64) for rank in range(4)]
    np.testing.assert_array_equal(tensors[name], sum(terms).astype(ml_dtypes.bfloat16))


# --- the choice of steps --------------------------------------------------------------------------------


def test_scores_probs_and_weights_are_left_out_by_default(models, tmp_path):
    tensors, _ = trace(models["llama"], tmp_path / "a.safetensors", decode=1)
    expected = {f"{p}/{step}" for p in ("prefill", "decode.1") for step in STEPS}
    assert set(tensors) == {name for name in expected if not name.endswith((".scores", ".probs"))}


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["prefill/logits"], ["prefill/logits"]),
        (["*.1.attn.probs"], ["prefill/layers.1.attn.probs", "decode.1/layers.1.attn.probs"]),
        (["decode.1/final_norm", "*/embed"], ["prefill/embed", "decode.1/embed", "decode.1/final_norm"]),
        (["decode.1/layers.0.mlp.[gu]*"], ["decode.1/layers.0.mlp.gate", "decode.1/layers.0.mlp.up"]),
        (
            ["weights/*.0.mlp.down*", "prefill/embed"],
            [
                "weights/model.layers.0.mlp.down_proj.weight",
                "weights/model.layers.0.mlp.down_proj.bias",
                "prefill/embed",
            ],
        ),
    ],
)
def test_globs_choose_steps(globs, expected, models, tmp_path):
    plan = open_model(str(models["llama"]), 3).plan
    assert wanted_steps(plan, passes_of(7, 1), globs) == expected
    tensors, _ = trace(models["llama"], tmp_path / "a.safetensors", 3, decode=1, globs=globs)
    assert set(tensors) == set(expected)


def test_a_glob_that_matches_nothing_is_rejected(models):
    plan = open_model(str(models["llama"]), 2).plan
    for glob in ("logits", "decode.2/*", "prefill/layers.2.*", "prefill/Embed", ""):
        with pytest.raises(InputError, match="this run has no such step"):
            wanted_steps(plan, passes_of(7, 1), ["prefill/embed", glob])


def test_each_pass_begins_where_the_previous_one_ends():
    assert passes_of(5, 0) == [("prefill", 0, 5)]
    assert passes_of(5, 2) == [("prefill", 0, 5), ("decode.1", 5, 6), ("decode.2", 6, 7)]


def test_parts_are_assembled_by_their_kind():
    a, b = np.array([[1.0], [2.0]], np.float32), np.array([[3.0], [4.0]], np.float32)
    assert assemble(Kind("replicated"), [a, b]) is a
    large = np.array([2**24, -(2**24)], np.float32)
    # A sum in float32 would lose the ones.
    assert assemble(Kind("partial"), [large, np.float32([1, 1]), -large]).tolist() == [1, 1]
    assert assemble(Kind("sharded", 0, ((0, 2), (2, 4))), [a, b]).tolist() == [[1], [2], [3], [4]]
    assert assemble(Kind("sharded", 0, ((0, 2), (1, 3))), [a, b]).tolist() == [[1], [2], [4]]
    assert assemble(Kind("sharded", 1, ((0, 1), (1, 2))), [a, b]).tolist() == [[1, 3], [2, 4]]
    assert assemble(Kind("sharded", 1, ((0, 1), (1, 1))), [a, b[:, :0]]).tolist() == [[1], [2]]


# --- the oracle's trace ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_trace_of_the_oracle_equals_its_steps(name, models, tmp_path):
    source = open_model(str(models[name]), 1)
    passes = passes_of(len(PROMPT), 2)
    write_oracle_trace(
        tmp_path / "o.safetensors", source, PROMPT, passes, wanted_steps(source.plan, passes, ALL)
    )
    tensors, metadata = read(tmp_path / "o.safetensors")
    ranks, of_ranks = trace(models[name], tmp_path / "r.safetensors", 2, decode=2, globs=ALL)
    assert (metadata["source"], metadata["tp"], metadata["dtype"]) == ("oracle", "1", "float64")
    for same in ("token_ids", "passes", "config", "model", "format"):
        assert metadata[same] == of_ranks[same]
    without = {name for name in ranks if split_name(name)[2] in (*PARTIAL, "logits_partial")}
    assert set(tensors) == {name for name in ranks if name not in without and not name.startswith("weights/")}
    for step, array in tensors.items():
        assert array.dtype == (np.int64 if step.endswith(INTEGERS) else np.float64)
        np.testing.assert_allclose(ranks[step], array, **CLOSE, err_msg=step)
    for step, array in Oracle.from_directory(models[name]).steps(json.loads(metadata["token_ids"])):
        axis = {"T": 0, "H": 1, "K": 1}[(BEFORE | LAYER | AFTER)[split_name(step)[2]][0]]
        prefill = tensors[f"prefill/{step}"]
        keys = slice(0, 7) if step.endswith((".scores", ".probs")) else slice(None)
        np.testing.assert_array_equal(prefill, array.take(range(7), axis=axis)[..., keys])


# --- recording ------------------------------------------------------------------------------------------


def test_recording_changes_no_bit_and_is_skipped_without_a_recorder(models, monkeypatch):
    source = open_model(str(models["llama"]), 3)
    names = {f"prefill/{step}" for step in STEPS}

    def logits(comm, recorded):
        model = load_model(source, comm, open_device())
        taken = []
        record = Recorder(model.device, names, lambda name, array: taken.append(name))
        record.begin("prefill")
        more = {"record": record} if recorded else {}
        result = model.forward(PROMPT, model.new_cache(), logits_at=slice(None), **more)
        return result.tobytes(), taken

    with_record = run_threads(3, lambda comm: logits(comm, recorded=True))
    assert all(sorted(taken) == sorted(names) for _, taken in with_record)

    def never(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(Recorder, "__call__", never)
    monkeypatch.setattr(Device, "to_host", never)
    without = run_threads(3, lambda comm: logits(comm, recorded=False))
    assert [bits for bits, _ in without] == [bits for bits, _ in with_record]
    assert all(taken == [] for _, taken in without)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_run_that_fails_on_one_rank_leaves_no_file(failing, models, tmp_path, monkeypatch):
    swiglu = ops.swiglu

    def fails(xp, gate_up):
        if threading.current_thread().name == f"rank {failing}":
            raise ZeroDivisionError
        return swiglu(xp, gate_up)

    monkeypatch.setattr(ops, "swiglu", fails)
    with pytest.raises(ZeroDivisionError):
        trace(models["llama"], tmp_path / "a.safetensors", 3)
    assert list(tmp_path.iterdir()) == []
