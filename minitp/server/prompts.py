"""The prompts and sampling parameters that an LLM gets for a request."""

from contextlib import contextmanager
from dataclasses import replace

from minitp.errors import ContextError, InputError
from minitp.request import CHARACTERS_PER_TOKEN, check_logit_bias
from minitp.server.errors import ApiError, without_path
from minitp.util.format import counted


def encode_prompts(llm, request, model, chat_template_kwargs):
    """Return the token ids of each prompt of an ApiRequest, after checking its logit_bias.

    Parameters
    ----------
    llm : LLM
    request : requests.ApiRequest
    model : str
        The model's name in error messages.
    chat_template_kwargs : dict
        Variables of the chat template, which the request may override.
    """
    with errors_of("logit_bias", llm, model):
        check_logit_bias(request.params, llm.source.config)
    room = 0 if request.max_tokens == 0 else 1
    if request.messages is None:
        with errors_of("prompt", llm, model, room):
            return [llm.encode(prompt, room) for prompt in request.prompts]
    variables = chat_template_kwargs | request.chat_template_kwargs
    ending = request.add_generation_prompt, request.continue_final_message
    with errors_of("messages", llm, model, room):
        return [llm.encode_chat(request.messages, variables, *ending, room)]


@contextmanager
def errors_of(param, llm, model, room=1):
    """Turn an InputError into an ApiError about the field `param`; `model` is the model's name in it.

    `room` is the number of new tokens for which the context must have room.
    """
    try:
        yield
    except ContextError as error:
        raise ApiError(400, too_long(error, param, llm, room), param, "context_length_exceeded") from error
    except InputError as error:
        raise ApiError(400, without_path(error, llm, model), param) from error


def too_long(error, param, llm, room):
    """Return the message for a prompt that does not leave `room` in the context.

    LiteLLM and LangChain look for words of it: "maximum context length is" and "prompt is too long".
    """
    context = llm.description["context"]
    if error.tokens is None:
        excess = f"the prompt is too long: it has over {CHARACTERS_PER_TOKEN} characters for each of them"
    else:
        requested = counted(error.tokens + room, "token")
        parts = f"{error.tokens} in the {param}, {room} in the completion"
        excess = f"you requested {requested} ({parts}): the prompt is too long"
    return (
        f"This model's maximum context length is {counted(context, 'token')}. However, {excess}. "
        f"Please reduce the length of the {param} or completion."
    )


def make_sequences(llm, request, prompts):
    """Return the (prompt_ids, SamplingParams) of each choice of an ApiRequest, one prompt after another."""
    sequences, context = [], llm.description["context"]
    for ids in prompts:
        room = context - len(ids)
        max_new_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        for choice in range(request.choices):
            seed = None if request.params.seed is None else request.params.seed + choice
            params = replace(request.params, max_new_tokens=max_new_tokens, seed=seed)
            sequences.append((ids, params))
    return sequences
