"""Tests of generation: sampling, streaming, stopping, long contexts, and perplexity."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import EOS, byte_tokens, write_tiny
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RawTokenizer

from minitp import ops
from minitp.cli.perplexity import perplexity
from minitp.comm import run_threads
from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.errors import InputError
from minitp.generate import generate, prefill
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request, check_prompt, context_length
from minitp.sampling import Sampler, SamplingParams, token_probabilities
from minitp.text.stop_strings import StopStrings
from minitp.text.tokenizer import REPLACEMENT, TextStream, Tokenizer, load_tokenizer

VOCABULARY = 258


def open_tiny(directory, comm=None):
    comm = comm or SingleRank()
    return load_model(open_model(str(directory), comm.size), comm, open_device())


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


TOKEN_OF_BYTE = {}
for byte, char in itertools.chain(
    # Byte-level BPE writes printable bytes as themselves and the others as characters from U+0100 on.
    ((b, chr(b)) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]),
    zip([*range(33), *range(127, 161), 173], map(chr, itertools.count(256)), strict=False),
):
    TOKEN_OF_BYTE[byte] = byte_tokens().index(char)


def byte_ids(data):
    """Return the tokens of bytes, valid UTF-8 or not, for the tokenizer of the tiny models."""
    return [TOKEN_OF_BYTE[byte] for byte in data]


# --- stop strings ---------------------------------------------------------------------------------------


def push_all(stops, pieces):
    filter_ = StopStrings(stops)
    return [filter_.push(piece) for piece in pieces], filter_


def test_stop_string_within_a_piece():
    out, filter_ = push_all(["STOP"], ["one STOP two", " three"])
    assert out == ["one ", ""]
    assert filter_.found
    assert filter_.finish() == ""


def test_stop_string_across_pieces():
    out, filter_ = push_all(["STOP"], ["one S", "T", "OP two"])
    assert out == ["one ", "", ""]
    assert filter_.found


def test_incomplete_stop_string_is_released():
    out, filter_ = push_all(["STOP"], ["one S", "T", "A", "ST"])
    assert out == ["one ", "", "STA", ""]
    assert not filter_.found
    assert filter_.finish() == "ST"
    assert filter_.finish() == ""


def test_overlapping_beginnings_of_a_stop_string():
    out, filter_ = push_all(["aab"], "xaaab")
    assert out == ["x", "", "", "a", ""], "the second and third a may still begin aab"
    assert filter_.found
    out, _ = push_all(["abab!"], ["aba", "ba", "b!", "z"])
    assert "".join(out) == "ab"


def test_first_of_several_stop_strings():
    out, filter_ = push_all(["END", "\n\n"], ["a\n", "b E", "N\n", "\nEND"])
    assert out == ["a", "\nb ", "EN", ""]
    assert filter_.found


def test_no_stop_strings():
    out, filter_ = push_all([], ["a", "", "bc"])
    assert out == ["a", "", "bc"]
    assert filter_.finish() == ""


def first_cut(text, stops):
    """Return the length of the text before the stop string that is complete first, letter by letter."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end - max(map(len, complete))
    raise AssertionError("no stop string")


def test_stop_string_within_another():
    for pieces in (["xabc"], ["x", "a", "b", "c"], ["xa", "bc"]):
        out, _ = push_all(["abc", "b"], pieces)
        assert "".join(out) == "xa", "b is complete before abc, however the text is split into pieces"


def test_stop_strings_against_brute_force():
    """The filter holds back only the longest ending that may be the beginning of a stop string."""
    rng = np.random.default_rng(1)

    def letters(most):
        return "".join(rng.choice(["a", "b", "c"], p=[0.5, 0.4, 0.1], size=rng.integers(1, most + 1)))

    found = 0
    for _ in range(500):
        stops = [letters(4) + letters(2) for _ in range(rng.integers(1, 4))]
        filter_, text, out = StopStrings(stops), "", ""
        for _ in range(12):
            text += (piece := letters(3))
            out += filter_.push(piece)
            if any(stop in text for stop in stops):
                assert out == text[: first_cut(text, stops)]
                assert filter_.found
                found += 1
                break
            held = max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
            assert out == text[: len(text) - held], (stops, text)
    assert 100 < found < 500, "both cases must occur"


