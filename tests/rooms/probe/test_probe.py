"""The probe: recordings of a NumPy model with transformers' modules, and files that transformers made."""

import json
import os
import sys
import threading
from types import SimpleNamespace

import fake_transformers
import numpy as np
import pytest
from fake_transformers import FakeLlama, FakeModule, FakeTensor, apply_rotary_pos_emb, eager_attention_forward
from paths import GOLDENS, PROBED
from safetensors import safe_open

import minitp.probe
from minitp.check.difference import difference_of
from minitp.compare.run import compare_files
from minitp.errors import InputError
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.mapping.transformers import TRANSFORMERS
from minitp.probe.recorder import ProbeRecorder
from minitp.trace.names import step_names
from minitp.trace.record import passes_of
from minitp.trace.reference import open_oracle
from minitp.trace.write import write_oracle_trace

PROMPT = [3, 50, 7, 7, 91]
# Steps that are no input or output of a module or function; with one process, a partial sum is the sum.
UNSEEN = (
    "embed_partial",
    "attn.out_partial",
    "mlp.out_partial",
    "logits_partial",
    "attn.scores",
    "mlp.experts",
)


def expected_names(source, decode):
    rotated = [f"layers.{i}.attn.{part}_rope" for i in source.config.layers_without_rope for part in "qk"]
    names = [
        f"{name}/{step}" for name, _, _ in passes_of(len(PROMPT), decode) for step in step_names(source.plan)
    ]
    return {name for name in names if not name.endswith((*UNSEEN, *rotated))}


def metadata_of(path):
    with safe_open(path, "np") as file:
        return file.metadata(), set(file.keys())


def check_against_oracle(directory, path, decode, tmp_path, tolerance=None):
    """Check that a recording has all steps, and that they are the oracle's."""
    source = open_model(str(directory), 1)
    metadata, names = metadata_of(path)
    assert names == expected_names(source, decode)
    passes = passes_of(len(PROMPT), decode)
    assert json.loads(metadata["passes"]) == [list(one) for one in passes]
    ids = json.loads(metadata["token_ids"])
    wanted = [name for name in names if not name.endswith("positions")]
    oracle = tmp_path / "oracle.safetensors"
    write_oracle_trace(oracle, source, ids[: len(PROMPT)], passes, wanted)
    result = compare_files(oracle, path, tolerance=tolerance)
    assert [step.name for step in result.steps if step.departs] == []
    assert not result.not_compared
    assert {step.name for step in result.steps} == set(wanted)


@pytest.fixture
def model():
    return FakeLlama(GOLDENS / "llama2")


def ids(*tokens):
    return FakeTensor(np.array([tokens]), "torch.int64")


def greedy(output):
    return int(output.logits.array[0, -1].argmax())


def test_a_recording_has_all_steps_of_prefill_and_decoding(model, tmp_path):
    path = tmp_path / "steps.safetensors"
    with minitp.probe.record(model, path):
        token = greedy(model(input_ids=ids(*PROMPT)))
        token = greedy(model(ids(token)))
        model(ids(token))
    check_against_oracle(GOLDENS / "llama2", path, 2, tmp_path)


def test_nothing_of_the_probe_is_left_on_the_model(model, tmp_path):
    with minitp.probe.record(model, tmp_path / "steps.safetensors"):
        assert model.config._attn_implementation == "eager"
        assert fake_transformers.apply_rotary_pos_emb is not apply_rotary_pos_emb
        model(ids(*PROMPT))
    assert model.config._attn_implementation == "sdpa"
    assert fake_transformers.apply_rotary_pos_emb is apply_rotary_pos_emb
    assert fake_transformers.eager_attention_forward is eager_attention_forward
    modules = [module for _, module in model.named_modules() if isinstance(module, FakeModule)]
    assert len(modules) > 20
    assert all(module.before == module.after == [] for module in modules)


def test_an_error_in_the_block_writes_no_file_and_removes_the_hooks(model, tmp_path):
    path = tmp_path / "steps.safetensors"
    with pytest.raises(AttributeError), minitp.probe.record(model, path):
        model(ids(*PROMPT)).no_such_field  # noqa: B018
    assert not path.exists()
    assert model.before == []


