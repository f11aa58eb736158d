"""The probe of mlx-lm, with a NumPy model that has its modules and caches."""

import json
import sys
from types import SimpleNamespace

import fake_mlx
import ml_dtypes
import numpy as np
import pytest
from engine_models import NEXT, PROMPT, write_engine_model
from fake_mlx import KVCache, MlxLinear, MlxLlama, RotatingKVCache
from safetensors import safe_open

import minitp.probe
from minitp.errors import InputError
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.probe.recorder import to_numpy
from minitp.trace.reference import open_oracle


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_engine_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture
def model(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.models.cache", fake_mlx)
    return MlxLlama(directory)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "steps.safetensors"


def blamed(path, directory):
    source = open_model(str(directory), 1)
    judgement = judge(EngineRecording(RecordedFiles(path), source), open_oracle(source))
    return [finding.step for finding in judgement.result.blamed()], judgement


def test_a_recording_has_the_steps_of_prefill_and_decoding(model, directory, path):
    call, update = MlxLinear.__call__, KVCache.update_and_fetch
    with minitp.probe.record(model, path):
        cache = model.make_cache()
        model(np.array([PROMPT]), cache)
        model(np.array([[NEXT]]), cache=cache)
        assert MlxLinear.__call__ is not call
    assert MlxLinear.__call__ is call
    assert KVCache.update_and_fetch is update
    steps, judgement = blamed(path, directory)
    assert steps == []
    assert {"attn.scores", "attn.probs", "positions"} <= set(judgement.missing)
    assert not {"attn.k_cache", "attn.q_rope", "attn.context", "mlp.act"} & set(judgement.missing)
    with safe_open(path, "np") as file:
        assert file.metadata()["source"] == "mlx-lm, llama"
        assert json.loads(file.metadata()["passes"]) == [["prefill", 0, 4], ["decode.1", 4, 5]]


def test_a_fault_in_a_module_is_blamed_on_its_step(model, directory, path):
    model.model.layers[1].self_attn.rope.frequencies = model.frequencies * 1.01
    with minitp.probe.record(model, path):
        model(np.array([PROMPT]))  # without a cache
    assert blamed(path, directory)[0] == ["attn.q_rope", "attn.k_rope"]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"root": 1.0}, "the scores are not scaled"),
        ({"ahead": 1}, "the mask is off by one: a query sees the key after its own"),
        ({"repeat": lambda x, n, axis: np.concatenate([x] * n)}, "the KV heads are tiled"),
    ],
)
def test_a_mistake_within_fused_attention_is_named(model, directory, path, mistake, words):
    """Check that the mistake is found in the context, because scores and probabilities are no arrays."""
    vars(model.model.layers[0].self_attn).update(mistake)
    with minitp.probe.record(model, path):
        model(np.array([PROMPT]), model.make_cache())
    steps, judgement = blamed(path, directory)
    assert steps == ["attn.context"]
    assert words in judgement.explanation


def test_a_cache_is_recorded_until_it_overwrites_its_first_positions(model, path):
    for size, is_recorded in ((4, True), (3, False)):
        with minitp.probe.record(model, path):
            model(np.array([PROMPT]), model.make_cache(RotatingKVCache, size))
        with safe_open(path, "np") as file:
            assert ("prefill/layers.0.attn.k_cache" in file.keys()) == is_recorded  # noqa: SIM118


def test_what_the_probe_cannot_record_is_refused(model, path):
    def refused(words, run=lambda: None, **options):
        with pytest.raises(InputError, match=words), minitp.probe.record(model, path, **options):
            run()

    refused("recipe 'bert': there are recipes for llama, ", recipe="bert")
    refused(r"one sequence, with inputs \[1, T\]", lambda: model(np.array([PROMPT, PROMPT])))

    def without_cache():
        model(np.array([PROMPT]))
        model(np.array([[NEXT]]))

    refused("give its later passes the cache of the first", without_cache)
    refused("no forward pass was run")


def test_steps_that_mlx_lm_rounds_are_named_in_the_metadata(model, path):
    model.args.model_type = "gemma3_text"
    with minitp.probe.record(model, path, recipe="llama"):
        model(np.array([PROMPT]))
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["roundings"]) == {"embed": "bfloat16"}


def test_bfloat16_of_mlx_is_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace(uint16=np.uint16))
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    copied = to_numpy(SimpleNamespace(dtype="mlx.core.bfloat16", view=array.view))
    assert copied.dtype == array.dtype
    np.testing.assert_array_equal(copied, array)
