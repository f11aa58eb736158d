"""The judgement of recordings: of transformers with and without faults, and of a model in this process."""

import json
import shutil

import fake_transformers
import numpy as np
import pytest
from fake_transformers import FakeLlama, FakeTensor
from paths import GOLDENS, PROBED, SUPPORT
from safetensors import safe_open
from safetensors.numpy import save_file

import minitp.probe
from minitp.cli.main import main
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.oracle import ops as oracle_ops
from minitp.trace.reference import open_oracle

FAULTY = json.loads((SUPPORT / "faulty_recordings.json").read_text())
RIGHT = sorted(path.stem for path in PROBED.glob("*.safetensors"))
PROMPT = [3, 50, 7, 7, 91]


def judged(path, golden):
    source = open_model(str(GOLDENS / golden), 1)
    return judge(EngineRecording(RecordedFiles(path), source), open_oracle(source))


@pytest.mark.parametrize("name", FAULTY)
def test_the_first_wrong_operation_is_named_and_explained(name):
    """The recordings were made by tests/support/make_faulty_recordings.py."""
    case = FAULTY[name]
    judgement = judged(SUPPORT / "faulty_recordings" / case["file"], case["model"])
    first = judgement.result.blamed()[0]
    assert first.name.partition("/")[2] == case["step"]
    assert case["words"] in judgement.explanation


def test_a_fault_is_blamed_only_where_it_is():
    """A fault of one layer does not make steps wrong whose inputs it only spoils."""
    for name in ("v of layer 0", "gelu", "mlp left out", "norm without weight"):
        case = FAULTY[name]
        blamed = judged(SUPPORT / "faulty_recordings" / case["file"], case["model"]).result.blamed()
        assert {finding.name.partition("/")[2] for finding in blamed} == {case["step"]}, name


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_blamed_in_a_right_recording(name):
    judgement = judged(PROBED / f"{name}.safetensors", name)
    assert judgement.result.blamed() == []
    assert judgement.explanation == ""
    assert max(finding.ratio for finding in judgement.result.findings) < 0.8
    assert len(judgement.result.findings) > 70


# --- a model in this process ----------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """A function that records a FakeLlama, changed by `fault(model)`, and returns the file."""

    def recorded(fault=lambda model: None):
        model, path = FakeLlama(GOLDENS / "llama2"), tmp_path / "engine.safetensors"
        fault(model)
        with minitp.probe.record(model, path):
            token = model(FakeTensor(np.array([PROMPT]))).logits.array[0, -1].argmax()
            model(FakeTensor(np.array([[token]])))
        return path

    return recorded


def test_a_right_model_is_within_bounds(recorded):
    assert judged(recorded(), "llama2").result.ok


def test_a_cache_that_loses_a_position_is_blamed(recorded, monkeypatch):
    original = fake_transformers.eager_attention_forward

    def stale(module, query, key, value, mask):
        if query.shape[2] == 1:
            key = FakeTensor(np.concatenate((key.array[:, :, :-1], key.array[:, :, -2:-1]), axis=2))
        return original(module, query, key, value, mask)

    def fault(model):
        monkeypatch.setattr(fake_transformers, "eager_attention_forward", stale)

    first = judged(recorded(fault), "llama2").result.blamed()[0]
    assert first.name == "decode.1/layers.0.attn.probs", "attention got the right keys and used others"


@pytest.mark.parametrize(
    ("order", "mistake"),
    [
        ([0, 1, 2, 3, 4, 4], "the newest position holds the one before it"),
        ([0, 1, 2, 3, 5, 5], "the position before the newest is overwritten with the newest"),
        ([5, 0, 1, 2, 3, 4], "all positions are one slot too late"),
        ([0, 0, 2, 3, 4, 4], "slot 1 has the content of slot 0, slot 5 has the content of slot 4"),
    ],
)
def test_a_cache_with_positions_in_the_wrong_slots_is_explained(order, mistake, recorded, tmp_path):
    def change(arrays, metadata):
        name = "decode.1/layers.0.attn.k_cache"
        arrays[name] = arrays[name][:, order].copy()

    judgement = judged(changed(recorded(), tmp_path / "changed.safetensors", change), "llama2")
    assert judgement.result.blamed()[0].name == "decode.1/layers.0.attn.k_cache"
    assert judgement.explanation == mistake


def test_a_mistake_must_explain_more_than_the_right_operation(recorded, tmp_path):
    """All tokens of a decode pass have the first position, and an error a little too large has factor 1."""

    def change(arrays, metadata):
        x = arrays["decode.1/layers.0.attn.q_rope"]
        x += np.random.default_rng(0).normal(size=x.shape).astype(np.float32) * np.abs(x).max() * 5e-6

    judgement = judged(changed(recorded(), tmp_path / "changed.safetensors", change), "llama2")
    first = judgement.result.blamed()[0]
    assert first.name == "decode.1/layers.0.attn.q_rope"
    assert 1 < first.ratio < 4
    assert judgement.explanation == ""


