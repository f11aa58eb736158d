"""The server through the openai client: it returns the texts of the model alone, whole and streamed."""

import asyncio
import codecs
import math
import random

import httpx
import numpy as np
import openai
import pytest
from served import Reference, Served, metric, rendered, write_chatty

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_chatty(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture(scope="module")
def alone(directory):
    return Reference(directory)


@pytest.fixture(scope="module")
def server(directory):
    served = Served(directory, "--tp", 4, "--max-tokens-per-step", 40)
    yield served
    served.stop()


@pytest.fixture
def client(server):
    return server.client()


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "chatty"
    assert client.models.retrieve("chatty").max_model_len == 512
    with pytest.raises(
        openai.NotFoundError, match="model 'gpt-4' not found; this server runs 'chatty'"
    ) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_health(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("prompt", ["Hello", [72, 101, 108]])
def test_completion_equals_that_of_the_model_alone(client, alone, prompt):
    expected = alone.request(prompt, max_new_tokens=20)
    answer = client.completions.create(model="chatty", prompt=prompt, max_tokens=20, temperature=0)
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.object == "text_completion"
    counts = answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens
    assert counts == (len(prompt), 20, len(prompt) + 20)


def test_several_prompts_and_choices_keep_their_order(client, alone):
    prompts = ["Hello", "Goodbye", "Who"]
    answer = client.completions.create(model="chatty", prompt=prompts, n=2, max_tokens=12, temperature=0)
    expected = [alone.text(prompt, max_new_tokens=12) for prompt in prompts for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == 6 * 12


def test_completion_without_max_tokens_has_16_tokens(client):
    answer = client.completions.create(
        model="chatty", prompt="Hi", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16


def test_streamed_completion(client, alone):
    pieces = list(
        client.completions.create(
            model="chatty",
            prompt="Hello",
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, usage = pieces
    assert "".join(piece.choices[0].text for piece in texts) == alone.text("Hello", max_new_tokens=20)
    assert [piece.choices[0].finish_reason for piece in texts] == [None] * (len(texts) - 1) + ["length"]
    assert len(texts) > 5, "the text was streamed in chunks"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 20)
    assert len({piece.id for piece in pieces}) == 1


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]},
]
PROMPT = rendered(("system", "Be brief."), ("user", "What now?"))


def test_chat_is_the_completion_of_the_rendered_conversation(client, alone):
    expected = alone.text(PROMPT, max_new_tokens=20)
    fields = {"model": "chatty", "messages": CONVERSATION, "max_completion_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(PROMPT)
    first, *pieces = client.chat.completions.create(**fields, stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == "length"
    assert all(piece.usage is None for piece in pieces)


def test_chat_with_variables_of_the_template(client):
    fields = {"model": "chatty", "messages": CONVERSATION, "max_completion_tokens": 1}
    loud = client.chat.completions.create(**fields, extra_body={"chat_template_kwargs": {"loud": "!"}})
    assert loud.usage.prompt_tokens == len(PROMPT) + 1


def test_chat_without_max_tokens_may_fill_the_context(client):
    answer = client.chat.completions.create(
        model="chatty", messages=CONVERSATION, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_a_seed_fixes_the_text_and_each_choice_has_its_own(client, alone):
    def texts(seed, n=1):
        answer = client.completions.create(model="chatty", prompt="Hello", max_tokens=16, seed=seed, n=n)
        return [choice.text for choice in answer.choices]

    assert texts(7, n=3) == [*texts(7), *texts(8), *texts(9)]
    assert len({*texts(7, n=3)}) == 3
    assert texts(7) == [alone.text("Hello", max_new_tokens=16, seed=7, temperature=1.0)]


def test_stop_strings(client, alone):
    whole = alone.text("Hello", max_new_tokens=30)
    stop = whole[10:12]
    for given in (stop, ["never this", stop]):
        answer = client.completions.create(
            model="chatty", prompt="Hello", max_tokens=30, temperature=0, stop=given
        )
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_logits(client, alone):
    ids = alone.tokenizer.encode("Hello")
    tokens = alone.request("Hello", max_new_tokens=6).token_ids
    cache = alone.model.new_cache(20)
    logits = alone.model.forward([*ids, *tokens], cache, logits_at=slice(len(ids) - 1, -1)).astype(float)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # [6, V]
    fields = {"model": "chatty", "max_tokens": 6, "temperature": 0}

    scored = client.completions.create(**fields, prompt="Hello", logprobs=3).choices[0].logprobs
    np.testing.assert_allclose(scored.token_logprobs, logprobs[range(6), tokens], atol=1e-4)  # float32, TP=4
    best = np.sort(logprobs, -1)[:, :-4:-1]
    for top, expected in zip(scored.top_logprobs, best, strict=True):
        assert max(top.values()) == pytest.approx(expected[0], abs=1e-4)
        assert min(top.values()) >= expected[2] - 1e-4
    pieces = [alone.tokenizer.token_bytes(token) for token in tokens]
    ends = [codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces[:n])) for n in range(6)]
    assert scored.text_offset == list(map(len, ends)), "a character counts where its last byte is"

    whole = client.chat.completions.create(**fields, messages=CONVERSATION, logprobs=True, top_logprobs=2)
    streamed = client.chat.completions.create(
        **fields, messages=CONVERSATION, logprobs=True, top_logprobs=2, stream=True
    )
    pieces = [p.choices[0].logprobs.content for p in streamed if p.choices[0].logprobs]
    content = whole.choices[0].logprobs.content
    assert [t.token for piece in pieces for t in piece] == [t.token for t in content]
    assert all(math.exp(t.logprob) <= 1 and len(t.top_logprobs) == 2 for t in content)
    assert all(t.top_logprobs[0].logprob == t.logprob for t in content), "greedy decoding takes the best"
    text = bytes(byte for t in content for byte in t.bytes).decode(errors="replace")
    assert text == whole.choices[0].message.content


def test_echo_scores_the_prompt(client, alone):
    """The tokens of a prompt have the log-probabilities of the logits, whole, streamed and cached."""
    ids = alone.tokenizer.encode("Hello, you")
    new = alone.request("Hello, you", max_new_tokens=3)
    logits = alone.model.forward([*ids, *new.token_ids], alone.model.new_cache(20)).astype(float)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # [13, V]
    expected = logprobs[range(12), [*ids, *new.token_ids][1:]]
    fields = {"model": "chatty", "temperature": 0, "echo": True, "logprobs": 1, "max_tokens": 3}
    for prompt in ("Hello, you", ids, ["Hello, you"]):
        (choice,) = client.completions.create(**fields, prompt=prompt).choices
        assert choice.text == "Hello, you" + new.text
        assert choice.logprobs.tokens[:10] == list("Hello, you")
        assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
        # float32, TP=4, and chunks of 40 tokens
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], expected, atol=1e-4)
        for top, row in zip(choice.logprobs.top_logprobs[1:], logprobs, strict=False):
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)
    streamed = [piece.choices[0] for piece in client.completions.create(**fields, prompt=ids, stream=True)]
    assert "".join(piece.text for piece in streamed) == choice.text
    assert streamed[0].text == "Hello, you"
    found = [x for piece in streamed if piece.logprobs for x in piece.logprobs.token_logprobs]
    np.testing.assert_allclose(found[1:], expected, atol=1e-4)
    answer = client.completions.create(**fields | {"max_tokens": 0}, prompt="Hello, you")
    (only,) = answer.choices
    assert (only.text, only.finish_reason, len(only.logprobs.tokens)) == ("Hello, you", "length", 10)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, 10)


