"""The fields of requests: their valid values, and the values of unsupported fields that change nothing.

Clients of other servers send many fields with a default value. Such a value is accepted if it changes nothing
(`min_tokens: 0`). With any other value the request is rejected, because ignoring the value would answer a
different request.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from minitp.errors import LONGEST_VALUE, shortened
from minitp.sampling import MAX_STOP_LENGTH, MAX_STOPS, are_biases, are_stops
from minitp.server.errors import ApiError
from minitp.text.chat_template import RESERVED

MAX_CHOICES = 128
MOST = 1 << 64  # the highest whole number that a field may have


class Field(NamedTuple):
    """A field of the API: a description of its valid values, a test for them, and their conversion."""

    expected: str
    test: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def whole_number(least, most, meanings=None):
    """Return the Field of a whole number, which may be written as 5.0; `meanings` has special values."""
    return Field(
        f"a whole number from {least} to {most}",
        lambda x: is_number(x) and x == int(x) and least <= x <= most,
        lambda x: (meanings or {}).get(int(x), int(x)),
    )


def number(least, most):
    return Field(f"a number from {least} to {most}", lambda x: is_number(x) and least <= x <= most)


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value):
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


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


def stops(value):
    """Return the list of stop strings in a value, without null and empty strings, which stop nothing."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if one not in ("", None)]


def biases(value):
    """Return the biases by token id, or None if there are none but 0; of "5" and "05" the last one counts."""
    by_id = {int(token): bias for token, bias in value.items()}
    return {token: bias for token, bias in by_id.items() if bias} or None


def present(value):
    """Return a JSON object without its null members, or any other value as it is."""
    if isinstance(value, dict):
        return {name: member for name, member in value.items() if member is not None}
    return value


def is_stream_options(value):
    if not isinstance(value, dict):
        return False
    flags = present(value)
    known = {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    return (
        flags.keys() <= known
        and all(isinstance(flag, bool) for flag in flags.values())
        and not flags.get("continuous_usage_stats")
    )


FLAG = Field("true or false", lambda value: isinstance(value, bool))
TOP = whole_number(0, 20)
COMMON = {
    "model": Field("the name of a model", is_text),
    "stream": FLAG,
    "stream_options": Field('an object: {"include_usage": true or false}', is_stream_options, present),
    "max_tokens": whole_number(-1, MOST, {-1: MOST}),
    "n": whole_number(1, MAX_CHOICES),
    "temperature": number(0, 2),
    "top_p": Field("a number above 0, up to 1", lambda x: number(0, 1).test(x) and x > 0),
    "seed": whole_number(-1, MOST, {-1: None}),
    "stop": Field(
        f"a string of up to {MAX_STOP_LENGTH} characters, or a list of up to {MAX_STOPS}",
        lambda value: are_stops(stops(value)),
        stops,
    ),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": Field(
        "an object of numbers from -100 to 100 by token id",
        lambda value: value == [] or (isinstance(value, dict) and are_biases(value)),
        lambda value: biases(dict(value)),
    ),
    # These are not in OpenAI's API, but in those of other servers.
    "repetition_penalty": number(0.01, 100),
    "min_p": number(0, 1),
    "top_k": whole_number(-1, MOST, {-1: 0}),
    "ignore_eos": FLAG,
    "repeat_last_n": whole_number(-1, MOST),
}
COMPLETION = {
    "prompt": Field(f"a string, a list of token ids, or a list of up to {MAX_CHOICES} of either", is_prompt),
    "logprobs": Field(
        TOP.expected,
        lambda value: value is False or TOP.test(value),
        lambda value: None if value is False else int(value),
    ),
    "best_of": whole_number(1, MAX_CHOICES),
    "echo": FLAG,
}
MESSAGES = {
    "messages": Field("a list of messages", lambda value: isinstance(value, list) and bool(value)),
    "chat_template_kwargs": Field(
        f"an object of variables of the chat template, none of them {', '.join(RESERVED)}",
        lambda value: isinstance(value, dict) and not value.keys() & set(RESERVED),
    ),
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
}
CHAT = MESSAGES | {"max_completion_tokens": COMMON["max_tokens"], "logprobs": FLAG, "top_logprobs": TOP}