class CountedText(str):
    """A string that counts how often one of its characters is read."""

    reads = 0

    def __getitem__(self, index):
        CountedText.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("beginning", ["a" * 999, "ab" * 499 + "a", ""])
def test_the_work_for_stop_strings_is_linear(beginning):
    """Reading a piece takes a few comparisons per character, however long the text before it is."""
    stops = [CountedText("a" * 999 + "b"), CountedText("ab" * 500 + "c")]
    filter_ = StopStrings(stops)
    text = beginning + "x" + beginning * 3 + "x" + "aab" * 2000
    CountedText.reads = 0
    for char in text:
        filter_.push(char)
    assert not filter_.found
    assert CountedText.reads <= 3 * len(stops) * len(text)


# --- streamed text --------------------------------------------------------------------------------------

STORY = "Grüße 😀 an 你好吗 — naïve 🧑‍🚀, \u200dŁódź."


def test_byte_ids_match_the_tokenizer(tokenizer):
    assert tokenizer.encode(STORY) == byte_ids(STORY.encode())


def test_characters_are_streamed_whole(tokenizer):
    stream = TextStream(tokenizer, byte_ids(b"prompt"))
    for char in STORY:
        data = char.encode()
        pieces = [stream.push(token) for token in byte_ids(data)]
        assert pieces == [""] * (len(data) - 1) + [char], "a character comes with its last byte"
    assert stream.finish() == ""


def test_incomplete_characters_in_the_prompts_last_tokens_are_ignored(tokenizer):
    """The stream decodes only the last eight tokens of the prompt, which may begin inside a character."""
    for length in range(1, 12):
        stream = TextStream(tokenizer, byte_ids(("ab" + "好" * length).encode()))
        text = "".join(stream.push(token) for token in byte_ids("好😀x".encode()))
        assert text == "好😀x"


class CountingTokenizer:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


def test_the_work_for_a_token_does_not_depend_on_the_prompt(tokenizer):
    """A few tokens of the prompt are decoded, and more only if their text does not begin with a character."""
    data = ("a好" * 5000).encode()
    for cut in range(4):
        counting = CountingTokenizer(tokenizer)
        stream = TextStream(counting, byte_ids(data[: len(data) - cut]))
        for token in byte_ids(b"\xe5\xa5abc"):
            stream.push(token)
        assert counting.decoded < 200
    for invalid in ([EOS], byte_ids(b"\x80")):
        counting = CountingTokenizer(tokenizer)
        assert TextStream(counting, byte_ids(b"Hi") + invalid * 100_000).push(byte_ids(b"x")[0]) == "x"
        assert counting.decoded < 8000


def test_invalid_bytes_become_replacement_characters(tokenizer):
    stream = TextStream(tokenizer, byte_ids(b"p"))
    assert [stream.push(token) for token in byte_ids(b"a\xffb")] == ["a", "", REPLACEMENT + "b"]
    pieces = [stream.push(token) for token in byte_ids(b"\xf0\x9f\x98z")]
    assert pieces == ["", "", "", REPLACEMENT + "z"], "three of four bytes become one replacement"
    assert stream.finish() == ""


def test_incomplete_character_becomes_a_replacement_at_the_end(tokenizer):
    stream = TextStream(tokenizer, byte_ids(b"p"))
    assert [stream.push(token) for token in byte_ids("a好".encode()[:-1])] == ["a", "", ""]
    assert stream.finish() == REPLACEMENT


def test_replacement_character_in_the_text_itself(tokenizer):
    stream = TextStream(tokenizer, byte_ids(b"p"))
    text = "".join(stream.push(token) for token in byte_ids(f"a{REPLACEMENT}b{REPLACEMENT}".encode()))
    assert text + stream.finish() == f"a{REPLACEMENT}b{REPLACEMENT}"


