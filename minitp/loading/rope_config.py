"""What config.json says of rotary position embedding: Hugging Face's `rope_parameters`, or `rope_scaling`."""

import math
from dataclasses import dataclass

from minitp.errors import InputError

ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {  # rope_type -> the further fields that it needs, and those that it may have
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", ORIGINAL), ("attention_factor", "factor")),
}
LISTS = ("short_factor", "long_factor")
ANYWHERE = ROPE_TYPES["llama3"][0]  # some checkpoints keep them beside a type that does not read them


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: Hugging Face's `rope_parameters`.

    `attention_factor` is what cosines and sines are multiplied with, `short_factor` has a divisor of each
    frequency for contexts of up to `original_max_position_embeddings`.
    """

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple = ()


def read_rope(reader, head_dim, longest):
    """The Rope of a config.json, both spellings: rope_parameters, or rope_theta beside rope_scaling.

    Parameters
    ----------
    reader : config.Reader
    head_dim : int
    longest : int
        max_position_embeddings.

    Raises
    ------
    InputError
    """
    given, original = _fields(reader), reader.get(ORIGINAL)
    theta = given.pop("rope_theta", reader.get("rope_theta", 10000.0))
    rope_type = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    rope_type = reader.rope_aliases.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if rope_type not in list(ROPE_TYPES):  # a list, for it may be anything
        reader.refuse("rope_type", rope_type, "one of " + ", ".join(ROPE_TYPES))
    needed, optional = ROPE_TYPES[rope_type]
    for name in given:
        if name not in (*needed, *optional, *ANYWHERE):
            raise InputError(f"{reader.where}: rope_type {rope_type!r} with an unknown field {name!r}")
    if ORIGINAL in needed:
        given[ORIGINAL] = original or given.get(ORIGINAL)
    values = {name: given.get(name) for name in needed}
    values |= {name: given[name] for name in optional if given.get(name) is not None}
    values["rope_theta"] = theta
    for name, value in values.items():
        _check(reader, rope_type, name, value, head_dim)
    if rope_type == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        low = values["low_freq_factor"]
        reader.refuse("high_freq_factor", values["high_freq_factor"], f"more than low_freq_factor, {low}")
    if rope_type in ("yarn", "longrope"):
        values["attention_factor"] = float(_attention_factor(rope_type, values, longest))
    if rope_type == "longrope":
        values["short_factor"] = tuple(values["short_factor"])
    known = {name: value for name, value in values.items() if name in Rope.__dataclass_fields__}
    return Rope(rope_type=rope_type, **known)


def _fields(reader):
    """The object under rope_scaling, which transformers prefers, or rope_parameters."""
    for name in ("rope_scaling", "rope_parameters"):
        fields = reader.get(name)
        if fields:
            break
    if fields and not isinstance(fields, dict):
        reader.refuse(name, fields, "an object")
    fields = dict(fields or {})
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        reader.refuse(name, reader.get(name), "partial_rotary_factor 1.0")
    return fields


def _check(reader, rope_type, name, value, head_dim):
    """Refuse a value that is not what its field wants."""

    def positive(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0

    called = f"{name} of rope_type {rope_type!r}"
    if name == "truncate":
        if not isinstance(value, bool):
            reader.refuse(called, value, "true or false")
    elif name in LISTS:
        if not isinstance(value, list) or len(value) != head_dim // 2 or not all(map(positive, value)):
            reader.refuse(called, value, f"a list of {head_dim // 2} positive numbers")
    elif not positive(value):
        reader.refuse(called, value, "a positive number")
    elif name == ORIGINAL and value <= 1:  # its logarithm is divided by
        reader.refuse(called, value, "more than 1")


def _attention_factor(rope_type, values, longest):
    """As given, or for yarn 0.1 ln(factor) + 1 (Peng et al., YaRN, 2023, section 3.4; DeepSeek gives two such
    temperatures), for longrope sqrt(1 + ln(factor) / ln(L)) (Ding et al., LongRoPE, 2024; Phi-3's code)."""
    if "attention_factor" in values:
        return values["attention_factor"]
    if rope_type == "longrope":
        factor = values.get("factor", longest / values[ORIGINAL])
        return math.sqrt(1 + math.log(factor) / math.log(values[ORIGINAL])) if factor > 1 else 1.0
    grown = 0.1 * math.log(values["factor"]) if values["factor"] > 1 else 0.0
    if "mscale" in values and "mscale_all_dim" in values:
        return (grown * values["mscale"] + 1) / (grown * values["mscale_all_dim"] + 1)
    return grown + 1