def test_what_the_probe_cannot_record_is_refused(model, tmp_path):
    def refused(words, run=lambda: None, path=tmp_path / "steps.safetensors", **options):
        with pytest.raises(InputError, match=words), minitp.probe.record(model, path, **options):
            run()

    refused("recipe 'bert': there are recipes for llama, ", recipe="bert")
    refused("no forward pass was run")
    refused(r"one sequence, with input_ids \[1, T\]", lambda: model(FakeTensor(np.array([PROMPT, PROMPT]))))
    refused(f"there is no folder {tmp_path / 'missing'}", path=tmp_path / "missing" / "steps.safetensors")
    refused("the recording is a safetensors file; give .*x.safetensors", path=tmp_path / "x.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"attention_mask": np.array([[0, 1, 1, 1, 1]])},
            "attention_mask hides tokens; pass the sequence without",
        ),
        (
            {"past_key_values": SimpleNamespace(is_compileable=True)},
            "cannot record a SimpleNamespace, .* use a Dyn",
        ),
        ({"logits_to_keep": ids(0, 2)}, "pass logits_to_keep as an int"),
    ],
)
def test_a_pass_that_cannot_be_recorded_is_refused(arguments, words, model, tmp_path):
    with pytest.raises(InputError, match=words), minitp.probe.record(model, tmp_path / "steps.safetensors"):
        model(ids(*PROMPT), **arguments)
    assert os.listdir(tmp_path) == []


def test_a_second_prompt_is_refused(model, tmp_path):
    def run_two_prompts():
        model(ids(*PROMPT))
        for layer in model.model.layers:
            layer.self_attn.cache = None
        model(ids(*PROMPT))

    words = "^decode.1 reads no cache: record one prompt in a file, "
    with pytest.raises(InputError, match=words), minitp.probe.record(model, tmp_path / "steps.safetensors"):
        run_two_prompts()


def test_what_is_not_a_whole_model_of_transformers_is_refused(model, tmp_path):
    path = tmp_path / "steps.safetensors"

    def refused(words, model):
        with pytest.raises(InputError, match=words) as caught, minitp.probe.record(model, path):
            pass
        assert len(str(caught.value)) < 300

    class Wrapper(FakeModule):
        def __init__(self, model):
            super().__init__()
            self.base_model, self.config = model, model.config
            self.set_attn_implementation = model.set_attn_implementation

    refused("of transformers, mlx-lm or vLLM itself, without a wrapper .* not a list", [])
    refused("without a wrapper .* this Wrapper has no lm_head", Wrapper(model))
    layers, renamed = model.model.layers, FakeModule()
    model.model.layers = [renamed, *layers[1:]]
    refused("has no model.layers.0.self_attn, .* names of transformers' modules; .* save the arrays", model)
    model.model.layers = layers
    last = model.model.layers.pop()
    refused("the config has 2 layers, and the model has no model.layers.1.self_attn", model)
    model.model.layers.append(last)
    own, last.input_layernorm = last.input_layernorm, model.model.norm
    refused("layers.1.input_layernorm and model.norm are one module", model)
    last.input_layernorm = own
    with (
        pytest.raises(InputError, match="call the model, not a part of it"),
        minitp.probe.record(model, path),
    ):
        model.model(ids(*PROMPT))


def test_logits_of_the_last_position_have_the_norm_of_the_last_position(model, tmp_path):
    path = tmp_path / "steps.safetensors"
    with minitp.probe.record(model, path):
        model(ids(*PROMPT), logits_to_keep=1)
    with safe_open(path, "np") as file:
        assert file.get_tensor("prefill/final_norm").shape == (1, 36)
        assert file.get_tensor("prefill/logits").shape[0] == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in PROBED.glob("*.safetensors")))
def test_a_recording_of_transformers_is_the_oracles(name, tmp_path):
    """The files were made by tests/support/make_probe_dumps.py."""
    tolerance = 0.05 if name == "tinyllama" else None  # bfloat16, whose roundings add up over two layers
    check_against_oracle(GOLDENS / name, PROBED / f"{name}.safetensors", 1, tmp_path, tolerance)


def test_every_recipe_has_a_recording_of_transformers():
    recorded = {metadata_of(path)[0]["source"].split()[-1] for path in PROBED.glob("*.safetensors")}
    assert recorded == set(TRANSFORMERS)


def test_a_recording_in_bfloat16_has_the_bits_of_the_model():
    metadata, _ = metadata_of(PROBED / "tinyllama.safetensors")
    assert metadata["dtype"] == "bfloat16"
    with safe_open(PROBED / "tinyllama.safetensors", "np") as file:
        embed, tokens = file.get_tensor("prefill/embed"), file.get_tensor("prefill/tokens")
    with safe_open(GOLDENS / "tinyllama" / "model.safetensors", "np") as file:
        table = file.get_tensor("model.embed_tokens.weight")
    assert embed.dtype.name == "bfloat16"
    assert difference_of(embed, table[tokens]).absolute == 0


