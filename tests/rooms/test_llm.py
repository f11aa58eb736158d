"""`LLM`: single prompts, many at a time, streams, several threads, and conversations."""

import io
import json
import os
import random
import signal
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from llm_reference import CONTEXT, END_S, LONG, TP, alone, wait_until, write_model
from tiny import BOS, EOS, byte_tokenizer

from minitp import LLM, Completion, SamplingParams
from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.errors import ContextError, InputError
from minitp.load import load_model
from minitp.loading.source import open_model


def check(completions, requests):
    """Check that completions equal those of requests that ran alone."""
    expected = [Completion(r.prompt_ids, r.token_ids, r.text, r.finish_reason) for r in requests]
    assert [replace(one, logprobs=[], prompt_logprobs=[], cached_tokens=0) for one in completions] == expected


def ids(text):
    return byte_tokenizer().encode(text).ids


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, tp=TP, block_size=4, cache_tokens=CONTEXT, max_sequences=6) as llm:
        yield llm


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """An LLM that generates for minutes unless it is stopped, and puts <s> before a text."""
    directory = write_model(
        tmp_path_factory.mktemp("models") / "endless", bos=True, max_position_embeddings=1_000_000
    )
    with LLM(directory, tp=1, cache_tokens=500_000) as llm:
        yield llm


def random_prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(count)]


# --- one prompt and many --------------------------------------------------------------------------------


def test_many_prompts_get_the_same_completions_as_alone(llm, model):
    """Generate from 24 prompts, of which 6 run at once and preempt each other."""
    wanted = [(p, SamplingParams(max_new_tokens=100, ignore_eos=True)) for p in random_prompts(24)]
    completions = llm.generate([p for p, _ in wanted], max_new_tokens=100, ignore_eos=True)
    check(completions, alone(model, wanted))
    assert llm.load["preempted"] > 0
    assert (llm.load["running"], llm.load["waiting"], llm.load["blocks_in_use"]) == (0, 0, 0)


def test_a_text_and_its_token_ids_get_the_same_completion(llm, model):
    expected = alone(model, [(ids("Hello"), SamplingParams(max_new_tokens=20))])
    for prompt in ("Hello", ids("Hello"), tuple(ids("Hello")), [np.int64(token) for token in ids("Hello")]):
        check([llm.generate(prompt, max_new_tokens=20)], expected)
        check(llm.generate([prompt], max_new_tokens=20), expected)
    assert llm.generate([]) == []


def test_texts_and_token_ids_with_different_params_keep_their_order(llm, model):
    """Generate from four prompts, the first of which takes longest."""
    each = [SamplingParams(max_new_tokens=n) for n in (60, 1, 30, 2)]
    completions = llm.generate(["Hello", ids("Bye"), "H", [7]], each)
    check(completions, alone(model, list(zip([ids("Hello"), ids("Bye"), ids("H"), [7]], each, strict=True))))


def test_options_override_fields_of_params(llm, model):
    params = SamplingParams(max_new_tokens=9, temperature=1.0, seed=3)
    expected = alone(
        model, [([1], replace(params, seed=4)), ([2], replace(params, seed=4, max_new_tokens=5))]
    )
    check([llm.generate([1], params, seed=4)], expected[:1])
    check(llm.generate([[1], [2]], [params, replace(params, max_new_tokens=5)], seed=4), expected)
    assert params.seed == 3


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm, model):
    wanted = [
        (p, SamplingParams(max_new_tokens=30, temperature=2.0, seed=n)) for n, p in enumerate([[1]] * 8)
    ]
    expected = alone(model, wanted)
    check(llm.generate([p for p, _ in wanted], [params for _, params in wanted]), expected)
    check([llm.generate(*wanted[3])], expected[3:4])
    assert len({tuple(r.token_ids) for r in expected}) == 8


def test_without_a_seed_every_text_differs(llm):
    drawn = llm.generate([[1]] * 5, temperature=3.0, max_new_tokens=30)
    assert len({tuple(completion.token_ids) for completion in drawn}) == 5


