"""Tests of the server with LangChain, LiteLLM and lm-evaluation-harness, from the extra `clients`."""

import asyncio
import importlib
import math
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from lm_eval_tasks import CHOICES, CONTINUATIONS, TASKS, TEXTS, log_likelihood, run_lm_eval, write_tasks
from paths import DOCS
from served import Reference, Served

from minitp.loading.demo import demo_directory

pytestmark = pytest.mark.mpi
OFFLINE = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
OFFLINE |= {"LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPTS = ["The capital of France is", "Once upon a time"]
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server():
    demo_directory()
    served = Served("smollm2", "--tp", 2)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def alone(server):
    return Reference("smollm2")


def installed(package):
    """Import a package of the extra `clients`; its absence is a failure, so that no test is skipped."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}; pip install 'minitp[clients]'")


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Let clients reach only the server, so that one that downloads something fails."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
            patch.delenv(name.lower(), raising=False)
        yield


@pytest.fixture(scope="module")
def langchain(offline):
    return installed("langchain_openai")


@pytest.fixture(scope="module")
def litellm(offline):
    return installed("litellm")


def greedy(model_class, server, max_tokens):
    """Return a function that makes a LangChain model of the server, by default with greedy decoding."""
    where = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "smollm2"}
    return partial(model_class, **where, temperature=0, max_tokens=max_tokens, max_retries=0, timeout=60)


@pytest.fixture
def chat_model(langchain, server):
    return greedy(langchain.ChatOpenAI, server, max_tokens=12)


@pytest.fixture
def text_model(langchain, server):
    return greedy(langchain.OpenAI, server, max_tokens=6)


@pytest.fixture
def lite(litellm, server):
    """Return a function that calls one of LiteLLM's functions with the server and greedy decoding."""

    def call(function="completion", model="openai/smollm2", **fields):
        if "prompt" not in fields:
            fields = {"messages": MESSAGES} | fields
        where = {"model": model, "api_base": f"{server.url}/v1", "api_key": "none"}
        return getattr(litellm, function)(
            **where, **{"temperature": 0, "max_tokens": 12, "timeout": 60} | fields
        )

    return call


def joined(content):
    return "".join(piece or "" for piece in content)


async def joined_async(pieces, content):
    return joined([content(piece) async for piece in pieces])


def test_the_stream_helper_of_openai(server):
    """The helper rebuilds the whole response from the chunks, and refuses chunks that do not fit together."""
    options = {"temperature": 0, "logprobs": True, "stream_options": {"include_usage": True}}
    with server.client().chat.completions.stream(model="smollm2", messages=MESSAGES, **options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.done"} <= kinds
    (choice,) = final.choices
    assert choice.message.content == joined(token.token for token in choice.logprobs.content) == ANSWER
    assert (choice.finish_reason, final.usage.completion_tokens) == ("stop", 8)


# ---- LangChain


def test_langchain_chat(chat_model):
    """Every way of calling a chat model gives the same text."""
    model = chat_model()
    whole = model.invoke(QUESTION)
    assert whole.content == ANSWER
    assert whole.usage_metadata["output_tokens"] == 8
    assert whole.usage_metadata["total_tokens"] == whole.usage_metadata["input_tokens"] + 8
    assert whole.response_metadata["finish_reason"] == "stop"
    assert joined(piece.content for piece in model.stream(QUESTION)) == ANSWER
    assert [answer.content for answer in model.batch([QUESTION, QUESTION])] == [ANSWER] * 2

    async def asynchronous():
        both = await model.abatch([QUESTION, QUESTION])
        streamed = await joined_async(model.astream(QUESTION), lambda piece: piece.content)
        return [(await model.ainvoke(QUESTION)).content, streamed, *(answer.content for answer in both)]

    assert asyncio.run(asynchronous()) == [ANSWER] * 4
    usage = [piece.usage_metadata for piece in chat_model(stream_usage=True).stream(QUESTION)]
    (counts,) = filter(None, usage)
    assert counts["output_tokens"] == 8
    assert model.invoke(QUESTION, stop=["Paris"]).content == "The capital of France is "


def test_langchain_logprobs(chat_model):
    model = chat_model(logprobs=True, top_logprobs=2, max_tokens=4)
    whole = model.invoke(QUESTION).response_metadata["logprobs"]["content"]
    pieces = [piece.response_metadata.get("logprobs") for piece in model.stream(QUESTION)]
    streamed = [token for piece in filter(None, pieces) for token in piece["content"]]
    assert [token["token"] for token in whole] == ["The", " capital", " of", " France"]
    assert [token["token"] for token in streamed] == [token["token"] for token in whole]
    for token, other in zip(whole, streamed, strict=True):
        assert other["logprob"] == pytest.approx(token["logprob"], abs=1e-4)
        assert bytes(token["bytes"]).decode() == token["token"]
        assert token["top_logprobs"][0]["logprob"] == token["logprob"] > token["top_logprobs"][1]["logprob"]


def test_langchain_completions(text_model, alone):
    expected = [alone.text(prompt, max_new_tokens=6) for prompt in PROMPTS]
    model = text_model()
    result = model.generate(PROMPTS)
    assert [choice.text for (choice,) in result.generations] == expected
    assert result.llm_output["token_usage"]["completion_tokens"] == 12
    assert model.batch(PROMPTS) == expected
    assert joined(model.stream(PROMPTS[0])) == expected[0]
    assert asyncio.run(model.ainvoke(PROMPTS[1])) == expected[1]
    assert model.invoke(PROMPTS[0], stop=["."]) == expected[0].partition(".")[0]
    ((choice,),) = text_model(logprobs=2).generate(PROMPTS[:1]).generations
    context, new = alone.tokenizer.encode(PROMPTS[0]), alone.request(PROMPTS[0], max_new_tokens=6).token_ids
    total, _ = log_likelihood(alone, context, new)
    assert sum(choice.generation_info["logprobs"]["token_logprobs"]) == pytest.approx(total, abs=1e-3)


def test_langchain_sampling_options(chat_model, text_model, alone):
    seeded = chat_model(temperature=1, seed=3)
    assert seeded.invoke(QUESTION).content == seeded.invoke(QUESTION).content
    (paris,) = alone.tokenizer.encode(" Paris")
    assert "Paris" not in chat_model(logit_bias={str(paris): -100}).invoke(QUESTION).content
    assert text_model(logit_bias={"5": 0}).invoke(PROMPTS[0]) == text_model().invoke(PROMPTS[0])
    repetitive, penalties = "ha ha ha ha", {"presence_penalty": 1.0, "frequency_penalty": 1.0}
    other = {"repetition_penalty": 1.1, "min_p": 0.05, "top_k": 5}
    penalized = text_model(**penalties, extra_body=other).invoke(repetitive)
    assert penalized == alone.text(repetitive, max_new_tokens=6, **penalties, **other)
    assert penalized != text_model().invoke(repetitive)
    ((*choices,),) = text_model(n=2, best_of=2, temperature=1).generate(PROMPTS[:1]).generations
    assert len(choices) == 2


# ---- LiteLLM


def test_litellm_chat(lite):
    """Every way of calling LiteLLM gives the same text."""
    whole = lite()
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (8, whole.usage.prompt_tokens + 8)
    streamed = list(lite(stream=True, stream_options={"include_usage": True}))
    assert joined(choice.delta.content for piece in streamed for choice in piece.choices) == ANSWER
    assert streamed[-1].usage.completion_tokens == 8

    async def asynchronous():
        whole = await lite("acompletion")
        pieces = await lite("acompletion", stream=True)
        return whole.choices[0].message.content, await joined_async(
            pieces, lambda piece: piece.choices[0].delta.content
        )

    assert asyncio.run(asynchronous()) == (ANSWER, ANSWER)
    assert lite(model="hosted_vllm/smollm2", top_k=4).choices[0].message.content == ANSWER
    assert lite(stop=["Paris"]).choices[0].message.content == "The capital of France is "
    for no_calls in ({}, {"tool_calls": []}):
        messages = [*MESSAGES, {"role": "assistant", "content": None, **no_calls}, *MESSAGES]
        assert lite(messages=messages).choices[0].message.content


def test_litellm_completions(lite, alone):
    text = {"model": "text-completion-openai/smollm2", "function": "text_completion", "max_tokens": 6}
    expected = [alone.text(prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert [choice.text for choice in lite(**text, prompt=PROMPTS).choices] == expected
    assert joined(p.choices[0].text for p in lite(**text, prompt=PROMPTS[0], stream=True)) == expected[0]
    ids = alone.tokenizer.encode(PROMPTS[0])
    assert lite(**text, prompt=ids).choices[0].text == expected[0]
    (scored,) = lite(**text | {"max_tokens": 0}, prompt=PROMPTS[0], echo=True, logprobs=1).choices
    assert scored.text == PROMPTS[0]
    assert joined(scored.logprobs.tokens) == PROMPTS[0]
    first, *rest = scored.logprobs.token_logprobs
    assert first is None
    assert sum(rest) == pytest.approx(log_likelihood(alone, ids[:1], ids[1:])[0], abs=1e-3)


# ---- LangChain and LiteLLM


def test_a_prompt_that_exceeds_the_context(chat_model, lite, litellm):
    """Both clients raise their own error for it, which they recognize by the words of the message."""
    overflow = installed("langchain_core.exceptions").ContextOverflowError
    text = {"model": "text-completion-openai/smollm2", "function": "text_completion"}
    for words in (9000, 300_000):  # too many tokens, and too many characters
        long = "word " * words
        messages = [{"role": "user", "content": long}]
        with pytest.raises(overflow):
            chat_model().invoke(long)
        for fields in ({}, {"stream": True}, {"model": "hosted_vllm/smollm2"}):
            with pytest.raises(litellm.ContextWindowExceededError):
                lite(messages=messages, **fields)
        with pytest.raises(litellm.ContextWindowExceededError):
            lite(**text, prompt=long)


@pytest.mark.parametrize("package", ["langchain_openai", "litellm"])
def test_the_example_in_the_page(package, server, capsys):
    installed(package)
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if package in code)
    code = example.replace("http://127.0.0.1:8000", server.url)
    assert code != example
    exec(code, {})
    first, *_ = capsys.readouterr().out.splitlines()
    assert f"  # {first}\n" in example


# ---- lm-evaluation-harness


def test_lm_eval(server, alone, tmp_path):
    """The page's command, with other tasks, gives the log-likelihoods and texts of the model alone."""
    installed("lm_eval")
    write_tasks(tmp_path)
    (example,) = re.findall(r"\$ (lm_eval .*?)\n```", PAGE, re.DOTALL)
    example = re.sub(r"--tasks \S+", f"--tasks {','.join(TASKS)}", example.replace("\\\n", ""))
    program, *options = shlex.split(example.replace("http://127.0.0.1:8000", server.url))
    program = Path(sys.executable).with_name(program)
    metrics, responses = run_lm_eval([program, *options], tmp_path)

    encode, right = alone.tokenizer.encode, 0
    for item, answers in zip(CHOICES, responses["choices"], strict=True):
        context, totals = encode(item["question"]), []
        for choice, (total, greedy) in zip(item["choices"], answers, strict=True):
            ids = encode(f"{item['question']} {choice}")[len(context) :]
            expected, expected_greedy = log_likelihood(alone, context, ids)
            assert float(total) == pytest.approx(expected, abs=1e-3)
            assert greedy == str(expected_greedy)
            totals.append(expected)
        right += totals.index(max(totals)) == item["answer"]
    assert 0 < right < len(CHOICES), "the model must answer some items right and some wrong"
    assert metrics["choices"]["acc,none"] == right / len(CHOICES)

    texts = [
        alone.text(item["question"], max_new_tokens=8, stop=(".", "\n", "<|im_end|>"))
        for item in CONTINUATIONS
    ]
    assert responses["continuations"] == [[text] for text in texts]
    exact = [text.strip() == item["answer"] for text, item in zip(texts, CONTINUATIONS, strict=True)]
    assert metrics["continuations"]["exact_match,none"] == sum(exact) / len(exact)

    ((total,),) = responses["texts"]
    expected, _ = log_likelihood(alone, encode("<|im_start|>"), encode(TEXTS[0]["text"]))
    assert float(total) == pytest.approx(expected, abs=1e-3)
    perplexity = math.exp(-expected / len(TEXTS[0]["text"].split()))
    assert metrics["texts"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-3)
