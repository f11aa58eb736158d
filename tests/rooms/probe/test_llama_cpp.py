"""The probe of llama.cpp, with a stand-in for ggml that computes the arrays of a real recording."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from engine_models import write_engine_model
from fake_ggml import FakeGgml, FakeGraph, play
from paths import ENGINE_RECORDINGS
from safetensors import safe_open
from safetensors.numpy import load_file

import minitp.probe
from minitp.errors import InputError
from minitp.probe.ggml import CALLBACK

PASSES = ["prefill", "decode.1"]


@pytest.fixture
def arrays():
    """The arrays of a recording with a cache in float16."""
    return load_file(ENGINE_RECORDINGS / "llama.cpp-llama.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_engine_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "steps.safetensors"


def test_the_tensors_of_a_graph_are_recorded_as_steps(arrays, model, path):
    with minitp.probe.record_llama_cpp(path, model, FakeGgml()) as recorder:
        assert play(recorder.observe, FakeGraph(arrays).passes(PASSES, 2))
    recorded = load_file(path)
    assert set(recorded) == set(arrays)
    for name, array in arrays.items():
        assert recorded[name].dtype == array.dtype, name
        np.testing.assert_array_equal(recorded[name], array, err_msg=name)
    with safe_open(path, "np") as file:
        assert file.metadata()["source"] == "llama.cpp, llama"
        assert file.metadata()["roundings"] == '{"attn.probs": "float16", "attn.context": "float16"}'


def test_experts_are_recorded_in_the_order_of_their_numbers(tmp_path, path):
    """Check a mixture, of which ggml computes the expert with the largest logit first."""
    arrays = load_file(ENGINE_RECORDINGS / "llama.cpp-mixtral.safetensors")
    with minitp.probe.record_llama_cpp(path, write_engine_model(tmp_path, "mixtral"), FakeGgml()) as recorder:
        assert play(recorder.observe, FakeGraph(arrays).passes(PASSES, 2))
    recorded = load_file(path)
    assert set(recorded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(recorded[name], array, err_msg=name)


def test_contexts_that_are_made_within_the_block_get_the_callback(arrays, model, path, monkeypatch):
    def create(_, params):
        return params

    bindings = SimpleNamespace(llama_init_from_model=create, ggml_backend_sched_eval_callback=CALLBACK)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", bindings)
    with minitp.probe.record_llama_cpp(path, model, FakeGgml()):
        params = bindings.llama_init_from_model("model", SimpleNamespace(cb_eval=None))
        assert play(params.cb_eval, FakeGraph(arrays).passes(PASSES, 2))
    assert bindings.llama_init_from_model is create
    assert play(params.cb_eval, FakeGraph(arrays).passes(PASSES[:1], 2))  # the context may be used further
    assert set(load_file(path)) == set(arrays)


def test_what_the_probe_cannot_record_is_refused(arrays, model, path):
    def refused(words, graph, passes=PASSES, ggml=None):
        with (
            pytest.raises(InputError, match=words) as caught,
            minitp.probe.record_llama_cpp(path, model, ggml or FakeGgml()) as recorder,
        ):
            play(recorder.observe, graph.passes(passes, 2))
        assert len(str(caught.value)) < 300
        assert not path.exists()

    name = "prefill/layers.1.attn.residual"
    cut = FakeGraph(arrays | {name: arrays[name][-1:]})
    refused("ffn_inp-1 has 1 of 4 tokens, .* ask for the logits of all tokens", cut)
    twice = ["prefill", "prefill"]
    refused(r"decode.1 has positions \[0, 1, 2, 3\], expected 4 to 7: .* one", FakeGraph(arrays), twice)
    quantized = FakeGraph(arrays, types={"cache_k_l0 (view)": 8})
    refused("has ggml type 8, .* leave out type_k and type_v", quantized)
    other = FakeGgml()
    other.ggml_get_name = lambda address: b"another name"
    refused("another struct ggml_tensor", FakeGraph(arrays), ggml=other)
    refused("not the ggml library", FakeGraph(arrays), ggml=SimpleNamespace())


def test_an_error_of_the_probe_replaces_that_of_the_binding(arrays, model, path):
    """A binding raises an error of its own if the callback ends a pass."""
    cut = FakeGraph(arrays | {"prefill/final_norm": arrays["prefill/final_norm"][-1:]})

    def decode(observe):
        if not play(observe, cut.passes(PASSES, 2)):
            raise RuntimeError("llama_decode returned -3")

    with (
        pytest.raises(InputError, match="ask for the logits of all tokens"),
        minitp.probe.record_llama_cpp(path, model, FakeGgml()) as recorder,
    ):
        decode(recorder.observe)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        minitp.probe.record_llama_cpp(path, model, FakeGgml()) as recorder,
    ):
        raise RuntimeError("out of memory")
    assert recorder.ended
    assert not path.exists()


def test_a_recording_needs_llama_cpp_and_a_pass(model, path, monkeypatch):
    monkeypatch.delitem(sys.modules, "llama_cpp.llama_cpp", raising=False)
    with pytest.raises(InputError, match="import llama_cpp"), minitp.probe.record_llama_cpp(path, model):
        pass
    with (
        pytest.raises(InputError, match="no forward pass was run"),
        minitp.probe.record_llama_cpp(path, model, FakeGgml()),
    ):
        pass
    with (
        pytest.raises(InputError, match="there is no folder"),
        minitp.probe.record_llama_cpp(path.parent / "missing" / "x", model, FakeGgml()),
    ):
        pass
