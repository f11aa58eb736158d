"""What a client gets: the objects of the API, as a whole or piece by piece."""

import json
import time
import uuid
from dataclasses import dataclass, field


def event(value):
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


@dataclass
class Choice:
    """One continuation as it comes."""

    text: str = ""
    tokens: int = 0
    logprobs: list = field(default_factory=list)  # (token, logprob, top) of each, if asked for
    offset: int = 0  # of a stream: characters of the tokens in logprobs that have been sent
    finish_reason: str | None = None


class Answer:
    """The answer to one request; subclasses say how its objects look.

    Parameters
    ----------
    asked : requests.ApiRequest
    prompt_tokens : int
        Of all prompts.
    choices : int
        Of all prompts.
    token_text : callable
        The text of a token id.
    """

    prefix = kind = piece_kind = None

    def __init__(self, asked, prompt_tokens, choices, token_text):
        self.asked, self.prompt_tokens, self.token_text = asked, prompt_tokens, token_text
        self.choices = [Choice() for _ in range(choices)]
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def add(self, index, update):
        """Put an Update behind what there is; return its (token, logprob, top)."""
        choice = self.choices[index]
        choice.text += update.text
        choice.tokens += len(update.token_ids)
        choice.finish_reason = update.finish_reason
        new = [(token, *told) for token, told in zip(update.token_ids, update.logprobs, strict=False)]
        choice.logprobs += new
        return new

    def pieces(self, index, update):
        """`add` an Update; what a stream gets of it."""
        new, choice, pieces = self.add(index, update), self.choices[index], []
        if update.text or new:
            pieces.append(self.piece(index, update.text, self.logprobs(new, choice.offset), None))
        choice.offset += sum(len(self.token_text(token)) for token, *_ in new)
        if update.finish_reason is not None:
            pieces.append(self.piece(index, "", None, update.finish_reason))
        return pieces

    def usage(self):
        """The counts of tokens."""
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def whole(self):
        """The object of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                **self.content(choice.text),
                "logprobs": self.logprobs(choice.logprobs, 0),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def first_pieces(self):
        """What a stream begins with."""
        return []

    def last_pieces(self):
        """What it ends with."""
        if not self.asked.usage:
            return []
        return [{**self.head, "object": self.piece_kind, "choices": [], "usage": self.usage()}]

    def piece(self, index, text, logprobs, finish_reason):
        """A part of a streamed answer."""
        choice = {
            "index": index,
            **self.delta(text),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.asked.usage else {}
        return {**self.head, "object": self.piece_kind, "choices": [choice], **usage}

    def content(self, text):
        """A choice's text in a whole answer."""
        raise NotImplementedError

    def delta(self, text):
        """A choice's text in a piece."""
        raise NotImplementedError

    def logprobs(self, tokens, offset):
        """The (token, logprob, top) of some tokens, the first of which begins at `offset` of the text."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix, kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text):
        return {"text": text}

    delta = content

    def logprobs(self, tokens, offset):
        if self.asked.params.logprobs is None:
            return None
        texts = [self.token_text(token) for token, _, _ in tokens]
        ends = [offset + sum(map(len, texts[:n])) for n in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [self.by_text(top) for _, _, top in tokens],
            "text_offset": ends,
        }

    def by_text(self, top):
        """Of tokens that read alike (parts of characters may) the most probable, which is the first."""
        return {self.token_text(token): logprob for token, logprob in reversed(top)}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text):
        return {"delta": {"content": text} if text else {}}

    def first_pieces(self):
        pieces = [self.piece(index, "", None, None) for index in range(len(self.choices))]
        for piece in pieces:
            piece["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return pieces

    def logprobs(self, tokens, offset):
        if self.asked.params.logprobs is None:
            return None
        return {
            "content": [
                self.token(token, logprob) | {"top_logprobs": [self.token(*one) for one in top]}
                for token, logprob, top in tokens
            ],
            "refusal": None,
        }

    def token(self, token, logprob):
        text = self.token_text(token)
        whole = "\ufffd" not in text  # else a part of a character, of which the bytes are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
