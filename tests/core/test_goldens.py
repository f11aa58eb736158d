"""Tests of every family, with 1 to 4 ranks, against results of Hugging Face transformers (tests/goldens)."""

import json

import numpy as np
import pytest
from paths import GOLDENS

from minitp.comm import run_threads
from minitp.device import open_device
from minitp.generate import generate
from minitp.loading.source import open_model
from minitp.loading.weights import Loader
from minitp.model import Model
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.text.tokenizer import load_tokenizer

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))
NAMES_AND_TP = [(name, tp) for name in NAMES for tp in (1, 2, 3, 4)]  # every model has at least four heads


def golden_of(name):
    with np.load(GOLDENS / name / "golden.npz") as file:
        return dict(file)


def on_ranks(name, tp, function):
    """Return function(model, source) of each rank, in rank order; the models compute in float32."""
    source = open_model(str(GOLDENS / name), tp)
    device = open_device("float32")

    def run(comm):
        weights = Loader(source.plan, comm.rank, source.tensors, device).load()
        return function(Model(source.config, source.plan, weights, comm, device), source)

    return run_threads(tp, run)


def continuation(model, source, golden, use_cache):
    """Return as many greedy tokens as the golden has, ignoring end-of-text tokens, and rank 0's Request."""
    prompt = golden["prompt"].tolist()
    params = SamplingParams(max_new_tokens=len(golden["continuation"]), ignore_eos=True)
    request = None
    if model.comm.rank == 0:
        limit = source.config.max_position_embeddings
        request = Request(params, source.config.eos_token_ids, prompt, limit, source.tokenizer())
    return list(generate(model, prompt, request, use_cache)), request


def assert_close(got, expected, tolerance):
    """Check that two arrays are close, both in their norm and at the worst element."""
    assert got.shape == expected.shape
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_all_goldens_are_there():
    llama = "llama1 llama2 llama-bias llama3 llama-linear tinyllama smollm2 text"
    mistral = "mistral-v01 mistral-v02 mistral-v03 mistral-nemo"
    qwen = "qwen2 qwen2-window qwen3 qwen3-bias qwen3-yarn"
    phi = "phi3 phi3-longrope phi3-partial phi3-half"
    gemma = "gemma2 gemma2-uncapped gemma3 gemma3-older"
    experts = "mixtral mixtral-window qwen3-moe qwen3-moe-window"
    others = "granite granite-bias smollm3 smollm3-window"
    assert sorted(" ".join((llama, mistral, qwen, phi, gemma, experts, others)).split()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_is_read_completely(name):
    assert open_model(str(GOLDENS / name), 1).config.unread == ()


@pytest.mark.parametrize(("name", "tp"), NAMES_AND_TP)
def test_logits_are_those_of_transformers(name, tp):
    golden = golden_of(name)

    def logits(model, source):
        return model.forward(golden["prompt"], model.new_cache(), logits_at=slice(None))

    every_rank = on_ranks(name, tp, logits)
    for got in every_rank:
        assert got.dtype == np.float32
        assert_close(got, golden["logits"], 1e-4)
        np.testing.assert_array_equal(got, every_rank[0])


@pytest.mark.parametrize(("name", "tp"), NAMES_AND_TP)
def test_greedy_continuation_is_that_of_transformers(name, tp):
    golden = golden_of(name)
    expected = golden["continuation"].tolist()
    assert len(expected) >= 16
    assert golden["gap"] > 1e-2
    for tokens, request in on_ranks(name, tp, lambda *rank: continuation(*rank, golden, use_cache=True)):
        assert tokens == expected
        assert request is None or (request.token_ids, request.finish_reason) == (expected, "length")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuation_without_cache(name):
    golden = golden_of(name)
    for tokens, _ in on_ranks(name, 2, lambda *rank: continuation(*rank, golden, use_cache=False)):
        assert tokens == golden["continuation"].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(1, 22, 1), (8, 8, 8), (5, 6, 7, 6)])
def test_prompt_in_several_passes_gives_the_same_logits(name, pieces):
    """The later passes read earlier keys from the cache, and their windows move forward."""
    golden = golden_of(name)

    def logits(model, source):
        cache, parts = model.new_cache(), []
        for stop in np.cumsum(pieces):
            parts.append(model.forward(golden["prompt"][cache.length : stop], cache, logits_at=slice(None)))
        return np.concatenate(parts)

    assert_close(on_ranks(name, 3, logits)[0], golden["logits"][: sum(pieces)], 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_oracle_agrees_with_transformers(name):
    from minitp.oracle import Oracle

    golden = golden_of(name)
    logits = Oracle.from_directory(GOLDENS / name).logits(golden["prompt"].tolist())
    assert logits.dtype == np.float64
    assert_close(logits, golden["logits"], 1e-5)


def test_text_of_a_continuation():
    golden = golden_of("text")
    tokenizer = load_tokenizer(GOLDENS / "text")
    assert tokenizer.encode(str(golden["prompt_text"])) == golden["prompt"].tolist()
    _, request = on_ranks("text", 4, lambda *rank: continuation(*rank, golden, use_cache=True))[0]
    assert request.text == str(golden["text"])


def test_end_of_text_token_ends_the_generation():
    golden = golden_of("text")
    eos = json.loads((GOLDENS / "text" / "config.json").read_text())["eos_token_id"]
    expected = golden["continuation"].tolist()
    expected = expected[: expected.index(eos) + 1]
    assert len(expected) < len(golden["continuation"])

    def until_eos(model, source):
        prompt = golden["prompt"].tolist()
        request = Request(SamplingParams(max_new_tokens=20), source.config.eos_token_ids, prompt, 256)
        return list(generate(model, prompt, request)), request.finish_reason

    tokens, finish_reason = on_ranks("text", 4, until_eos)[0]
    assert (tokens, finish_reason) == (expected, "stop")