def test_the_rounding_of_frequencies_is_not_blamed_at_large_positions(recorded, tmp_path):
    def change(arrays, metadata):
        oracle = open_oracle(open_model(str(GOLDENS / "llama2"), 1))
        positions = np.arange(len(PROMPT)) + 2000
        frequencies = oracle.rotations[0][0] * (1 + 2.0**-22)  # as far off as those of transformers
        arrays["prefill/positions"] = positions
        for part in "qk":
            x = arrays[f"prefill/layers.0.attn.{part}"]
            turned = oracle_ops.rope(x, positions, frequencies, 1.0).astype(np.float32)
            arrays[f"prefill/layers.0.attn.{part}_rope"] = turned

    blamed = judged(changed(recorded(), tmp_path / "changed.safetensors", change), "llama2").result.blamed()
    names = {finding.name for finding in blamed}
    assert "prefill/positions" in names
    assert not names & {"prefill/layers.0.attn.q_rope", "prefill/layers.0.attn.k_rope"}


def test_logits_of_the_last_position_alone_are_judged(recorded, tmp_path):
    """`generate` of transformers computes the logits of the last position."""
    model, path = FakeLlama(GOLDENS / "llama2"), tmp_path / "engine.safetensors"
    with minitp.probe.record(model, path):
        model(FakeTensor(np.array([PROMPT])), logits_to_keep=1)
    assert judged(path, "llama2").result.ok


def test_a_mistake_that_no_table_has_is_blamed_without_an_explanation(recorded):
    def fault(model):
        norm = model.model.layers[1].input_layernorm
        forward = norm.forward
        norm.forward = lambda x: FakeTensor(np.sort(forward(x).array, axis=-1))

    judgement = judged(recorded(fault), "llama2")
    assert judgement.result.blamed()[0].name == "prefill/layers.1.attn.norm"
    assert judgement.explanation == ""


def test_a_factor_is_the_last_resort(recorded):
    def fault(model):
        model.model.layers[0].mlp.up_proj.weight = 1.25 * model.model.layers[0].mlp.up_proj.weight

    judgement = judged(recorded(fault), "llama2")
    assert judgement.result.blamed()[0].name == "prefill/layers.0.mlp.up"
    assert judgement.explanation == "the right result times 1.25"


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_prints_the_operation_and_the_mistake(capsys):
    path, model = SUPPORT / "faulty_recordings" / "rope-in-pairs.safetensors", GOLDENS / "llama2"
    assert main(["judge", str(path), "--model", str(model)]) == 1
    *_, verdict, mistake = capsys.readouterr().out.splitlines()
    assert verdict.startswith(
        "first wrong operation: prefill/layers.0.attn.q_rope, layer 0, rank 0: relative error "
    )
    assert mistake.startswith("what it seems to compute: rotated in pairs (x[2i], x[2i+1])")