def test_stream_of_random_bytes_is_their_text(tokenizer):
    rng = np.random.default_rng(2)
    for _ in range(50):
        # Enough ASCII and first bytes of characters that all kinds of invalid sequences occur.
        data = bytes(
            rng.choice([*b"abc ", 0xC3, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xFF], size=60).tolist()
        )
        stream = TextStream(tokenizer, byte_ids(b"prompt"))
        text = "".join(stream.push(token) for token in byte_ids(data)) + stream.finish()
        assert text == data.decode(errors="replace")


def test_special_tokens_have_no_text(tokenizer):
    stream = TextStream(tokenizer, [256])
    assert [stream.push(token) for token in [*byte_ids(b"a"), EOS, *byte_ids(b"b")]] == ["a", "", "b"]


@pytest.fixture(scope="module")
def llama2_like():
    """A tokenizer like Llama 2's: words include the space before them, and rare characters are bytes."""
    tokens = ["<unk>", "<s>", "▁Hello", "▁world", "ly", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = RawTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(raw), vocabulary


def fallback_ids(vocabulary, text):
    return [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]


def test_words_keep_the_space_before_them(llama2_like):
    tokenizer, vocabulary = llama2_like
    stream = TextStream(tokenizer, [vocabulary["<s>"], vocabulary["▁Hello"]])
    pieces = [stream.push(vocabulary[word]) for word in ["▁world", "ly", "▁Hello", "<s>", "▁world"]]
    assert pieces == [" world", "ly", " Hello", "", " world"]
    assert [stream.push(token) for token in fallback_ids(vocabulary, "😀")] == ["", "", "", "😀"]
    for _ in range(20):  # also far from the beginning of the text
        assert stream.push(vocabulary["▁Hello"]) == " Hello"


@pytest.mark.parametrize("prompt", ["", "😀好"], ids=["words", "bytes"])
def test_consecutive_characters_of_byte_tokens(llama2_like, prompt):
    tokenizer, vocabulary = llama2_like
    stream = TextStream(tokenizer, [vocabulary["▁Hello"], *fallback_ids(vocabulary, prompt)])
    for char in "好😀é🚀你":
        tokens = fallback_ids(vocabulary, char)
        assert [stream.push(token) for token in tokens] == [""] * (len(tokens) - 1) + [char]
    assert stream.push(vocabulary["▁world"]) == " world"


# --- sampling -------------------------------------------------------------------------------------------


def reference_probabilities(logits, temperature, top_k, top_p):
    """Apply temperature, then top-k, then top-p, token by token; return all probabilities."""
    scaled = [float(x) / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if top_k:
        order = order[:top_k]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    return [weights[i] / total / mass if i in kept else 0.0 for i in range(len(scaled))]


def test_probabilities_against_brute_force():
    rng = np.random.default_rng(3)
    for _ in range(300):
        logits = (rng.standard_normal(20) * 3).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits)  # ties
        temperature = float(rng.choice([0.1, 0.7, 1.0, 2.5]))
        top_k = int(rng.choice([0, 1, 2, 5, 20, 1000]))
        top_p = float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]))
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        probs = token_probabilities(logits, params)
        expected = reference_probabilities(logits, temperature, top_k, top_p)
        assert probs.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(probs, expected, atol=1e-12, err_msg=str(params))


def test_top_p_keeps_as_few_tokens_as_possible():
    logits = np.log(np.array([0.125, 0.5, 0.25, 0.125], dtype=np.float32))
    for top_p, kept in [
        (0.3, [1]),
        (0.49, [1]),
        (0.51, [1, 2]),
        (0.74, [1, 2]),
        (0.76, [0, 1, 2]),
        (1, [0, 1, 2, 3]),
    ]:
        probs = token_probabilities(logits, SamplingParams(temperature=1.0, top_p=top_p))
        assert np.flatnonzero(probs).tolist() == kept, top_p