# --- models that compute the same in another way ---------------------------------------------------------


@pytest.fixture
def judged(model, tmp_path):
    """A function that records the model, which must be right, and returns the arrays by name."""

    def judged():
        path = tmp_path / "steps.safetensors"
        with minitp.probe.record(model, path):
            model(ids(*PROMPT))
        source = open_model(str(GOLDENS / "llama2"), 1)
        judgement = judge(EngineRecording(RecordedFiles(path), source), open_oracle(source))
        assert judgement.result.ok
        assert not judgement.unfit
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return judged


def changed_attention(monkeypatch, rotate):
    """Let FakeAttention rotate its heads with rotate(rope, q, k, *args)."""
    plain = fake_transformers.FakeAttention.forward

    def forward(self, *args, **kwargs):
        rope = fake_transformers.apply_rotary_pos_emb
        with monkeypatch.context() as patch:
            patch.setattr(
                fake_transformers, "apply_rotary_pos_emb", lambda q, k, *rest: rotate(rope, q, k, *rest)
            )
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(fake_transformers.FakeAttention, "forward", forward)


def twice(rope, q, k, *args):
    return rope(q, q, *args)[0], rope(k, k, *args)[0]


def keys_first(rope, q, k, *args):
    k = rope(k, k, *args)[0]
    return rope(q, q, *args)[0], k


def values_too(rope, q, k, *args):
    """Rotate a third tensor of the size of k, whose result nothing reads."""
    q, k = rope(q, k, *args)
    rope(k, k, *args)
    return q, k


@pytest.mark.parametrize("rotate", [twice, keys_first, values_too], ids=lambda function: function.__name__)
def test_queries_and_keys_may_be_rotated_by_themselves(rotate, judged, monkeypatch):
    changed_attention(monkeypatch, rotate)
    arrays = judged()
    assert arrays["prefill/layers.0.attn.q_rope"].shape == (6, 5, 6)
    assert arrays["prefill/layers.0.attn.k_rope"].shape == (2, 5, 6)


def test_rope_of_one_tensor_may_return_one(judged, monkeypatch):
    original = fake_transformers.apply_rotary_pos_emb
    monkeypatch.setattr(fake_transformers, "apply_rotary_pos_emb", lambda x, *args: original(x, x, *args)[0])

    def rotate(rope, q, k, *args):
        return rope(q, *args), rope(k, *args)

    changed_attention(monkeypatch, rotate)
    judged()


def test_arrays_without_the_axis_of_the_batch_are_recorded(model, judged):
    for layer in model.model.layers:
        forward = layer.mlp.gate_proj.forward
        layer.mlp.gate_proj.forward = lambda x, forward=forward: forward(x)[0]
    arrays = judged()
    assert arrays["prefill/layers.0.mlp.gate"].shape == (5, 64)


# --- several ranks --------------------------------------------------------------------------------------