def test_end_of_text(model, tmp_path):
    """Make a token that greedily follows "Once", the first new one after ten tokens, an end-of-text token."""
    params = SamplingParams(max_new_tokens=30)
    tokens = alone(model, [(ids("Once"), params)])[0].token_ids
    last = next(n for n in range(10, 30) if tokens[n] not in tokens[:n])
    with LLM(write_model(tmp_path, eos_token_id=[EOS, tokens[last]]), tp=1) as llm:
        stopped = llm.generate("Once", params)
        ignored = llm.generate("Once", params, ignore_eos=True)
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[: last + 1], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")


@pytest.mark.parametrize("form", [str, lambda stop: [stop], lambda stop: ("never there", stop)])
def test_a_text_ends_before_a_stop_string(llm, form):
    whole = llm.generate("Hello", max_new_tokens=60, ignore_eos=True).text
    stop = whole[20:23]
    stopped = llm.generate("Hello", max_new_tokens=60, ignore_eos=True, stop=form(stop))
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert "".join(llm.stream("Hello", max_new_tokens=60, ignore_eos=True, stop=form(stop))) == stopped.text


def test_logprobs_are_those_of_the_models_softmax(llm, model):
    completion = llm.generate("Hello", max_new_tokens=8, temperature=2.0, seed=1, logprobs=3)
    tokens = [*ids("Hello"), *completion.token_ids]
    whole = load_model(open_model(str(model), 1), SingleRank(), open_device("float32"))
    logits = whole.forward(tokens, whole.new_cache(), logits_at=slice(None)).astype(np.float64)
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[len(ids("Hello")) - 1 : -1]
    assert len(completion.logprobs) == 8
    for expected, token, (logprob, top) in zip(
        logprobs, completion.token_ids, completion.logprobs, strict=True
    ):
        assert logprob == pytest.approx(expected[token], abs=1e-4)
        assert [t for t, _ in top] == list(np.argsort(-expected)[:3])
        assert [x for _, x in top] == pytest.approx(np.sort(expected)[:-4:-1], abs=1e-4)


def test_penalties_min_p_and_bias_give_the_same_tokens_as_alone(llm, model):
    wanted = [
        ([65, 66, 65], SamplingParams(max_new_tokens=40, ignore_eos=True, **options))
        for options in (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"repetition_penalty": 1.4, "temperature": 0.9, "seed": 2},
            {"min_p": 0.3, "temperature": 1.5, "seed": 2},
            {"logit_bias": {70: 6}},
            {},
        )
    ]
    expected = alone(model, wanted)
    check(llm.generate([prompt for prompt, _ in wanted], [params for _, params in wanted]), expected)
    assert len({tuple(request.token_ids) for request in expected}) == len(wanted)


def test_prompt_logprobs_are_those_that_the_tokens_have_as_continuations(llm):
    """A token of a prompt has the same log-probability as when the model generates it."""
    text = llm.generate([1, 2], max_new_tokens=300, ignore_eos=True, logprobs=2)  # more than a batch scores
    again = llm.generate([1, 2, *text.token_ids], max_new_tokens=0, prompt_logprobs=2)
    assert (again.token_ids, again.text, again.finish_reason, again.cached_tokens) == ([], "", "length", 0)
    assert again.prompt_logprobs[0] is None
    for found, expected in zip(again.prompt_logprobs[2:], text.logprobs, strict=True):
        # A pass over many tokens sums products in another order than one over a single token.
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert [token for token, _ in found[1]] == [token for token, _ in expected[1]]
        assert type(found[1][0]) is tuple
    assert text.prompt_logprobs == []


def test_a_repeated_prompt_is_in_the_cache(llm):
    prompt = [[7] * 5 + list(range(50, 90))]
    first, second = (llm.generate(prompt, max_new_tokens=1)[0].cached_tokens for _ in range(2))
    assert (first, second) == (0, 44)


