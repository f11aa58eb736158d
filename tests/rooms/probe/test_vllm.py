"""The probe of vLLM, with a NumPy model that has its modules and signatures."""

import json

import pytest
from engine_models import NEXT, PROMPT, write_engine_model
from fake_vllm import VllmLlama
from safetensors import safe_open

import minitp.probe
from minitp.errors import InputError
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.trace.reference import open_oracle


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_engine_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture
def model(directory):
    return VllmLlama(directory)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "steps.safetensors"


def judged(path, directory):
    source = open_model(str(directory), 1)
    return judge(EngineRecording(RecordedFiles(path), source), open_oracle(source))


def test_a_recording_has_the_steps_of_prefill_and_decoding(model, directory, path):
    with minitp.probe.record(model, path):
        model.run(PROMPT, 0)
        model.run([NEXT], len(PROMPT))
    judgement = judged(path, directory)
    assert judgement.result.blamed() == []
    unseen = {"embed_partial", "logits_partial", "attn.scores", "attn.probs", "attn.k_cache", "attn.v_cache"}
    assert set(judgement.missing) == unseen | {"attn.out_partial", "mlp.out_partial"}
    with safe_open(path, "np") as file:
        assert file.metadata()["source"] == "vLLM, llama"
        assert json.loads(file.metadata()["token_ids"]) == [*PROMPT, NEXT]
        assert file.get_slice("prefill/final_norm").get_shape() == [1, 64]  # the position of the logits
        streams = [name for name in file.keys() if name.endswith("mlp.residual")]  # noqa: SIM118
    assert sorted(streams)[2:] == [f"prefill/layers.{i}.mlp.residual" for i in range(2)]


def test_a_fault_in_a_module_is_blamed_on_its_step(model, directory, path):
    model.model.layers[1].post_attention_layernorm.eps = 0.1
    with minitp.probe.record(model, path):
        model.run(PROMPT, 0)
    blamed = judged(path, directory).result.blamed()
    assert [finding.name for finding in blamed] == ["prefill/layers.1.mlp.norm"]


def test_what_the_probe_cannot_record_is_refused(model, path):
    def refused(words, run=lambda: None, **options):
        with pytest.raises(InputError, match=words), minitp.probe.record(model, path, **options):
            run()

    refused("recipe 'bert': there are recipes for llama, ", recipe="bert")
    refused(
        r"prefill has positions \[2, 3, 4, 5\], expected 0 to 3: .* without", lambda: model.run(PROMPT, 2)
    )
    refused("no forward pass was run")
    body = model.model
    model.model = lambda *inputs: body(*inputs)  # no module to hook, as after torch.compile
    refused("compiled graph, .* enforce_eager=True", lambda: model.run(PROMPT, 0))