def test_top_k_breaks_ties_by_token_id():
    probs = token_probabilities(np.zeros(9, dtype=np.float32), SamplingParams(temperature=1.0, top_k=3))
    np.testing.assert_allclose(probs, [1 / 3] * 3 + [0] * 6)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}]
)
def test_draws_follow_the_probabilities(options):
    logits = np.random.default_rng(4).standard_normal(12).astype(np.float32)
    params = SamplingParams(seed=5, **options)
    probs = token_probabilities(logits, params)
    sampler, draws = Sampler(params), 8_000
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=12)
    assert (counts[probs == 0] == 0).all()
    deviation = (counts - draws * probs) / np.sqrt(draws * probs * (1 - probs) + 1e-300)
    assert np.abs(deviation).max() < 4.5


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1 - 2**-53])
def test_extreme_random_numbers(drawn):
    """Tokens that top-k excludes are not drawn, even if they are the first or the last of the vocabulary."""
    logits = np.array([0, 1, 0, 1, 0], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=2))
    sampler._generator = SimpleNamespace(random=lambda count: np.full(count, drawn))
    assert sampler.choose(logits) == (1 if drawn < 0.5 else 3)


def test_greedy_chooses_the_first_of_equal_logits():
    sampler = Sampler(SamplingParams())
    assert sampler.choose(np.array([0, 3, 1, 3], dtype=np.float32)) == 1
    assert sampler.seed is None