def test_a_prompt_that_fills_the_context_can_be_scored(client):
    fields = {"model": "chatty", "prompt": [65] * 512, "echo": True, "logprobs": 0}
    (choice,) = client.completions.create(**fields, max_tokens=0).choices
    assert len(choice.logprobs.token_logprobs) == 512
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        client.completions.create(**fields, max_tokens=1)


def test_options_that_change_the_choice(client, alone):
    for options in (
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.4},
        {"logit_bias": {"70": 6}},
        {"min_p": 0.3, "temperature": 1.5, "seed": 2},
    ):
        body = {"model": "chatty", "prompt": "baobab", "max_tokens": 40, "temperature": 0} | options
        answer = httpx.post(f"{client.base_url}completions", json=body).json()
        expected = alone.text("baobab", max_new_tokens=40, **options)
        assert answer["choices"][0]["text"] == expected
        assert expected != alone.text("baobab", max_new_tokens=40, seed=2, temperature=body["temperature"])


def test_usage_has_the_number_of_cached_tokens(client):
    fields = {
        "model": "chatty",
        "prompt": "A prompt of more than two blocks of tokens",
        "max_tokens": 2,
        "n": 2,
    }
    first, second = (client.completions.create(**fields).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 32
    assert second.prompt_tokens == len(fields["prompt"])
    *_, last = client.chat.completions.create(
        model="chatty",
        messages=CONVERSATION,
        max_tokens=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.usage.prompt_tokens_details.cached_tokens > 0


def test_metrics_count(server, client):
    before = {
        name: metric(server, name) for name in ("minitp_prompt_tokens_total", "minitp_new_tokens_total")
    }
    client.completions.create(model="chatty", prompt="Hello", max_tokens=9, extra_body={"ignore_eos": True})
    after = {name: metric(server, name) for name in before}
    assert [after[name] - before[name] for name in before] == [5, 9]
    assert metric(server, "minitp_ready") == 1
    assert metric(server, "minitp_cache_blocks") == 512 // 16 * 64
    assert metric(server, "minitp_cache_blocks_in_use") == 0
    text = httpx.get(f"{server.url}/metrics").text
    assert 'minitp_requests_total{route="/v1/completions",status="200"}' in text
    assert 'minitp_model_info{context="512",dtype="float32",kv_dtype="auto"' in text


def test_sixty_four_clients_at_once(directory, alone):
    """Serve 64 clients with a cache for a quarter of their tokens, so that sequences are preempted."""
    rng = random.Random(0)
    prompts = ["".join(rng.choice("abcdef ") for _ in range(rng.randint(5, 60))) for _ in range(64)]
    prompts = [("One beginning for many. " if n % 3 == 0 else "") + p for n, p in enumerate(prompts)]
    sizes = [rng.randint(10, 60) for _ in prompts]
    expected = [
        alone.text(rendered(("user", p)) if n % 2 else p, max_new_tokens=size)
        for n, (p, size) in enumerate(zip(prompts, sizes, strict=True))
    ]
    served = Served(directory, "--tp", 2, "--cache-tokens", 1600, "--max-tokens-per-step", 64)

    async def one(client, n):
        fields = {"model": "chatty", "max_tokens": sizes[n], "temperature": 0, "stream": n % 4 < 2}
        if n % 2:
            messages = [{"role": "user", "content": prompts[n]}]
            answer = await client.chat.completions.create(**fields, messages=messages)
            if fields["stream"]:
                return "".join([piece.choices[0].delta.content or "" async for piece in answer])
            return answer.choices[0].message.content
        answer = await client.completions.create(**fields, prompt=prompts[n])
        if fields["stream"]:
            return "".join([piece.choices[0].text async for piece in answer])
        return answer.choices[0].text

    async def all_answers():
        clients = [
            openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
            for _ in prompts
        ]
        return await asyncio.gather(*[one(client, n) for n, client in enumerate(clients)])

    assert asyncio.run(all_answers()) == expected
    assert metric(served, "minitp_cache_blocks_in_use") == 0
    assert metric(served, "minitp_sequences_running") == metric(served, "minitp_sequences_waiting") == 0
    assert metric(served, "minitp_preemptions_total") > 0
    assert metric(served, "minitp_prefix_tokens_reused_total") > 0
    served.stop()
