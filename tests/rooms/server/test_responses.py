"""Responses made from updates: names and bytes of tokens, offsets, the echo of a prompt, and usage."""

import json
import tracemalloc

import pytest
from tiny import BOS, EOS, byte_tokenizer, byte_tokens
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from minitp.engine.ranks import Update
from minitp.sampling import SamplingParams
from minitp.server.requests import ApiRequest
from minitp.server.responses import ChatResponse, CompletionResponse, event
from minitp.text.tokenizer import Tokenizer

TEXT = "né 🎉!"


def byte_level():
    return Tokenizer(byte_tokenizer(bos=True))


def sentencepiece():
    """Return a tokenizer like Llama 2's: ▁ for spaces, single bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "n", "é", "!", "▁n"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    raw = RawTokenizer(models.BPE(vocabulary, [("▁", "n")], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
    return Tokenizer(raw)


def request(chat=False, echo=False, choices=1, logprobs=1, prompts=("x",)):
    params = SamplingParams(logprobs=logprobs, prompt_logprobs=logprobs if echo else None)
    messages = [{"role": "user", "content": "x"}] if chat else None
    return ApiRequest("m", params, None, choices, False, False, echo, list(prompts), messages)


def update(tokens, text, finish_reason=None, **fields):
    return Update(
        tokens, text, [(-0.5, [(t, -0.5), (70, -1.5)]) for t in tokens], finish_reason=finish_reason, **fields
    )


def body(response):
    """Return the whole response as a client reads it."""
    return json.loads(response.json())


def streamed(response, updates):
    """Return the chunks of a stream's first choice, each as a client reads it."""
    chunks = [chunk for one in updates for chunk in response.chunks(0, one)]
    return [json.loads(event(chunk).removeprefix("data: "))["choices"][0] for chunk in chunks]


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte-level", "byte fallback"])
def test_the_bytes_of_tokens_join_to_the_bytes_of_the_text(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(token) for token in ids)
    assert joined.removeprefix(b" ") == TEXT.encode()
    assert len(ids) > len(TEXT), "the party popper is several tokens"


def test_every_byte_of_byte_level_tokens():
    tokenizer = byte_level()
    found = [tokenizer.token_bytes(token) for token in range(256)]
    # The names of bytes are those that the library gives to each byte by itself.
    alphabet = {
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(n))[0][0]: n for n in range(128)
    }
    for name, data in zip(byte_tokens(), found, strict=True):
        assert len(data) == 1
        if name in alphabet:
            assert data == bytes([alphabet[name]])
    assert sorted(found) == [bytes([n]) for n in range(256)]


def test_a_replacement_character_in_the_text_has_its_own_bytes():
    raw = RawTokenizer(models.WordLevel({"\ufffd": 0, "[UNK]": 1}, unk_token="[UNK]"))
    raw.decoder = decoders.Fuse()
    assert Tokenizer(raw).token_bytes(0) == "\ufffd".encode()


@pytest.mark.parametrize("chat", [True, False])
def test_parts_of_a_character_are_named_by_their_bytes(chat):
    tokenizer = byte_level()
    ids = tokenizer.encode("é!", add_special_tokens=False)
    response = (ChatResponse if chat else CompletionResponse)(request(chat), [[1]], tokenizer)
    response.add(0, update(ids, "é!", "length"))
    logprobs = body(response)["choices"][0]["logprobs"]
    if chat:
        assert [(t["token"], t["bytes"]) for t in logprobs["content"]] == [
            ("\\xc3", [0xC3]),
            ("\\xa9", [0xA9]),
            ("!", [0x21]),
        ]
        assert bytes(byte for t in logprobs["content"] for byte in t["bytes"]).decode() == "é!"
    else:
        assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
        assert logprobs["text_offset"] == [0, 0, 1]
        assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
        assert logprobs["top_logprobs"][0]["bytes:\\xc3"] == -0.5


def test_the_chosen_token_is_among_the_top_logprobs_of_a_completion():
    response = CompletionResponse(request(), [[1]], byte_level())
    response.add(0, Update([65], "b", [(-3.0, [(66, -1.0)])], finish_reason="length"))
    top = body(response)["choices"][0]["logprobs"]["top_logprobs"]
    texts = [byte_level().token_text(token) for token in (65, 66)]
    assert top == [{texts[0]: -3.0, texts[1]: -1.0}]


def test_of_two_tokens_with_one_text_the_more_probable_one_is_kept():
    tokenizer = sentencepiece()
    piece, byte = (tokenizer._tokenizer.token_to_id(name) for name in ("n", "<0x6E>"))
    response = CompletionResponse(request(), [[1]], tokenizer)
    response.add(0, Update([5], "!", [(-3.0, [(piece, -1.0), (byte, -2.0)])], finish_reason="length"))
    assert body(response)["choices"][0]["logprobs"]["top_logprobs"][0]["n"] == -1.0


def test_added_tokens_that_texts_show_are_listed():
    raw = byte_tokenizer()
    raw.add_tokens([AddedToken("<think>", special=False)])
    response = CompletionResponse(request(), [[1]], Tokenizer(raw))
    response.add(0, update([raw.token_to_id("<think>"), EOS], "<think>", "stop"))
    (choice,) = body(response)["choices"]
    assert choice["logprobs"]["tokens"] == ["<think>"]


