"""Responses: the objects of the API, whole or in chunks."""

import json
import time
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from minitp.server.token_texts import TextOffsets, TokenTexts


def event(value):
    """Return a server-sent event with a string or a JSON object, which may have iterators as lists."""
    return f"data: {value if isinstance(value, str) else event_json(value)}\n\n"


event_json = json.JSONEncoder(default=list).encode  # json.dumps would create an encoder for each event


def json_pieces(value, levels=5):
    """Yield the JSON of a value in pieces, down to the tokens of logprobs, which are `levels` deep.

    No other thread runs while `json` writes a piece, so a large response must not be a single one. Nor must
    its objects exist all at once, for the garbage collector's sake, so an iterator is written as a list.
    """
    if levels and isinstance(value, dict):
        yield "{"
        for number, (name, item) in enumerate(value.items()):
            yield f"{',' if number else ''}{compact_json(name)}:"
            yield from json_pieces(item, levels - 1)
        yield "}"
    elif levels and isinstance(value, list | Iterator):
        yield "["
        for number, item in enumerate(value):
            yield "," if number else ""
            yield from json_pieces(item, levels - 1)
        yield "]"
    else:
        yield compact_json(value)


compact_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass
class Choice:
    """One continuation of a prompt, as far as it has been received."""

    prompt_ids: list
    prompt: str  # the text to echo; empty without `echo`
    text: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    logprobs: list = field(default_factory=list)  # (token, logprob, top) of each token, if requested
    prompt_logprobs: list = field(default_factory=list)  # the same for the prompt's tokens
    finish_reason: str | None = None
    echoed: bool = False  # True once a stream has sent the whole prompt

    def __post_init__(self):
        self.offsets = TextOffsets(self.prompt or " ")