def test_the_command_on_a_right_recording(capsys):
    assert main(["judge", str(PROBED / "qwen3.safetensors"), "--model", str(GOLDENS / "qwen3"), "-v"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "transformers, qwen3, float32, 6 tokens in 2 passes, judged with " in lines[0]
    assert any(line.startswith("layer 1 ") for line in lines)
    assert lines[-2] == "not recorded: attn.scores"
    assert lines[-1] == "all steps within bounds for all 2 layers (90 arrays on 1 rank)"


def test_the_model_of_the_recording_is_the_default(capsys, monkeypatch, tmp_path):
    shutil.copytree(GOLDENS / "llama2", tmp_path / "llama2")
    monkeypatch.chdir(tmp_path)
    assert main(["judge", str(PROBED / "llama2.safetensors")]) == 0
    assert "judged with llama2" in capsys.readouterr().out


def changed(path, target, change=lambda arrays, metadata: None):
    """Write a copy of a recording, changed by change(arrays, metadata)."""
    with safe_open(path, "np") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(arrays, metadata)
    save_file(arrays, target, metadata)
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays, metadata: metadata.pop("dtype"), "the metadata of a trace needs dtype, too"),
        (
            lambda arrays, metadata: metadata.update(dtype="q4_0"),
            "dtype 'q4_0': judge needs float32, float16, bfloat16, float64",
        ),
        (lambda arrays, metadata: metadata.update(token_ids="5"), "token_ids 5: expected a list of numbers"),
        (
            lambda arrays, metadata: metadata.update(passes='[["prefill", 0, 5], ["decode.1", 7, 8]]'),
            "decode.1 has positions 7 to 8: passes must follow each other from 0, within the 6 tokens",
        ),
        (
            lambda arrays, metadata: metadata.update(passes="[]"),
            "its metadata has no passes; record at least",
        ),
        (
            lambda arrays, metadata: [arrays.pop(name) for name in list(arrays) if "layers.1.attn" in name],
            "it has no attention steps of layer 1 in prefill; if all layers were recorded, the engine skips",
        ),
        (
            lambda arrays, metadata: metadata.update(
                config=metadata["config"].replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')
            ),
            "the engine's config has rms_norm_eps 1e-06, and that of",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(change, words, tmp_path, capsys):
    path = changed(PROBED / "llama2.safetensors", tmp_path / "changed.safetensors", change)
    code = main(["judge", str(path), "--model", str(GOLDENS / "llama2")])
    captured = capsys.readouterr()
    assert code == 2
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("step", ["q", "q_rope", "k_rope", "k_cache", "v_cache", "v", "probs", "context"])
def test_a_step_of_another_shape_does_not_stop_the_judgement(step, tmp_path):
    name = f"prefill/layers.0.attn.{step}"

    def change(arrays, metadata):
        arrays[name] = arrays[name][:-1].copy()

    path = changed(PROBED / "llama2.safetensors", tmp_path / "changed.safetensors", change)
    judgement = judged(path, "llama2")
    assert judgement.result.ok
    assert list(judgement.unfit) == [name]


def test_an_engine_may_choose_any_of_two_experts_with_equal_logits(tmp_path):
    # PyTorch's topk may choose the later one; minitp chooses the one with the lower number.
    source = open_model(str(GOLDENS / "mixtral"), 1)
    oracle = open_oracle(source)
    names = [f"prefill/layers.0.mlp.{step}" for step in ("norm", "router", "out")]

    def change(arrays, metadata):
        norm, router = arrays[names[0]], arrays[names[1]]  # [T, D], [T, E]
        order = np.argsort(-router[0])  # [E]
        count = oracle.experts_per_token
        kept = sorted(order[count - 1 : count + 1])  # the experts with the last logit that counts
        router[0, kept] = router[0, order[count - 1]]
        lifted = router.astype(np.float64)
        lifted[0, kept[1]] += 1e-9  # the later one is chosen
        moe = f"model.layers.0.{oracle.expert_block}.experts"
        shares = oracle_ops.route(lifted, count, oracle.normalizes_shares)  # [T, E]
        out = np.zeros(norm.shape)  # [T, D]
        for expert in range(router.shape[1]):
            gate, up, down = (oracle.tensor(f"{moe}.{expert}.{part}.weight") for part in oracle.expert_parts)
            act = oracle_ops.swiglu(oracle_ops.linear(norm, gate), oracle_ops.linear(norm, up))
            out += shares[:, expert, None] * oracle_ops.linear(act, down)
        arrays[names[2]] = out.astype(np.float32)

    path = changed(PROBED / "mixtral.safetensors", tmp_path / "changed.safetensors", change)
    blamed = {finding.name for finding in judged(path, "mixtral").result.blamed()}
    assert names[1] in blamed, "the test has moved a logit"
    assert names[2] not in blamed


def test_an_array_of_integers_is_blamed(tmp_path):
    def change(arrays, metadata):
        arrays["prefill/layers.0.attn.q"] = arrays["prefill/layers.0.attn.q"].astype(np.int32)

    path = changed(PROBED / "llama2.safetensors", tmp_path / "changed.safetensors", change)
    first = judged(path, "llama2").result.blamed()[0]
    assert (first.name, first.note) == ("prefill/layers.0.attn.q", "dtype int32, expected float32")


def test_an_array_of_another_shape_is_not_judged(tmp_path):
    def change(arrays, metadata):
        arrays["prefill/layers.0.mlp.act"] = arrays["prefill/layers.0.mlp.act"][:, :-1].copy()

    path = changed(PROBED / "llama2.safetensors", tmp_path / "changed.safetensors", change)
    judgement = judged(path, "llama2")
    assert judgement.result.ok
    assert judgement.unfit == {"prefill/layers.0.mlp.act": ([5, 63], [5, 64])}


def test_the_rope_of_another_layer_is_named(tmp_path):
    """The recording is a trace of minitp in which one array is rotated with the RoPE of layer 0."""
    path, model = tmp_path / "engine.safetensors", str(GOLDENS / "gemma3")
    tokens = ",".join(map(str, PROMPT))
    assert main(["trace", "--tokens", tokens, "--model", model, "--tp", "1", "-o", str(path)]) == 0
    assert judged(path, "gemma3").result.ok
    with safe_open(path, framework="np") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    rotation = open_oracle(open_model(model, 1)).rotations[0]
    turned = oracle_ops.rope(arrays["prefill/layers.1.attn.q_norm"], np.arange(len(PROMPT)), *rotation)
    name = "prefill/layers.1.attn.q_rope"
    save_file({**arrays, name: turned.astype(np.float32)}, path, metadata)
    judgement = judged(path, "gemma3")
    assert judgement.result.blamed()[0].name == name
    assert "rotated with the RoPE of layer 0, not of layer 1" in judgement.explanation
