"""Responses: the objects of the API, whole or in chunks."""

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate


def event(value):
    """Return a server-sent event with a string or a JSON object, which may have iterators as lists."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, default=list)}\n\n"


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

    text: str = ""
    tokens: int = 0
    logprobs: list = field(default_factory=list)  # (token, logprob, top) of each token, if requested
    offset: int = 0  # characters in the tokens whose logprobs have been streamed
    finish_reason: str | None = None


class ApiResponse:
    """The response to one request; subclasses define the form of its objects.

    Parameters
    ----------
    request : requests.ApiRequest
    prompt_tokens, choices : int
        The number of prompt tokens and of choices, each over all prompts.
    token_text : callable
        token_text(token id) -> text.
    """

    prefix = kind = chunk_kind = None

    def __init__(self, request, prompt_tokens, choices, token_text):
        self.request, self.prompt_tokens, self.token_text = request, prompt_tokens, token_text
        self.choices = [Choice() for _ in range(choices)]
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def add(self, index, update):
        """Add an Update to a choice; return (token, logprob, top) of each of its tokens with logprobs."""
        choice = self.choices[index]
        choice.text += update.text
        choice.tokens += len(update.token_ids)
        choice.finish_reason = update.finish_reason
        logprobs = zip(update.token_ids, update.logprobs, strict=False)
        # Tuples of numbers are no work for the garbage collector, which stops all threads.
        new = [(token, logprob, tuple(top)) for token, (logprob, top) in logprobs]
        choice.logprobs += new
        return new

    def chunks(self, index, update):
        """Add an Update to a choice; return its chunks for a stream."""
        new, choice, chunks = self.add(index, update), self.choices[index], []
        if update.text or new:
            chunks.append(self.chunk(index, update.text, self.logprobs(new, choice.offset), None))
        choice.offset += sum(len(self.token_text(token)) for token, *_ in new)
        if update.finish_reason is not None:
            chunks.append(self.chunk(index, "", None, update.finish_reason))
        return chunks

    def usage(self):
        """Return the `usage` object: the numbers of prompt tokens and new tokens."""
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def whole(self):
        """Return the whole response as one object with iterators as lists, for a request without `stream`."""
        choices = (
            {
                "index": index,
                **self.content(choice.text),
                "logprobs": self.logprobs(choice.logprobs, 0),
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

    def logprobs(self, tokens, offset):
        """Return the logprobs object of (token, logprob, top) triples that begin at `offset` of the text."""
        raise NotImplementedError


class CompletionResponse(ApiResponse):
    """A response of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text):
        return {"text": text}

    delta = content

    def logprobs(self, tokens, offset):
        if self.request.params.logprobs is None:
            return None
        texts = [self.token_text(token) for token, _, _ in tokens]
        offsets = list(accumulate(map(len, texts[:-1]), initial=offset))
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [self.by_text(top) for _, _, top in tokens],
            "text_offset": offsets,
        }

    def by_text(self, top):
        """Return {text: logprob}; of tokens with one text, such as parts of characters, keep the best."""
        return {self.token_text(token): logprob for token, logprob in reversed(top)}


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

    def logprobs(self, tokens, offset):
        if self.request.params.logprobs is None:
            return None
        return {
            "content": (
                self.token(token, logprob) | {"top_logprobs": [self.token(*one) for one in top]}
                for token, logprob, top in tokens
            ),
            "refusal": None,
        }

    def token(self, token, logprob):
        text = self.token_text(token)
        whole = "\ufffd" not in text  # otherwise a part of a character, whose bytes are unknown
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