class ApiResponse:
    """The response to one request; subclasses define the form of its objects.

    Parameters
    ----------
    request : requests.ApiRequest
    prompts : list of list of int
        The tokens of each prompt.
    tokenizer : Tokenizer or None
    """

    prefix = kind = chunk_kind = None

    def __init__(self, request, prompts, tokenizer):
        self.request, self.prompts, self.texts = request, prompts, TokenTexts(tokenizer)
        self.choices = []
        for number, ids in enumerate(prompts):
            text = ""
            if request.echo:
                text = request.prompts[number]
                text = text if isinstance(text, str) else self.texts.decode(ids)
            self.choices += [Choice(ids, text) for _ in range(request.choices)]
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def add(self, index, update):
        """Add an Update to a choice; return the new (token, logprob, top) triples of its prompt and its text.

        Special tokens are left out, as they are from the text, but not with `echo`: clients that send it
        count tokens to find where the continuation begins and ends.
        """
        choice = self.choices[index]
        scored = triples(choice.prompt_ids[len(choice.prompt_logprobs) :], update.prompt_logprobs)
        choice.prompt_logprobs += scored
        choice.cached_tokens = update.cached_tokens
        choice.text += update.text
        choice.tokens += len(update.token_ids)
        choice.finish_reason = update.finish_reason
        new = triples(update.token_ids, update.logprobs)
        if not self.request.echo:
            new = [one for one in new if not self.texts.is_special(one[0])]
        choice.logprobs += new
        return scored, new

    def chunks(self, index, update):
        """Add an Update to a choice; return its chunks for a stream."""
        scored, new = self.add(index, update)
        choice, chunks = self.choices[index], []
        has_begun = bool(update.token_ids) or update.finish_reason is not None
        if self.request.echo and (scored or has_begun):
            chunks += self.echo_chunks(index, scored, has_begun)
        if update.text or new:
            chunks.append(self.chunk(index, update.text, self.logprobs(new, choice), None))
        if update.finish_reason is not None:
            chunks.append(self.chunk(index, "", None, update.finish_reason))
        return chunks

    def echo_chunks(self, index, scored, is_last):
        """Return the chunk with the next part of a prompt, or no chunk once all of it has been sent.

        The log-probabilities of a long prompt arrive in parts.
        """
        choice = self.choices[index]
        if choice.echoed:
            return []
        start, choice.echoed = choice.offsets.length, is_last
        logprobs = self.logprobs(scored, choice)
        stop = None if is_last else choice.offsets.length
        return [self.chunk(index, choice.prompt[start:stop], logprobs, None)]

    def usage(self):
        """Return the `usage` object: the numbers of prompt tokens, new tokens and cached tokens."""
        prompt_tokens = sum(map(len, self.prompts))
        new = sum(choice.tokens for choice in self.choices)
        first_choices = self.choices[:: self.request.choices]  # the others reuse the blocks of these
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new,
            "total_tokens": prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in first_choices)},
        }

    def whole(self):
        """Return the whole response as one object with iterators as lists, for a request without `stream`."""
        choices = (
            {
                "index": index,
                **self.content(choice.prompt + choice.text),
                "logprobs": self.logprobs(choice.prompt_logprobs + choice.logprobs, choice),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        )
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def json(self):
        """Return the whole response as bytes of JSON."""
        return "".join(json_pieces(self.whole())).encode()

    def first_chunks(self):
        """Return the opening chunks of a stream: an empty list, unless a subclass overrides this."""
        return []

    def last_chunks(self):
        """Return the closing chunks of a stream: one with the `usage` object if it was requested."""
        if not self.request.usage:
            return []
        return [{**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}]

    def chunk(self, index, text, logprobs, finish_reason):
        """Return a chunk of a streamed response."""
        choice = {
            "index": index,
            **self.delta(text),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.request.usage else {}
        return {**self.head, "object": self.chunk_kind, "choices": [choice], **usage}

    def content(self, text):
        """Return the fields with a choice's text in a whole response."""
        raise NotImplementedError

    def delta(self, text):
        """Return the fields with a choice's text in a chunk."""
        raise NotImplementedError

    def logprobs(self, tokens, choice):
        """Return the logprobs object of a choice's next (token, logprob, top) triples."""
        raise NotImplementedError


def triples(tokens, logprobs):
    """Return the (token, logprob, top) of each token for which there are log-probabilities.

    The log-probability of a prompt's first token is None.
    """
    return [
        (token, None, ()) if found is None else (token, found[0], packed(found[1]))
        for token, found in zip(tokens, logprobs, strict=False)  # `logprobs` has those that have arrived
    ]


def packed(top):
    """Return (token, logprob) pairs as two arrays, which `zip(*..)` makes into pairs again.

    A response may have a million pairs. Arrays take a fraction of the memory of pairs, and are no work for
    the garbage collector, which stops all threads.
    """
    return array("q", [token for token, _ in top]), array("d", [logprob for _, logprob in top])


class CompletionResponse(ApiResponse):
    """A response of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text):
        return {"text": text}

    delta = content

    def logprobs(self, tokens, choice):
        if self.request.params.logprobs is None:
            return None
        return {
            "tokens": [self.texts.completion_name(token) for token, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": (self.by_name(*one) for one in tokens),
            "text_offset": [self.next_offset(token, choice) for token, _, _ in tokens],
        }

    def next_offset(self, token, choice):
        """Return the offset of a choice's next token in its text; a prompt may write out special tokens."""
        offsets, data = choice.offsets, self.texts.shown_bytes(token)
        if self.texts.is_special(token) and not choice.prompt.startswith(data.decode(), offsets.length):
            data = b""
        return offsets.add(data)

    def by_name(self, token, logprob, top):
        """Return {name: logprob} of the most probable tokens and the token itself; None for a first token."""
        if logprob is None:
            return None
        # If two tokens have the same name, the more probable one is kept.
        best = {
            self.texts.completion_name(token): logprob
            for token, logprob in reversed(list(zip(*top, strict=True)))
        }
        return {self.texts.completion_name(token): logprob} | best


class ChatResponse(ApiResponse):
    """A response of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text):
        return {"delta": {"content": text} if text else {}}

    def first_chunks(self):
        chunks = [self.chunk(index, "", None, None) for index in range(len(self.choices))]
        for chunk in chunks:
            chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return chunks

    def logprobs(self, tokens, choice):
        if self.request.params.logprobs is None:
            return None
        return {
            "content": (
                self.token(token, logprob)
                | {"top_logprobs": [self.token(*one) for one in zip(*top, strict=True)]}
                for token, logprob, top in tokens
            ),
            "refusal": None,
        }

    def token(self, token, logprob):
        data = list(self.texts.bytes(token))
        return {"token": self.texts.chat_name(token), "logprob": logprob, "bytes": data}