def test_seed_fixes_the_draws():
    logits = np.zeros(1000, dtype=np.float32)

    def draws(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return sampler.seed, [sampler.choose(logits) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1)[1] != draws(2)[1]
    seed, drawn = draws(None)
    assert draws(seed)[1] == drawn, "a drawn seed can be used again"
    assert draws(None)[0] != seed


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_low_temperature_is_nearly_greedy(temperature):
    logits = np.random.default_rng(6).standard_normal(500).astype(np.float32) * 10
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
    assert {sampler.choose(logits) for _ in range(10)} == {int(np.argmax(logits))}


# --- requests -------------------------------------------------------------------------------------------


def run_request(
    tokens, tokenizer=None, prompt=(1, 2, 3), max_context=512, eos=(EOS,), max_pieces=10**9, **params
):
    """Let a Request sample `tokens` one by one; return it and the pieces of text that it has emitted.

    The output is closed after `max_pieces` pieces.
    """
    pieces = []

    def emit(piece):
        pieces.append(piece)
        return len(pieces) < max_pieces

    request = Request(SamplingParams(**params), eos, list(prompt), max_context, tokenizer, emit)
    for i, token in enumerate(tokens):
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        logits[token] = 1
        sampled, last = request.sample(logits)
        assert sampled == token
        assert last == (request.finish_reason is not None)
        if last:
            assert request.token_ids == list(tokens[: i + 1])
            break
    return request, pieces


def test_max_new_tokens_ends_a_request(tokenizer):
    request, pieces = run_request(byte_ids(b"abcdefgh"), tokenizer, max_new_tokens=5)
    assert (request.finish_reason, request.text, pieces) == ("length", "abcde", ["a", "b", "c", "d", "e"])


def test_end_of_text_ends_a_request(tokenizer):
    tokens = [*byte_ids(b"ab"), EOS, *byte_ids(b"c")]
    request, _ = run_request(tokens, tokenizer)
    assert (request.finish_reason, request.text) == ("stop", "ab")
    assert request.token_ids == tokens[:3], "the end-of-text token is included"
    request, _ = run_request(tokens, tokenizer, eos=(7, EOS))
    assert request.finish_reason == "stop"
    request, _ = run_request(tokens, tokenizer, eos=())
    assert request.finish_reason is None


def test_end_of_text_as_the_last_token(tokenizer):
    request, _ = run_request([*byte_ids(b"ab"), EOS], tokenizer, max_new_tokens=3)
    assert request.finish_reason == "stop"


def test_ignored_end_of_text(tokenizer):
    tokens = [*byte_ids(b"ab"), EOS, *byte_ids(b"cd")]
    request, _ = run_request(tokens, tokenizer, ignore_eos=True, max_new_tokens=4)
    assert (request.finish_reason, request.text) == ("length", "abc")
    assert len(request.token_ids) == 4


def test_a_full_context_ends_a_request():
    request, _ = run_request(range(20), prompt=[5] * 6, max_context=10)
    assert request.finish_reason == "length"
    assert len(request.token_ids) == 4, "prompt and continuation fill the context"


def test_stop_string_ends_a_request(tokenizer):
    request, pieces = run_request(byte_ids(b"one STOP two"), tokenizer, stop=("STOP",))
    assert (request.finish_reason, request.text, "".join(pieces)) == ("stop", "one ", "one ")
    assert request.token_ids == byte_ids(b"one STOP")


def test_stop_string_in_the_prompt_does_not_count(tokenizer):
    request, _ = run_request(
        byte_ids(b"OP abc"), tokenizer, prompt=byte_ids(b"ST"), stop=("STOP",), max_new_tokens=6
    )
    assert (request.finish_reason, request.text) == ("length", "OP abc")


def test_stop_string_with_the_last_token(tokenizer):
    request, _ = run_request(byte_ids(b"abSTOP"), tokenizer, stop=("STOP",), max_new_tokens=6)
    assert (request.finish_reason, request.text) == ("stop", "ab")


def test_text_that_was_held_back_is_emitted_at_the_end(tokenizer):
    request, pieces = run_request(byte_ids(b"abSTO"), tokenizer, stop=("STOP",), max_new_tokens=5)
    assert (request.finish_reason, request.text, "".join(pieces)) == ("length", "abSTO", "abSTO")
    request, pieces = run_request(byte_ids("a好".encode()), tokenizer, max_new_tokens=3)
    assert (request.text, "".join(pieces)) == ("a" + REPLACEMENT, "a" + REPLACEMENT)
    request, pieces = run_request([*byte_ids(b"abSTO"), EOS], tokenizer, stop=("STOP",))
    assert (request.finish_reason, request.text, "".join(pieces)) == ("stop", "abSTO", "abSTO")


@pytest.mark.parametrize("with_text", [True, False])
def test_a_closed_output_ends_a_request(tokenizer, with_text):
    request, pieces = run_request(byte_ids(b"abcdef"), tokenizer if with_text else None, max_pieces=3)
    assert request.finish_reason == "closed"
    assert len(request.token_ids) == len(pieces) == 3


def test_without_a_tokenizer_token_ids_are_emitted():
    request, pieces = run_request([7, 8, 9], max_new_tokens=3)
    assert pieces == ["7 ", "8 ", "9 "]
    assert request.text == ""


def test_times(tokenizer):
    request, _ = run_request(byte_ids(b"abc"), tokenizer, max_new_tokens=3)
    request.times = [1.0, 1.5, 1.75, 2.0]
    assert request.ttft_s == 0.5
    assert request.decode_tokens_per_s == 4
    assert run_request(byte_ids(b"abc"), tokenizer, max_new_tokens=1)[0].decode_tokens_per_s is None


def test_context_length_and_check_prompt(tiny):
    config = open_model(str(tiny), 1).config
    assert context_length(config, None) == 512
    assert context_length(config, 2) == 2
    for max_context in (0, 513):
        with pytest.raises(InputError):
            context_length(config, max_context)
    check_prompt([1] * 511, config, 512)
    check_prompt([257], config, 2)
    for ids, context in [([], 512), ([258], 512), ([-1], 512), ([1] * 512, 512), ([1, 2], 2)]:
        with pytest.raises(InputError):
            check_prompt(ids, config, context)


def test_generate_checks_the_prompt(tiny):
    model = open_tiny(tiny)
    for ids in ([], [258], [1] * 512):
        with pytest.raises(InputError):
            next(generate(model, ids, None))


# --- the generation loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_rank_yields_the_tokens_that_rank_0_chose(tiny, tp, use_cache):
    prompt = [5, 6, 7]

    def tokens(comm):
        params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=comm.rank)
        request = Request(params, (), prompt, 512) if comm.rank == 0 else None
        return list(generate(open_tiny(tiny, comm), prompt, request, use_cache))

    results = run_threads(tp, tokens)
    assert len(results[0]) == 12
    assert results == [results[0]] * tp
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=0)
    single = list(generate(open_tiny(tiny), prompt, Request(params, (), prompt, 512)))
    assert results[0] == single, "the tokens do not depend on the cache or the number of ranks"


