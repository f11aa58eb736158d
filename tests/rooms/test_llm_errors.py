"""Tests of `LLM`: what it refuses, with one clear line before anything is computed, and how it closes."""

import gc
import os
import sys
import threading

import numpy as np
import pytest
from llm_reference import END_S, LONG, alone, wait_until
from safetensors.numpy import load_file, save_file
from tiny import write_tiny

from minitp import LLM, SamplingParams
from minitp import llm as llm_module
from minitp.errors import InputError, RankError
from minitp.util import environment

CONTEXT = 64


@pytest.fixture(scope="module")
def llm(tiny):
    """An LLM with a tokenizer and without a chat template."""
    with LLM(tiny, tp=1, cache_tokens=CONTEXT) as llm:
        yield llm


@pytest.fixture
def idle(llm, monkeypatch):
    """The same LLM, which fails if its ranks get a request."""

    def no_request(*_):
        raise AssertionError("a request was sent")

    monkeypatch.setattr(llm._ranks, "add", no_request)
    return llm


def test_a_gpu_needs_cupy(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InputError, match="--device cuda needs CuPy: pip install "):
        LLM(tiny, device="cuda")


def refusal(call):
    """Return the message of the InputError that a call raises, and check that it is one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def pids(llm):
    """Return the process ids of the ranks of an LLM."""
    return [rank.pid for rank in llm._ranks._job.ranks.values()]


def running(processes):
    return [pid for pid in processes if os.path.exists(f"/proc/{pid}")]


# --- prompts and params ---------------------------------------------------------------------------------


NO_PROMPT = "expected a string or a list of token ids"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ([[]], NO_PROMPT),
        (None, f"prompt None: {NO_PROMPT}"),
        (5, f"prompt 5: {NO_PROMPT}"),
        (b"Hi", f"prompt b'Hi': {NO_PROMPT}"),
        ({"text": "Hi"}, f"prompt {{'text': 'Hi'}}: {NO_PROMPT}"),
        ([1, 2.5], NO_PROMPT),
        ([[1], [2.5]], f"prompt [2.5]: {NO_PROMPT}"),
        ([[[1]]], f"prompt [[1]]: {NO_PROMPT}"),
        (np.ones((2, 3)), NO_PROMPT),
        ([[0.5] * 1000], NO_PROMPT),
        ([258], "token id 258 is outside the vocabulary, 0 to 257"),
        ([-1], "token id -1 is outside the vocabulary, 0 to 257"),
        ([1] * CONTEXT, f"the prompt has {CONTEXT} tokens, which leaves no room for a new one"),
        ("x" * 70, f"the prompt has 70 tokens, which leaves no room for a new one in a context of {CONTEXT}"),
        ("\ud800", ""),
    ],
)
def test_an_invalid_prompt_is_rejected(idle, prompt, words):
    """The prompt is refused alone, in a stream, and in a list, whose other prompts are not computed."""
    message = refusal(lambda: idle.generate(prompt))
    assert words in message
    assert len(message) < 150
    several = prompt if isinstance(prompt, list) and isinstance(prompt[0], list) else [prompt]
    refusal(lambda: idle.generate(["Hi", *several]))
    refusal(lambda: idle.stream(several[-1]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens -1: expected 0 or more"),
        ({"temperature": -1}, "temperature -1: expected 0 or a positive number"),
        ({"top_p": 2}, "top_p 2: expected above 0 and at most 1"),
        ({"stop": 5}, "stop 5: expected up to 32 non-empty strings"),
        ({"max_tokens": 5}, "SamplingParams has no parameter max_tokens; did you mean max_new_tokens?"),
        ({"params": {"temperature": 1.0}}, "{'temperature': 1.0}"),
        ({"params": "greedy"}, "'greedy'"),
    ],
)
def test_invalid_params_are_rejected(idle, options, words):
    for call in (idle.generate, idle.stream):
        assert words in refusal(lambda call=call: call("Hi", **options))
    assert words in refusal(lambda: idle.generate(["Hi", "Ho"], **options))


def test_fewer_params_than_prompts_are_rejected(idle):
    words = "1 SamplingParams for 2 prompts; pass one, or one for each"
    assert refusal(lambda: idle.generate(["Hi", "Ho"], [SamplingParams()])) == words


def test_chat_without_a_chat_template_is_rejected(idle, tiny):
    for call in (idle.chat, idle.stream_chat, idle.encode_chat):
        words = f"{tiny} has no chat template, so it cannot chat; ask for a completion, or use a chat model"
        assert refusal(lambda call=call: call([{"role": "user", "content": "Hi"}])) == words


# --- models and options ---------------------------------------------------------------------------------


def test_random_weights_take_token_ids_only():
    name, params = "random:smollm2-135m", SamplingParams(max_new_tokens=3)
    with LLM(name, tp=1, layers=1, cache_tokens=CONTEXT, dtype="float32") as llm:
        completion = llm.generate([1, 2], params)
        assert completion.token_ids == alone(name, [([1, 2], params)], tp=1, layers=1)[0].token_ids
        assert completion.text == ""
        no_text = f"{name} has no tokenizer.json; pass token ids as the prompt"
        assert refusal(lambda: llm.generate("Hi")) == no_text
        assert refusal(lambda: llm.stream([1, 2])) == no_text
        assert refusal(lambda: llm.chat("Hi")) == f"{name} has no chat template: its weights are random"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 4}, "no parameter max_batch"),
        ({"layer": 1}, "no parameter layer; did you mean layers?"),
        ({"tp": 0}, "--tp 0: expected at least 1 rank"),
        ({"tp": 5}, "--tp 5: this model has 4 attention heads"),
        ({"tp": 1.5}, "--tp 1.5: expected a number of ranks, or auto"),
        ({"dtype": "float8"}, "'float8'"),
        ({"max_context": 513}, "--max-context 513: this model's context is 512 tokens"),
        ({"max_context": 0}, "--max-context 0"),
        ({"cache_tokens": 15}, "--cache-tokens 15: expected at least 16, one block"),
        ({"cache_tokens": "much"}, "'much'"),
        ({"block_size": 0}, "--block-size 0: expected at least 1"),
        ({"max_sequences": 0}, "--max-sequences 0: expected at least 1"),
        ({"max_tokens_per_step": -1}, "--max-tokens-per-step -1: expected at least 1"),
        ({"layers": 3}, "--layers 3"),
        ({"model": "/no/such/model"}, "/no/such/model: no such directory"),
        ({"model": "random:gpt-9"}, "random:gpt-9: unknown model"),
    ],
)
def test_an_invalid_option_is_rejected_before_ranks_are_started(tiny, monkeypatch, options, words):
    def no_ranks(*_, **__):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(llm_module, "StartedRanks", no_ranks)
    assert words in refusal(lambda: LLM(**{"model": tiny, "tp": 2, **options}))


def test_a_bad_model_that_only_the_ranks_detect_is_an_input_error(tmp_path):
    """config.json says that the embeddings are tied, but the weights differ, which takes reading them."""
    path = write_tiny(tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": 1 + tensors["model.embed_tokens.weight"]}, path)
    for tp in (1, 2):
        assert "lm_head.weight" in refusal(lambda tp=tp: LLM(tmp_path, tp=tp))


def test_a_cache_that_is_larger_than_memory_is_rejected(tiny):
    with pytest.raises(RankError, match=r"^rank 0 failed: .*Memory"):
        LLM(tiny, tp=2, cache_tokens=10**16)


@pytest.mark.parametrize(
    ("options", "context"),
    [({"max_context": 20}, 20), ({"cache_tokens": 50}, 48), ({"cache_tokens": 600}, 512)],
)
def test_the_context_is_limited_by_max_context_and_the_cache(tiny, options, context):
    """A continuation may fill the context, and a prompt that fills it is refused."""
    with LLM(tiny, tp=1, **options) as llm:
        assert llm.description["context"] == context
        completion = llm.generate([1] * (context - 5), max_new_tokens=50, ignore_eos=True)
        assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
        assert f"the prompt has {context} tokens" in refusal(lambda: llm.generate([1] * context))


@pytest.mark.parametrize(("cores", "ranks"), [(1, 1), (3, 3), (16, 4)])
def test_auto_starts_a_rank_per_physical_core_up_to_four(tiny, monkeypatch, cores, ranks):
    monkeypatch.setattr(environment, "physical_cores", lambda: cores)
    params = SamplingParams(max_new_tokens=8)
    with LLM(tiny, cache_tokens=CONTEXT) as llm:
        assert llm.description["tp"] == len(pids(llm)) == ranks
        tokens = llm.generate([1, 2, 3], params).token_ids
    assert tokens == alone(tiny, [([1, 2, 3], params)], tp=ranks)[0].token_ids


def test_one_rank_needs_no_mpirun_and_several_ranks_do(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with LLM(tiny, tp=1, cache_tokens=CONTEXT) as llm:
        assert len(llm.generate([1], max_new_tokens=4).token_ids) == 4
    with pytest.raises(RankError, match=r"^no mpirun found; "):
        LLM(tiny, tp=2)


def test_load_is_known_from_the_start(tiny):
    for _ in range(3):
        with LLM(tiny, tp=2, cache_tokens=CONTEXT) as llm:
            assert {"running": 0, "waiting": 0, "blocks_in_use": 0}.items() <= llm.load.items()


# --- closing --------------------------------------------------------------------------------------------


def test_every_call_after_closing_raises_a_rank_error(tiny):
    ended = []
    with LLM(tiny, tp=2, cache_tokens=CONTEXT, on_end=ended.append) as llm:
        assert llm.error is None
        ranks = pids(llm)
        started = llm.stream("Hi")
        assert next(started)
        assert len(running(ranks)) == 2
    assert running(ranks) == []
    for call in (
        lambda: llm.generate("Hi"),
        lambda: llm.generate(["Hi", "Ho"]),
        lambda: next(llm.stream("Hi")),
        lambda: list(started),
        lambda: llm.submit([1], SamplingParams(), print),
    ):
        with pytest.raises(RankError, match=r"^the ranks have been closed$"):
            call()
    assert str(llm.error) == "the ranks have been closed"
    llm.close()
    assert ended == []


def test_closing_ends_running_requests(tmp_path):
    errors = []
    with LLM(write_tiny(tmp_path, max_position_embeddings=1_000_000), tp=2, cache_tokens=500_000) as llm:

        def ask(call):
            with pytest.raises(RankError) as caught:
                call()
            errors.append(str(caught.value))

        calls = [lambda: llm.generate([[1], [2]], LONG), lambda: list(llm.stream("Hi", LONG))]
        threads = [threading.Thread(target=ask, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        wait_until(lambda: llm.load.get("running") == 3)
    for thread in threads:
        thread.join(END_S)
    assert errors == ["the ranks have been closed"] * 2


@pytest.mark.parametrize("cycle", [False, True])
def test_an_unreferenced_llm_ends_its_ranks(tiny, cycle):
    llm = LLM(tiny, tp=2, cache_tokens=CONTEXT)
    llm.generate("Hi", max_new_tokens=2)
    ranks = pids(llm)
    if cycle:
        llm.itself = llm
    del llm
    if cycle:
        gc.collect()
    assert running(ranks) == []


def test_an_llm_may_be_collected_in_the_thread_that_listens_to_its_ranks(tiny, monkeypatch):
    """Python may collect garbage in any thread, and closing an LLM waits for this one."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    llm = LLM(tiny, tp=2, cache_tokens=512)
    ranks = pids(llm)
    llm.itself = llm
    llm.submit([1, 2], SamplingParams(max_new_tokens=500, ignore_eos=True), lambda update: gc.collect())
    del llm
    wait_until(lambda: running(ranks) == [])
    assert [str(error.exc_value) for error in unraisable] == []