def test_each_rank_writes_a_file_to_a_folder(model, tmp_path):
    for rank in range(2):
        with minitp.probe.record(model, tmp_path / "engine.safetensors", rank=rank, ranks=2):
            model(ids(*PROMPT))
    assert sorted(os.listdir(tmp_path / "engine")) == ["rank0.safetensors", "rank1.safetensors"]
    metadata, _ = metadata_of(tmp_path / "engine" / "rank1.safetensors")
    assert (metadata["tp"], metadata["rank"]) == ("2", "1")


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for PyTorch on rank 1 of 2; the all-reduce of torch.distributed doubles what it gets."""

    def all_reduce(tensor):
        tensor.array *= 2

    distributed = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_rank=lambda: 1,
        get_world_size=lambda: 2,
        all_reduce=all_reduce,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(distributed=distributed))
    return sys.modules["torch"]


def test_the_rank_and_the_partial_sums_are_those_of_torch_distributed(model, torch, tmp_path):
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):

            def forward(x, forward=linear.forward):
                output = forward(x)
                torch.distributed.all_reduce(output)
                return output

            linear.forward = forward
    original = torch.distributed.all_reduce
    with minitp.probe.record(model, tmp_path / "engine"):
        model(ids(*PROMPT))
    assert torch.distributed.all_reduce is original
    with safe_open(tmp_path / "engine" / "rank1.safetensors", "np") as file:
        for block in ("layers.0.attn", "layers.1.attn", "layers.0.mlp", "layers.1.mlp"):
            own, out = (file.get_tensor(f"prefill/{block}.{step}") for step in ("out_partial", "out"))
            assert own.shape == (len(PROMPT), 36)
            np.testing.assert_array_equal(out, 2 * own)


def test_parts_of_heads_are_refused():
    fields = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
    words = "attn.k of rank 1 has 3 columns, not whole heads of 6; use a number of ranks that divides the KV"
    with pytest.raises(InputError, match=words):
        ProbeRecorder(fields, 1, 8).local_sizes(["attn.k"], "1 T Kd", np.zeros((1, 5, 3)))


def test_a_rank_that_cannot_be_known_is_refused(model, torch, tmp_path):
    def refused(words, **options):
        with pytest.raises(InputError, match=words), minitp.probe.record(model, tmp_path / "e", **options):
            pass

    refused("rank 0, ranks None: give both or neither", rank=0)
    refused("rank 2: expected 0 to 1, because ranks is 2", rank=2, ranks=2)
    model._tp_size = 4
    refused("sharded over 4 of 2 processes; give the rank= and ranks= of each process")


# --- other models, caches and outputs -------------------------------------------------------------------


def arrays_in(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_another_model_of_the_same_kind_is_not_recorded(model, tmp_path):
    """The other one calls the same functions, in this thread or in another, while the first model runs."""
    other = FakeLlama(GOLDENS / "llama2")
    with minitp.probe.record(model, tmp_path / "alone.safetensors"):
        model(ids(*PROMPT))
    model = FakeLlama(GOLDENS / "llama2")

    def run_other(*_):
        thread = threading.Thread(target=other, args=(ids(*PROMPT[::-1]),))
        thread.start()
        thread.join()

    model.model.layers[1].self_attn.o_proj.before.append((run_other, False))
    with minitp.probe.record(model, tmp_path / "beside.safetensors"):
        other(ids(9, 8, 7))
        model(ids(*PROMPT))
        other(ids(9, 8, 7))
    alone, beside = (arrays_in(tmp_path / f"{name}.safetensors") for name in ("alone", "beside"))
    assert alone.keys() == beside.keys()
    for name, array in alone.items():
        np.testing.assert_array_equal(beside[name], array, err_msg=name)


def test_two_models_are_recorded_at_once(model, tmp_path):
    other = FakeLlama(GOLDENS / "llama2")
    recorded = minitp.probe.record(model, tmp_path / "a.safetensors")
    with recorded, minitp.probe.record(other, tmp_path / "b.safetensors"):
        other(ids(*PROMPT))
        model(ids(*PROMPT))
    a, b = (arrays_in(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.keys() == b.keys()


@pytest.mark.parametrize("length", [1, 4])
def test_a_cache_of_other_tokens_is_refused(length, model, tmp_path):
    cache = SimpleNamespace(get_seq_length=lambda: length)
    words = f"reads a cache of {length} position.*, but the recording has 0 tokens"
    with pytest.raises(InputError, match=words), minitp.probe.record(model, tmp_path / "steps.safetensors"):
        model(ids(*PROMPT), past_key_values=cache)


def test_a_loss_before_the_logits_is_passed_over(model, tmp_path):
    forward = model.forward

    def with_loss(*args, **kwargs):
        return FakeTensor(np.float32(2.5)), forward(*args, **kwargs).logits

    with minitp.probe.record(model, tmp_path / "plain.safetensors"):
        model(ids(*PROMPT))
    model = FakeLlama(GOLDENS / "llama2")
    forward, model.forward = model.forward, with_loss
    with minitp.probe.record(model, tmp_path / "loss.safetensors"):
        model(ids(*PROMPT))
    plain, loss = (arrays_in(tmp_path / f"{name}.safetensors") for name in ("plain", "loss"))
    np.testing.assert_array_equal(loss["prefill/logits"], plain["prefill/logits"])


def test_a_folder_and_a_compiled_layer_are_refused_before_the_run(model, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    refused = pytest.raises(InputError, match=r"folder\.safetensors: a folder; give the name of a file")
    with refused, minitp.probe.record(model, tmp_path / "folder.safetensors"):
        model(ids(*PROMPT))
    wrapped = FakeModule()
    wrapped._orig_mod = model.model.layers[1]
    model.model.layers[1] = wrapped
    refused = pytest.raises(InputError, match=r"^model\.layers\.1 is compiled by torch\.compile")
    with refused, minitp.probe.record(model, tmp_path / "steps.safetensors"):
        model(ids(*PROMPT))


def test_the_own_attention_of_the_model_is_noted(model, tmp_path):
    with minitp.probe.record(model, tmp_path / "steps.safetensors"):
        model(ids(*PROMPT))
    with safe_open(tmp_path / "steps.safetensors", "np") as file:
        assert file.metadata()["attention"] == "sdpa"