def test_a_bias_on_a_token_that_the_model_lacks_is_rejected(llm):
    for call in (llm.generate, llm.chat, llm.stream, llm.stream_chat):
        with pytest.raises(InputError, match="logit_bias: token id 300 is outside the vocabulary, 0 to"):
            call("Hello", logit_bias={300: 1})


def test_logprobs_only_if_they_are_requested(llm):
    assert llm.generate("Hello", max_new_tokens=2).logprobs == []
    assert [top for _, top in llm.generate("Hello", max_new_tokens=2, logprobs=0).logprobs] == [[], []]


def test_logprobs_are_tuples_as_documented(llm):
    ((logprob, top),) = logprobs = llm.generate("Hello", max_new_tokens=1, logprobs=1).logprobs
    assert logprobs == [(logprob, [tuple(pair) for pair in top])]


# --- streams --------------------------------------------------------------------------------------------


def test_the_pieces_of_a_stream_are_the_text(llm):
    pieces = list(llm.stream("Hello", SamplingParams(temperature=1.0, seed=1), max_new_tokens=50))
    assert "".join(pieces) == llm.generate("Hello", temperature=1.0, seed=1, max_new_tokens=50).text
    assert len(pieces) > 10
    assert all(pieces)


@pytest.mark.parametrize("leave", ["close", "forget"])
def test_an_abandoned_stream_stops_its_request_and_frees_its_blocks(endless, leave):
    pieces = endless.stream("Hello", LONG)
    assert [next(pieces) for _ in range(3)]
    assert endless.load["running"] == 1
    assert endless.load["blocks_in_use"] > 0
    if leave == "close":
        pieces.close()
    del pieces
    wait_until(lambda: (endless.load["running"], endless.load["blocks_in_use"]) == (0, 0))


def test_a_submitted_request_can_be_stopped(endless):
    updates = []
    stop = endless.submit([1, 2], LONG, updates.append)
    wait_until(lambda: updates)
    stop()
    wait_until(lambda: endless.load["blocks_in_use"] == 0)
    assert updates[-1].finish_reason is None
    stop()
    assert len(endless.generate([1], max_new_tokens=3).token_ids) == 3


def test_ctrl_c_stops_only_the_request(endless):
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        endless.generate(["Hello", "Bye"], LONG)
    wait_until(lambda: (endless.load["running"], endless.load["blocks_in_use"]) == (0, 0))
    assert len(endless.generate([1], max_new_tokens=3).token_ids) == 3


def test_threads_share_one_llm(llm, model):
    """Generate and stream in each of 8 threads; each thread gets the text of its own prompt."""
    prompts = random_prompts(8, seed=1)
    params = SamplingParams(max_new_tokens=40)
    found = [None] * 8

    def use(n):
        found[n] = llm.generate([prompts[n]] * 2, params), "".join(llm.stream(prompts[n], params))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(END_S)
    for (completions, streamed), expected in zip(
        found, alone(model, [(p, params) for p in prompts]), strict=True
    ):
        check(completions, [expected] * 2)
        assert streamed == expected.text


# --- conversations --------------------------------------------------------------------------------------


def test_an_answer_may_continue_the_final_message(llm, model):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, "}]
    prompt = [BOS, *ids("[user]Hi[assistant]Sure, ")]
    params = SamplingParams(max_new_tokens=6)
    expected = alone(model, [(prompt, params)])
    assert llm.encode_chat(messages, continue_final_message=True) == prompt
    check([llm.chat(messages, params, continue_final_message=True)], expected)
    assert "".join(llm.stream_chat(messages, params, continue_final_message=True)) == expected[0].text
    for call in (llm.chat, llm.stream_chat, llm.encode_chat):
        with pytest.raises(InputError, match="are both true"):
            call(messages, add_generation_prompt=True, continue_final_message=True)


