"""The routes /tokenize, /detokenize and /tokenizer_info, with the fields of vLLM."""

from contextlib import suppress
from dataclasses import dataclass

from minitp.errors import InputError
from minitp.request import check_length, check_vocabulary
from minitp.server.errors import ApiError
from minitp.server.fields import (
    COMMON,
    FLAG,
    MESSAGES,
    UNSUPPORTED,
    Field,
    check_fields,
    is_int,
    is_text,
)
from minitp.server.prompts import errors_of
from minitp.server.requests import conversation
from minitp.text.chat_template import NoChatTemplateError
from minitp.text.tokenizer_config import STANDARD, special_tokens
from minitp.util.format import counted

TOKENIZE = MESSAGES | {
    "model": COMMON["model"],
    "prompt": Field("a string", is_text),
    "add_special_tokens": FLAG,
    "return_token_strs": FLAG,
}
DETOKENIZE = {
    "model": COMMON["model"],
    "tokens": Field("a list of token ids", lambda value: isinstance(value, list) and all(map(is_int, value))),
}


@dataclass
class TokenizeRequest:
    """A request to /tokenize, whose fields have been checked.

    Attributes
    ----------
    model : str or None
    prompt : str or None
        A text; None for a chat.
    chat : dict or None
        The fields of a chat, as `requests.conversation` returns them.
    add_special_tokens : bool
    token_strs : bool
        Add the names of the tokens in the vocabulary to the response.
    """

    model: str | None
    prompt: str | None
    chat: dict | None
    add_special_tokens: bool
    token_strs: bool


@dataclass
class DetokenizeRequest:
    """A request to /detokenize, whose fields have been checked."""

    model: str | None
    tokens: list


def tokenize_request(body):
    """Return the TokenizeRequest of a body of /tokenize."""
    body = check_fields(body, TOKENIZE, UNSUPPORTED, required=())
    if ("prompt" in body) == ("messages" in body):
        raise ApiError(400, "expected either prompt or messages", "prompt", "missing_required_parameter")
    is_chat = "messages" in body
    return TokenizeRequest(
        model=body.get("model"),
        prompt=body.get("prompt"),
        chat=conversation(body) if is_chat else None,
        add_special_tokens=body.get("add_special_tokens", not is_chat),
        token_strs=body.get("return_token_strs", False),
    )


def detokenize_request(body):
    """Return the DetokenizeRequest of a body of /detokenize."""
    body = check_fields(body, DETOKENIZE, {}, required=("tokens",))
    return DetokenizeRequest(body.get("model"), body["tokens"])


def tokenize(llm, request, model, chat_template_kwargs):
    """Return the response of /tokenize; `model` is the model's name in error messages."""
    context = llm.description["context"]
    with errors_of("prompt" if request.chat is None else "messages", llm, model):
        tokenizer, text = require_tokenizer(llm), request.prompt
        if request.chat is not None:
            chat = request.chat
            variables = chat_template_kwargs | chat["chat_template_kwargs"]
            ending = chat["add_generation_prompt"], chat["continue_final_message"]
            text = llm.chat_template.render(chat["messages"], variables, *ending)
        check_length(text, context)
        tokens = tokenizer.encode(text, request.add_special_tokens)
    response = {"count": len(tokens), "max_model_len": context, "tokens": tokens}
    return response | ({"token_strs": tokenizer.vocabulary_texts(tokens)} if request.token_strs else {})


def detokenize(llm, request, model):
    """Return the response of /detokenize: the text of the tokens, special ones included."""
    with errors_of("tokens", llm, model):
        tokenizer = require_tokenizer(llm)
        check_vocabulary(request.tokens, llm.source.config)
        context = llm.description["context"]
        if len(request.tokens) > context:  # decoding them would delay other requests
            raise InputError(f"{counted(len(request.tokens), 'token')} exceed the context of {context}")
        return {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)}


def tokenizer_info(llm, model):
    """Return the response of /tokenizer_info: the names of special tokens, and the chat template."""
    fields, template = llm.source.tokenizer_fields(), None
    with errors_of(None, llm, model), suppress(NoChatTemplateError):
        require_tokenizer(llm)
        template = llm.chat_template.text
    return {
        "tokenizer_class": fields.get("tokenizer_class", "PreTrainedTokenizerFast"),
        **dict.fromkeys(STANDARD),
        **special_tokens(fields),
        "chat_template": template,
    }


def require_tokenizer(llm):
    """Return the LLM's tokenizer; raise InputError if it has none."""
    if llm.tokenizer is None:
        raise InputError(f"{llm.source.name} has no tokenizer.json; send token ids as the prompt")
    return llm.tokenizer
