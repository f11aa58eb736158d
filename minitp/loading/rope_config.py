"""The rotary position embedding in config.json: `rope_parameters`, or the older `rope_scaling`."""

import math
import sys
from dataclasses import dataclass

from minitp.errors import InputError
from minitp.util.format import counted

ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {  # rope_type -> required fields, optional fields
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
PARTIAL = "partial_rotary_factor"
ANYWHERE = ROPE_TYPES["llama3"][0]  # fields that some checkpoints have with a type that ignores them


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding, with the fields of Hugging Face's `rope_parameters`.

    Cosines and sines are multiplied by `attention_factor`. `short_factor` has a divisor for each frequency,
    for contexts of at most `original_max_position_embeddings` tokens. Only the first `partial_rotary_factor`
    of each head's dimensions are rotated.
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
    partial_rotary_factor: float = 1.0


def read_ropes(reader, head_dim, longest):
    """Return the Rope of a config.json, and another one for the layers with a window, or None.

    They are read from `rope_parameters`, or from `rope_theta` and `rope_scaling`. In a family with
    `rope_local_base_freq`, that is the theta of the layers with a window, and `rope_parameters` has an object
    for each of the two kinds of layers.

    Parameters
    ----------
    reader : config_reader.Reader
    head_dim : int
    longest : int
        The model's max_position_embeddings.

    Raises
    ------
    InputError
        if a field is missing or has an unsupported value. A field that the type does not have is added to
        `reader.unknown`, for a warning; transformers warns of it, too, and does not use it.
    """
    theta = reader.get("rope_theta", 10000.0)
    if "rope_local_base_freq" not in reader.family_reads:
        return _read_rope(reader, *_fields(reader), theta, head_dim, longest), None
    kinds = _object(reader, "rope_parameters")
    if not kinds.keys() <= {"full_attention", "sliding_attention"}:
        reader.reject("rope_parameters", kinds, "the objects full_attention and sliding_attention")
    whole, local = (_object(reader, name, kinds) for name in ("full_attention", "sliding_attention"))
    whole |= _object(reader, "rope_scaling")
    rope = _read_rope(reader, "rope_scaling", whole, theta, head_dim, longest)
    local_theta = reader.number("rope_local_base_freq", float)
    local_rope = _read_rope(reader, "rope_parameters", local, local_theta, head_dim, longest)
    if local_rope.rope_type == "longrope":
        reader.reject("rope_type of sliding_attention", "longrope", "another type")
    return rope, local_rope


def _read_rope(reader, name, fields, theta, head_dim, longest):
    """Return the Rope of an object `name` of config.json, with `theta` unless the object has its own."""
    original, rotated = reader.get(ORIGINAL), _rotated_part(reader, fields, head_dim)
    theta = fields.pop("rope_theta", theta)
    rope_type = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    rope_type = reader.rope_aliases.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if rope_type not in list(ROPE_TYPES):  # a list, because the value may not be hashable
        reader.reject("rope_type", rope_type, "one of " + ", ".join(ROPE_TYPES))
    needed, optional = ROPE_TYPES[rope_type]
    known = (*needed, *optional, *ANYWHERE)
    foreign = [field for field in fields if field not in known and fields[field] is not None]
    reader.unknown += [f"{name}.{field}" for field in foreign]
    if ORIGINAL in needed:
        fields[ORIGINAL] = original or fields.get(ORIGINAL)
    values = {name: fields.get(name) for name in needed}
    values |= {name: fields[name] for name in optional if fields.get(name) is not None}
    values["rope_theta"] = theta
    for name, value in values.items():
        _check(reader, rope_type, name, value, int(head_dim * rotated) // 2)
    if rope_type == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        low = values["low_freq_factor"]
        reader.reject("high_freq_factor", values["high_freq_factor"], f"more than low_freq_factor, {low}")
    if rope_type in ("yarn", "longrope"):
        values["attention_factor"] = float(_attention_factor(rope_type, values, longest))
    if rope_type == "longrope":
        values["short_factor"] = tuple(values["short_factor"])
    known = {name: value for name, value in values.items() if name in Rope.__dataclass_fields__}
    return Rope(rope_type=rope_type, partial_rotary_factor=rotated, **known)


def _fields(reader):
    """Return the name and the fields of rope_scaling, which takes precedence, or of rope_parameters."""
    scaling, parameters = (_object(reader, name) for name in ("rope_scaling", "rope_parameters"))
    return ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)


def _object(reader, name, parent=None):
    """Return a copy of an object in config.json, or in `parent`; {} if it is null or absent."""
    fields = (reader.get(name) if parent is None else parent.get(name)) or {}
    if not isinstance(fields, dict):
        reader.reject(name, fields, "an object")
    return dict(fields)


def _rotated_part(reader, fields, head_dim):
    """Return the fraction of each head that is rotated: 1.0 in all families that do not read the field.

    It is popped from `fields`; the top-level field applies if they do not have it.
    """
    value, top_level = fields.pop(PARTIAL, None), reader.get(PARTIAL, 1.0)
    value = top_level if value is None else value
    if PARTIAL not in reader.family_reads and value != 1:
        family = reader.get("model_type")
        reader.reject(PARTIAL, value, f"1.0: in models of type {family!r}, RoPE rotates all of each head")
    if not is_positive(value) or value > 1:
        reader.reject(PARTIAL, value, "a number above 0, up to 1")
    rotated = int(head_dim * value)
    if rotated % 2 or rotated == 0:
        dimensions = counted(head_dim, "dimension")
        even = f"a factor that rotates an even number of each head's {dimensions}, not {rotated}"
        reader.reject(PARTIAL, value, even)
    return float(value)


def is_positive(value):
    """Return whether a value from a JSON file is a positive number that a float can hold."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _check(reader, rope_type, name, value, pairs):
    """Reject a value of the wrong type or out of range; RoPE rotates `pairs` pairs of dimensions."""
    called = f"{name} of rope_type {rope_type!r}"
    if name == "truncate":
        if not isinstance(value, bool):
            reader.reject(called, value, "true or false")
    elif name in LISTS:
        expected = f"a list of {pairs} positive numbers, one for each pair of dimensions that RoPE rotates"
        if isinstance(value, list) and len(value) != pairs:
            found = counted(len(value), "number")
            raise InputError(f"{reader.where}: {called} has {found}, expected {expected}")
        if not isinstance(value, list) or not all(map(is_positive, value)):
            reader.reject(called, value, expected)
    elif not is_positive(value):
        reader.reject(called, value, "a positive number")
    elif name == ORIGINAL and value <= 1:  # its logarithm is a divisor
        reader.reject(called, value, "more than 1")


def _attention_factor(rope_type, values, longest):
    """Return the attention factor in the file, or compute it if the file has none.

    yarn      0.1 ln(factor) + 1 (Peng et al., YaRN, 2023, section 3.4); with DeepSeek's `mscale` and
              `mscale_all_dim` the ratio of two such terms
    longrope  sqrt(1 + ln(factor) / ln(L)) (Ding et al., LongRoPE, 2024; Phi-3's code)
    """
    if "attention_factor" in values:
        return values["attention_factor"]
    if rope_type == "longrope":
        factor = values.get("factor", longest / values[ORIGINAL])
        return math.sqrt(1 + math.log(factor) / math.log(values[ORIGINAL])) if factor > 1 else 1.0
    grown = 0.1 * math.log(values["factor"]) if values["factor"] > 1 else 0.0
    if "mscale" in values and "mscale_all_dim" in values:
        return (grown * values["mscale"] + 1) / (grown * values["mscale_all_dim"] + 1)
    return grown + 1
