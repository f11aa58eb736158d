"""Requests to the two completion routes: their checked fields, with the API's defaults, in one object."""

from dataclasses import dataclass, field

from minitp.sampling import SamplingParams
from minitp.server.errors import ApiError
from minitp.server.fields import (
    CHAT,
    COMMON,
    COMPLETION,
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETION,
    check_fields,
    is_text,
    is_tokens,
    unsupported_value,
)
from minitp.text.chat_template import CALLS

PENALTIES = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}  # values without effect
# Fields that have the same name and default in SamplingParams.
SAMPLING = ("top_p", "top_k", "min_p", "seed", "ignore_eos", "logit_bias", *PENALTIES)


@dataclass
class ApiRequest:
    """A request, checked as far as it can be without the model.

    Attributes
    ----------
    model : str
        The name of the model in the request, and later in the response.
    prompts : list
        The prompts of a completion: strings or lists of token ids.
    messages : list of dict or None
        The messages of a chat.
    chat_template_kwargs : dict
        Variables of the chat template.
    add_generation_prompt : bool or None
    continue_final_message : bool
        See `ChatTemplate.render`.
    params : SamplingParams
        All sampling parameters but `max_new_tokens`, which depends on `max_tokens` and the context.
    max_tokens : int or None
        The maximum number of new tokens, if the context has room for that many; None for all that fit.
    choices : int
        The number of choices for each prompt.
    stream, usage : bool
        Send the response as a stream of chunks, and a chunk with the token counts at its end.
    echo : bool
        Begin the text of each choice with the prompt.
    """

    model: str
    params: SamplingParams
    max_tokens: int | None
    choices: int
    stream: bool
    usage: bool
    echo: bool = False
    prompts: list = field(default_factory=list)
    messages: list | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def sequences(self):
        """The number of choices over all prompts."""
        return self.choices * (1 if self.messages is not None else len(self.prompts))


def completion_request(body):
    """Return the ApiRequest of a body of /v1/completions."""
    body = check_fields(body, COMMON | COMPLETION, UNSUPPORTED_IN_COMPLETION, required=("model", "prompt"))
    n = body.get("n", 1)
    if body.get("best_of", n) != n:
        raise unsupported_value("best_of", body["best_of"])
    prompt = body["prompt"]
    prompts = [prompt] if is_text(prompt) or is_tokens(prompt) else prompt
    return _api_request(body, body.get("max_tokens", 16), body.get("logprobs"), prompts=prompts)


def chat_request(body):
    """Return the ApiRequest of a body of /v1/chat/completions."""
    body = check_fields(body, COMMON | CHAT, UNSUPPORTED_IN_CHAT, required=("model", "messages"))
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    return _api_request(body, max_tokens, logprobs, **conversation(body))


def conversation(body):
    """Return the fields of an ApiRequest that make the prompt of a chat, by name."""
    if body.get("add_generation_prompt") and body.get("continue_final_message"):
        message = "add_generation_prompt and continue_final_message cannot both be true"
        raise ApiError(400, message, "add_generation_prompt")
    return {
        "messages": [check_message(value, index) for index, value in enumerate(body["messages"])],
        "chat_template_kwargs": body.get("chat_template_kwargs", {}),
        "add_generation_prompt": body.get("add_generation_prompt"),
        "continue_final_message": body.get("continue_final_message", False),
    }


def check_message(value, index):
    """Return a message with its content as one string; reject content that is not text."""
    content, role = (value.get("content"), value.get("role")) if isinstance(value, dict) else (None, None)
    if content is None and role == "assistant":
        content = value.get("refusal") or ""
    if isinstance(content, list) and all(is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not is_text(content) or not is_text(role):
        raise ApiError(
            400,
            f"messages[{index}]: expected a role, and content that is a string or a list of text parts; "
            "minitp does not support images, audio or tools",
            f"messages[{index}]",
            "invalid_type",
        )
    for name in CALLS:
        if value.get(name):
            raise unsupported_value(f"messages[{index}].{name}", value[name])
    return value | {"content": content}


def is_text_part(part):
    return isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))


def _api_request(body, max_tokens, logprobs, **prompts_or_messages):
    """Return an ApiRequest from the checked fields of a body, for both routes."""
    check_penalty_window(body)
    echo = body.get("echo", False)
    params = SamplingParams(
        temperature=body.get("temperature", 1.0),
        stop=body.get("stop", ()),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        **{name: body[name] for name in SAMPLING if name in body},
    )
    return ApiRequest(
        model=body["model"],
        params=params,
        max_tokens=max_tokens,
        choices=body.get("n", 1),
        stream=body.get("stream", False),
        usage=body.get("stream_options", {}).get("include_usage", False),
        echo=echo,
        **prompts_or_messages,
    )


def check_penalty_window(body):
    """Reject repeat_last_n, which limits penalties to the last tokens, if there is a penalty to limit."""
    window = body.get("repeat_last_n", -1)
    if window != -1 and any(body.get(name, neutral) != neutral for name, neutral in PENALTIES.items()):
        raise unsupported_value("repeat_last_n", window)