WINDOW, LONG = 48, 2050


def long_model(directory, window, comm=None):
    write_tiny(
        directory,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        hidden_size=16,
        intermediate_size=24,
        sliding_window=window,
        max_position_embeddings=1_000_000,
    )
    return open_tiny(directory, comm)


def test_long_generation_across_the_window(tmp_path, monkeypatch):
    """Generate 2050 tokens in a context of a million; check the tokens, the keys read and the memory."""
    model = long_model(tmp_path / "windowed", WINDOW)
    keys_read, cache_bytes, scores = [], [], ops.attention_scores

    def counting(xp, q, k, *rest, **options):
        if q.shape[1] == 1:
            keys_read.append(k.shape[1])
        return scores(xp, q, k, *rest, **options)

    monkeypatch.setattr(ops, "attention_scores", counting)
    caches = []
    new = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda capacity: caches.append(new(capacity)) or caches[-1])
    prompt = list(range(10))
    request = Request(SamplingParams(max_new_tokens=LONG, temperature=1.0, seed=1), (), prompt, 1_000_000)
    tokens = []
    for token in generate(model, prompt, request):
        tokens.append(token)
        cache_bytes.append(caches[-1].nbytes)
    monkeypatch.undo()
    assert len(tokens) == LONG
    assert len(caches) == 1
    assert len(set(tokens)) > 100, "the tokens must depend on what is computed"

    # Work: each of the two layers reads only the keys within the window.
    lengths = range(len(prompt) + 1, len(prompt) + LONG)
    assert keys_read == [min(length, WINDOW) for length in lengths for _ in range(2)]

    # Memory: keys and values of two heads in two layers, reserved for the whole request and never copied.
    per_position = 2 * 2 * 2 * 4 * 4
    assert set(cache_bytes) == {per_position * (len(prompt) + LONG)}

    # Tokens: run the whole sequence in one pass, and repeat each draw from its logits.
    ids = prompt + tokens
    again = model.forward(ids[:-1], model.new_cache(), logits_at=slice(len(prompt) - 1, None))
    sampler = Sampler(request.params)
    chosen = [sampler.choose(row) for row in again]
    assert sum(a != b for a, b in zip(chosen, tokens, strict=True)) <= 1, "one draw may be on a boundary"
    last = model.forward(ids[-2:-1], truncate(caches[0], len(ids) - 2), logits_at=slice(-1, None))
    np.testing.assert_allclose(last[0], again[-1], atol=1e-4)
    np.testing.assert_allclose(prefill(model, model.new_cache(), ids[:-1]), again[-1], atol=1e-4)

    # Without a window the logits differ as soon as the window is full.
    unbounded = long_model(tmp_path / "unbounded", 1_000_000)
    full = unbounded.forward(ids[:-1], unbounded.new_cache(), logits_at=slice(len(prompt) - 1, None))
    inside = WINDOW - len(prompt)
    np.testing.assert_allclose(full[:inside], again[:inside], atol=1e-4)
    assert np.abs(full[inside + 1 :] - again[inside + 1 :]).max(axis=-1).min() > 1e-3


def truncate(cache, length):
    """Set a cache back to its first `length` positions, and return it."""
    cache.length = length
    return cache


def test_a_cache_grows_beyond_its_capacity(tmp_path):
    model = long_model(tmp_path / "model", WINDOW)
    ids = list(range(100, 190))
    small, large = model.new_cache(1), model.new_cache(90)
    for start, stop in ((0, 1), (1, 3), (3, 64), (64, 90)):
        logits = [model.forward(ids[start:stop], cache, slice(-1, None)) for cache in (small, large)]
        np.testing.assert_array_equal(*logits)
    assert large.nbytes == 90 * 2 * 2 * 2 * 4 * 4 <= small.nbytes < 1.5 * large.nbytes