# Fields that minitp does not support, each with the values that change nothing.
UNSUPPORTED = {
    # OpenAI
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}, {}],
    "modalities": [["text"], []],
    "verbosity": ["medium"],
    # vLLM and SGLang
    "use_beam_search": [False],
    "length_penalty": [1],
    "min_tokens": [0],
    "stop_token_ids": [[]],
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],
    "truncation_side": ["left", "right"],
    "bad_words": [[]],
    "prompt_logprobs": [],
    "documents": [[]],
    "structured_outputs": [{}],
    "mm_processor_kwargs": [{}],
    "media_io_kwargs": [{}],
    "vllm_xargs": [{}],
    "priority": [0],
    "thinking_token_budget": [-1],
    "include_reasoning": [True],
    "separate_reasoning": [False],
    "watermarking": [False],
    "stream_interval": [1],
    "return_tokens_as_token_ids": [False],
    "return_token_ids": [False],
    "return_token_offsets": [False],
    "return_prompt_text": [False],
    "return_hidden_states": [False],
    "no_stop_trim": [False],
    "safe_prompt": [False],
    # llama.cpp, Ollama and LM Studio
    "repeat_penalty": [1],
    "typical_p": [1],
    "tfs_z": [1],
    "top_n_sigma": [-1, 0],
    "dynatemp_range": [0],
    "dry_multiplier": [0],
    "xtc_probability": [0],
    "mirostat": [0],
    "grammar": [""],
    "lora": [[]],
    "n_probs": [0],
    "min_keep": [0],
    "n_keep": [0, -1],
    "n_discard": [0],
    "n_indent": [0],
    "n_cmpl": [1],
    "id_slot": [-1],
    "t_max_predict_ms": [0, -1],
    "return_tokens": [False],
    "timings_per_token": [False],
    "return_progress": [False],
    "post_sampling_probs": [False],
    "response_fields": [[]],
    "format": [""],
    # TGI and text-generation-webui
    "watermark": [False],
    "details": [False],
    "decoder_input_details": [False],
    "return_full_text": [False],
    "num_beams": [1],
    "no_repeat_ngram_size": [0],
    "encoder_repetition_penalty": [1],
    "top_a": [0],
    "epsilon_cutoff": [0],
    "eta_cutoff": [0],
    "penalty_alpha": [0],
    "guidance_scale": [1],
    "negative_prompt": [""],
    "smoothing_factor": [0],
    "dynamic_temperature": [False],
    "temperature_last": [False],
    "ban_eos_token": [False],
    "add_bos_token": [True],
    # Parameters of the openai package, which some clients put into the body
    "extra_body": [{}],
    "extra_headers": [{}],
    "extra_query": [{}],
}
UNSUPPORTED_IN_COMPLETION = UNSUPPORTED | {"add_special_tokens": [True], "top_logprobs": [0]}
UNSUPPORTED_IN_CHAT = UNSUPPORTED | {"add_special_tokens": [False], "echo": [False], "best_of": [1]}

# Fields that never change the response: they are about accounts and caches, or belong to an unsupported field
# that is accepted only if it is off.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    *("cache_prompt", "n_cache_reuse", "keep_alive", "ttl", "sse_ping_interval"),
    *("dynatemp_exponent", "xtc_threshold", "mirostat_tau", "mirostat_eta"),
    *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    *("dynatemp_low", "dynatemp_high", "smoothing_curve", "early_stopping"),
}


def check_fields(body, fields, unsupported, required):
    """Check the fields of a body and return them, converted; a field that is null counts as absent.

    Parameters
    ----------
    body : dict
        The JSON object that a client has sent.
    fields : dict
        The Field of each supported field, by name.
    unsupported : dict
        The values that change nothing of each unsupported field, by name; see UNSUPPORTED.
    required : tuple of str
        The names of fields that must be there.

    Raises
    ------
    ApiError
        400, for a field that is missing, unknown or unsupported, or has an invalid value.
    """
    body = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name in required:
        if name not in body:
            raise ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    for name, value in body.items():
        if name in fields:
            if not fields[name].test(value):
                raise ApiError(400, f"{name}: expected {fields[name].expected}", name, "invalid_type")
        elif name not in unsupported:
            raise ApiError(400, f"unknown parameter {name!r:.80}", name[:80], "unknown_parameter")
        elif not any(is_same(present(value), neutral) for neutral in unsupported[name]):
            raise unsupported_value(name, value)
    return {name: fields[name].convert(value) for name, value in body.items() if name in fields}


def unsupported_value(param, value):
    """Return the ApiError for an unsupported value, which would change the response."""
    name = param
    if not isinstance(value, list | dict):
        name += f" {shortened(json.dumps(value, ensure_ascii=False), LONGEST_VALUE)}"
    message = f"{name} is not supported by minitp; leave it out"
    return ApiError(400, message, param, "unsupported_parameter")


def is_same(value, neutral):
    """Return whether two JSON values are the same: 1 and 1.0 are, but not 1 and true."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
