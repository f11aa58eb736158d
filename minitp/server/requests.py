"""The parser of requests, which rejects unknown fields and values of the wrong type.

Fields that minitp does not support are accepted only with values that change nothing (`presence_penalty: 0`).
With any other value the request is rejected, because ignoring the value would answer a different request.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minitp.sampling import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams, are_stops
from minitp.text.chat_template import RESERVED

MAX_CHOICES = 128
MAX_SEED = 1 << 64


class ApiError(Exception):
    """An error response, whose body is {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def object(self):
        """Return the error object of the API."""
        kinds = {429: "rate_limit_error", 503: "server_error", 504: "server_error", 500: "server_error"}
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass
class ApiRequest:
    """A request, checked as far as it can be without the model.

    Attributes
    ----------
    model : str
    prompts : list
        The prompts of a completion: strings or lists of token ids.
    messages : list of dict or None
        The messages of a chat.
    chat_template_kwargs : dict
        Variables of the chat template.
    params : SamplingParams
        All sampling parameters but `max_new_tokens`, which depends on `max_tokens` and the context.
    max_tokens : int or None
    default_tokens : int or None
        The default of `max_tokens`; None means the rest of the context.
    choices : int
        The number of choices for each prompt.
    stream, usage : bool
        Send the response as a stream of chunks, and a chunk with the token counts at its end.
    """

    model: str
    params: SamplingParams
    max_tokens: int | None
    default_tokens: int | None
    choices: int
    stream: bool
    usage: bool
    prompts: list = field(default_factory=list)
    messages: list | None = None
    chat_template_kwargs: dict = field(default_factory=dict)

    @property
    def sequences(self):
        """The number of choices over all prompts."""
        return self.choices * (1 if self.messages is not None else len(self.prompts))


class Field(NamedTuple):
    """A field of the API: a description of its valid values and a test for them."""

    expected: str
    test: Callable[[Any], bool]


def whole_number(least, most):
    return Field(f"a whole number from {least} to {most}", lambda x: is_int(x) and least <= x <= most)


def number(least, most):
    return Field(
        f"a number from {least} to {most}",
        lambda x: (is_int(x) or isinstance(x, float)) and least <= x <= most,
    )


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value):
    return isinstance(value, str)


def is_tokens(value):
    return isinstance(value, list) and bool(value) and all(map(is_int, value))


def is_prompt(value):
    several = isinstance(value, list) and 0 < len(value) <= MAX_CHOICES
    return (
        is_text(value)
        or is_tokens(value)
        or (several and (all(map(is_text, value)) or all(map(is_tokens, value))))
    )


def is_stop(value):
    stops = [value] if is_text(value) else value
    return isinstance(stops, list) and are_stops(stops)


FLAG = Field("true or false", lambda value: isinstance(value, bool))
COMMON = {
    "model": Field("the name of a model", is_text),
    "stream": FLAG,
    "stream_options": Field(
        'an object: {"include_usage": true or false}',
        lambda value: (
            isinstance(value, dict)
            and not set(value) - {"include_usage", "include_obfuscation"}
            and all(isinstance(flag, bool) for flag in value.values())
        ),
    ),
    "max_tokens": whole_number(1, 1 << 31),
    "n": whole_number(1, MAX_CHOICES),
    "temperature": number(0, 2),
    "top_p": Field("a number above 0, up to 1", lambda x: number(0, 1).test(x) and x > 0),
    "seed": whole_number(0, MAX_SEED),
    "stop": Field(
        f"a non-empty string of up to {MAX_STOP_LENGTH} characters, or a list of up to {MAX_STOPS}", is_stop
    ),
    # Not in the API of OpenAI, but common in other servers.
    "top_k": whole_number(0, 1 << 31),
    "ignore_eos": FLAG,
}
COMPLETION = {
    "prompt": Field(f"a string, a list of token ids, or a list of up to {MAX_CHOICES} of either", is_prompt),
    "logprobs": whole_number(0, 20),
}
CHAT = {
    "messages": Field("a list of messages", lambda value: isinstance(value, list) and bool(value)),
    "chat_template_kwargs": Field(
        f"an object of variables of the chat template, none of them {', '.join(RESERVED)}",
        lambda value: isinstance(value, dict) and not value.keys() & set(RESERVED),
    ),
    "max_completion_tokens": COMMON["max_tokens"],
    "logprobs": FLAG,
    "top_logprobs": whole_number(0, 20),
}
# Fields that minitp does not support, each with the values that change nothing.
UNSUPPORTED = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}
# Fields that never change the response.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


def completion_request(body):
    """Return the ApiRequest of a body of /v1/completions."""
    body = check_fields(body, COMMON | COMPLETION, required=("model", "prompt"))
    prompt = body["prompt"]
    prompts = [prompt] if is_text(prompt) or is_tokens(prompt) else prompt
    return _api_request(body, body.get("max_tokens"), 16, body.get("logprobs"), prompts=prompts)


def chat_request(body):
    """Return the ApiRequest of a body of /v1/chat/completions."""
    body = check_fields(body, COMMON | CHAT, required=("model", "messages"))
    if "top_logprobs" in body and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    messages = [check_message(value, index) for index, value in enumerate(body["messages"])]
    return _api_request(
        body,
        max_tokens,
        None,
        logprobs,
        messages=messages,
        chat_template_kwargs=body.get("chat_template_kwargs", {}),
    )


def check_fields(body, fields, required):
    """Return the fields of a body without nulls; raise ApiError 400 for a field that is missing or wrong."""
    body = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name in required:
        if name not in body:
            raise ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    for name, value in body.items():
        if name in fields:
            if not fields[name].test(value):
                raise ApiError(400, f"{name}: expected {fields[name].expected}", name, "invalid_type")
        elif name not in UNSUPPORTED:
            raise ApiError(400, f"unknown parameter {name!r:.80}", name[:80], "unknown_parameter")
        elif value not in UNSUPPORTED[name]:
            raise ApiError(
                400, f"{name} is not supported by minitp; leave it out", name, "unsupported_parameter"
            )
    return body


def check_message(value, index):
    """Return a message with its content as one string; reject content that is not text."""
    content = value.get("content") if isinstance(value, dict) else None
    if isinstance(content, list) and all(is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not is_text(content) or not is_text(value.get("role")):
        raise ApiError(
            400,
            f"messages[{index}]: expected a role, and content that is a string or a list of text parts; "
            "minitp does not support images, audio or tools",
            f"messages[{index}]",
            "invalid_type",
        )
    return value | {"content": content}


def is_text_part(part):
    return isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))


def _api_request(body, max_tokens, default_tokens, logprobs, **prompts_or_messages):
    """Return an ApiRequest from the checked fields of a body, for both routes."""
    params = SamplingParams(
        temperature=body.get("temperature", 1.0),
        top_p=body.get("top_p", 1.0),
        top_k=body.get("top_k", 0),
        seed=body.get("seed"),
        stop=body.get("stop", ()),
        ignore_eos=body.get("ignore_eos", False),
        logprobs=logprobs,
    )
    usage = body.get("stream_options", {}).get("include_usage", False)
    return ApiRequest(
        model=body["model"],
        params=params,
        max_tokens=max_tokens,
        default_tokens=default_tokens,
        choices=body.get("n", 1),
        stream=body.get("stream", False),
        usage=usage,
        **prompts_or_messages,
    )