def test_a_pass_has_at_most_max_scores(tmp_path, monkeypatch):
    """A long prompt on several ranks is split into passes that are short enough."""
    ids = np.random.default_rng(8).integers(0, 256, size=300).tolist()
    long_model(tmp_path / "model", None)

    def on_ranks(comm):
        model, sizes = open_tiny(tmp_path / "model", comm), []
        forward = model.forward
        model.forward = lambda ids, cache, *args, **kwargs: (
            sizes.append((len(ids), cache.length + len(ids))) or forward(ids, cache, *args, **kwargs)
        )
        return prefill(model, model.new_cache(), ids, 100), sizes, model.plan.head_ranges

    whole = run_threads(3, on_ranks)
    monkeypatch.setattr("minitp.generate.MAX_SCORES", 4096)
    for (logits, sizes, heads), (expected, _, _) in zip(run_threads(3, on_ranks), whole, strict=True):
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        most = max(stop - start for start, stop in heads)
        assert len(sizes) > 10
        assert all(most * tokens * keys <= 4096 for tokens, keys in sizes)
        assert sum(tokens for tokens, _ in sizes) == 300


def test_window_with_ranks_and_a_chunked_prompt(tmp_path):
    """A prompt longer than the window is prefilled in passes shorter and longer than the window."""
    rng = np.random.default_rng(8)
    ids = rng.integers(0, 256, size=200).tolist()
    model = long_model(tmp_path / "model", WINDOW)
    expected = model.forward(ids, model.new_cache(), logits_at=slice(-1, None))[0]
    for chunk in (1, 7, WINDOW, 100, 512):
        np.testing.assert_allclose(prefill(model, model.new_cache(), ids, chunk), expected, atol=1e-4)

    def on_ranks(comm):
        ranked = open_tiny(tmp_path / "model", comm)
        return prefill(ranked, ranked.new_cache(), ids, 70)

    for logits in run_threads(3, on_ranks):
        np.testing.assert_allclose(logits, expected, atol=1e-4)


# --- perplexity -----------------------------------------------------------------------------------------


def direct_perplexity(model, ids, context):
    """Compute the perplexity with a separate run for each token, over the earlier tokens of its window."""
    total, scored = 0.0, 0
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        for at in range(1, len(window)):
            logits = prefill(model, model.new_cache(), window[:at]).astype(np.float64)
            total += logits[window[at]] - np.log(np.exp(logits).sum())
            scored += 1
    return math.exp(-total / scored), scored


@pytest.mark.parametrize(
    ("tokens", "context"),
    [(2, 512), (150, 512), (129, 128), (101, 100), (150, 20), (140, 139)],
    ids=str,
)
def test_perplexity_against_a_direct_computation(tiny, tokens, context):
    model = open_tiny(tiny)
    ids = np.random.default_rng(9).integers(0, 256, size=tokens).tolist()
    read = []
    value, scored = perplexity(model, ids, context, read.append)
    expected, expected_scored = direct_perplexity(model, ids, context)
    assert scored == expected_scored
    assert value == pytest.approx(expected, rel=1e-4)
    assert tokens - 1 <= sum(read) <= tokens, "only the last token may be left out"


def test_perplexity_of_a_uniform_model_is_its_vocabulary_size(tiny):
    model = open_tiny(tiny)
    model.weights.lm_head[:] = 0
    value, _ = perplexity(model, [1, 2, 3, 4], 512)
    assert value == pytest.approx(VOCABULARY)


def test_perplexity_on_ranks(tiny):
    ids = np.random.default_rng(10).integers(0, 256, size=200).tolist()
    expected = perplexity(open_tiny(tiny), ids, 90)
    for value, scored in run_threads(4, lambda comm: perplexity(open_tiny(tiny, comm), ids, 90)):
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert scored == expected[1]