@pytest.mark.parametrize("chat", [True, False])
def test_special_tokens_are_not_listed(chat):
    tokenizer = byte_level()
    ids = [*tokenizer.encode("ab", add_special_tokens=False), EOS]
    kind = ChatResponse if chat else CompletionResponse
    whole, stream = (kind(request(chat), [[1]], tokenizer) for _ in range(2))
    whole.add(0, update(ids, "ab", "stop"))
    choice = body(whole)["choices"][0]
    found = choice["logprobs"]
    names = [t["token"] for t in found["content"]] if chat else found["tokens"]
    assert names == ["a", "b"]
    assert choice["finish_reason"] == "stop"
    assert body(whole)["usage"]["completion_tokens"] == 3
    *chunks, last = streamed(stream, [update(ids[:2], "ab"), update(ids[2:], "", "stop")])
    assert len(chunks) == 1, "no chunk for the end-of-text token"
    assert last["finish_reason"] == "stop"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte-level", "byte fallback"])
def test_an_echo_has_every_token_of_prompt_and_continuation(tokenizer):
    bos = [BOS] if tokenizer._tokenizer.token_to_id("<s>") == BOS else [1]
    prompt = bos + tokenizer.encode("né", add_special_tokens=False)
    new = [*tokenizer.encode("🎉", add_special_tokens=False)[-4:], tokenizer._tokenizer.token_to_id("</s>")]
    scores = [None] + [(-2.0, [(token, -2.0)]) for token in prompt[1:]]
    updates = [
        Update(prompt_logprobs=scores[:2]),
        update(new[:1], "", prompt_logprobs=scores[2:], cached_tokens=3),
        update(new[1:4], "🎉", cached_tokens=3),
        update(new[4:], "", "stop", cached_tokens=3),
    ]
    whole, stream = (
        CompletionResponse(request(echo=True, prompts=["né"]), [prompt], tokenizer) for _ in range(2)
    )
    for one in updates:
        whole.add(0, one)
    (choice,) = body(whole)["choices"]
    assert choice["text"] == "né🎉"
    logprobs = choice["logprobs"]
    assert [len(values) for values in logprobs.values()] == [len(prompt) + 5] * 4
    assert logprobs["token_logprobs"] == [None] + [-2.0] * (len(prompt) - 1) + [-0.5] * 5
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["tokens"][0] == "<s>"
    assert logprobs["tokens"][-1] == "</s>"
    assert logprobs["tokens"][-2] == "bytes:\\x89"
    offsets = logprobs["text_offset"]
    assert offsets[-6:] == [1, 2, 2, 2, 2, 3]
    assert offsets[:2] == [0, 0]
    chunks = streamed(stream, updates)
    texts = [chunk["text"] for chunk in chunks]
    assert texts == ["n", "é", "", "🎉", "", ""], "the prompt's text arrives with its log-probabilities"
    pieces = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    for name, values in logprobs.items():
        assert [value for piece in pieces for value in piece[name]] == values, name


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [("<s>a</s>é", "<s>a</s>é!", [0, 3, 4, 8, 8, 9]), ([BOS, 65, EOS, 66], "bc!", [0, 0, 1, 1, 2])],
    ids=["text", "token ids"],
)
def test_an_echo_has_the_offsets_of_special_tokens_in_its_text(prompt, text, offsets):
    raw = byte_tokenizer()
    ids = Tokenizer(raw).encode(prompt) if isinstance(prompt, str) else prompt
    (mark,) = Tokenizer(raw).encode("!")
    response = CompletionResponse(request(echo=True, prompts=[prompt]), [ids], Tokenizer(raw))
    scores = [None] + [(-2.0, [])] * (len(ids) - 1)
    response.add(0, update([mark], "!", "length", prompt_logprobs=scores))
    (choice,) = body(response)["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == offsets


def test_an_echo_without_logprobs_and_of_token_ids():
    tokenizer = byte_level()
    ids = tokenizer.encode("Hi")
    response = CompletionResponse(request(echo=True, logprobs=None, prompts=[ids]), [ids], tokenizer)
    response.add(0, Update(finish_reason="length"))
    (choice,) = body(response)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Hi", None)


def test_without_a_tokenizer_a_token_is_its_number():
    response = CompletionResponse(request(), [[5, 6]], None)
    response.add(0, update([7, 8], "", "length"))
    logprobs = body(response)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["7", "8"]
    assert logprobs["text_offset"] == [0, 0]
    assert logprobs["top_logprobs"][1] == {"8": -0.5, "70": -1.5}


def test_a_scored_token_takes_little_memory():
    """A response with many choices may keep a million scored tokens until the last one is there."""
    response = CompletionResponse(request(logprobs=20), [[1]], byte_level())
    top = [(n, -float(n)) for n in range(20)]
    tracemalloc.start()
    for _ in range(1000):
        response.add(0, Update([65], "a", [(-1.0, [(n, x * 1.5) for n, x in top])]))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 1000 * 900  # bytes; as pairs, a token takes more than twice as much
    assert len(body(response)["choices"][0]["logprobs"]["top_logprobs"][999]) == 21


def test_usage_counts_each_prompt_once():
    prompts = [[1, 2, 3, 4], [5, 6]]
    response = CompletionResponse(
        request(choices=2, logprobs=None, prompts=["a", "b"]), prompts, byte_level()
    )
    for index, cached in enumerate((2, 3, 0, 1)):
        response.add(index, Update([9], "x", finish_reason="length", cached_tokens=cached))
    assert response.usage() == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