def test_a_chat_continues_the_rendered_conversation(llm, model):
    prompt = [BOS, *ids("[user]Hi[assistant]")]
    expected = alone(model, [(prompt, SamplingParams(max_new_tokens=CONTEXT))])
    assert llm.encode_chat([{"role": "user", "content": "Hi"}]) == prompt
    check([llm.chat("Hi"), llm.chat([{"role": "user", "content": "Hi"}])], expected * 2)
    assert "".join(llm.stream_chat("Hi")) == expected[0].text
    assert len(expected[0].token_ids) > SamplingParams().max_new_tokens, "it may fill the context"


def test_a_chat_without_new_tokens_may_fill_the_context(llm):
    around = len(llm.encode_chat([{"role": "user", "content": ""}]))
    text = "a" * (CONTEXT - around)
    answer = llm.chat(text, max_new_tokens=0, prompt_logprobs=0)
    assert (len(answer.prompt_logprobs), answer.token_ids, answer.finish_reason) == (CONTEXT, [], "length")
    for refused in (lambda: llm.chat(text), lambda: llm.chat(text + "a", max_new_tokens=0)):
        with pytest.raises(ContextError, match="leaves no room"):
            refused()


def test_a_chat_accepts_params(llm, model):
    prompt, params = [BOS, *ids("[user]Hi[assistant]")], SamplingParams(temperature=1.0, seed=1)
    expected = alone(model, [(prompt, replace(params, max_new_tokens=5)), (prompt, params)])
    check([llm.chat("Hi", temperature=1.0, seed=1, max_new_tokens=5)], expected[:1])
    check([llm.chat("Hi", params)], expected[1:])
    assert "".join(llm.stream_chat("Hi", params)) == expected[1].text


def test_variables_of_the_chat_template(llm, model):
    prompt, loud = [BOS, *ids("[user]Hi![assistant]")], {"loud": "!"}
    expected = alone(model, [(prompt, SamplingParams(max_new_tokens=5))])
    assert llm.encode_chat([{"role": "user", "content": "Hi"}], loud) == prompt
    check([llm.chat("Hi", max_new_tokens=5, chat_template_kwargs=loud)], expected)
    assert "".join(llm.stream_chat("Hi", max_new_tokens=5, chat_template_kwargs=loud)) == expected[0].text


def test_an_answer_ends_at_the_end_of_sequence_token_of_the_tokenizer(tmp_path):
    """The config names another token, as for chat models whose config is that of the base model."""
    model = write_model(tmp_path / "model", eos_token_id=0)
    (answer,) = alone(model, [(ids("Hi"), SamplingParams(max_new_tokens=9, ignore_eos=True))])
    end = answer.token_ids[4]
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": byte_tokenizer().id_to_token(end)}))
    with LLM(model, tp=1, cache_tokens=CONTEXT) as llm:
        completion = llm.generate("Hi", max_new_tokens=9)
    assert completion.token_ids == answer.token_ids[: answer.token_ids.index(end) + 1]
    assert completion.finish_reason == "stop"


def test_a_conversation_has_as_many_bos_tokens_as_its_template_writes(endless):
    """Check that the tokenizer adds <s> to a text, but no second one to a conversation."""
    assert endless.encode("Hi") == [BOS, *ids("Hi")]
    assert endless.encode_chat([{"role": "user", "content": "Hi"}]) == [BOS, *ids("[user]Hi[assistant]")]


# --- progress -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "prompts", "options", "shown"),
    [
        (Terminal, ["a", "b"], {}, True),
        (Terminal, ["a", "b"], {"progress": False}, False),
        (Terminal, "a", {}, False),
        (io.StringIO, ["a", "b"], {}, False),
    ],
)
def test_progress_of_several_prompts_on_a_terminal_only(llm, monkeypatch, stderr, prompts, options, shown):
    monkeypatch.setattr(sys, "stderr", stderr())
    llm.generate(prompts, max_new_tokens=2, **options)
    assert ("2/2" in sys.stderr.getvalue()) == shown
    assert shown or sys.stderr.getvalue() == ""
