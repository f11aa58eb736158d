"""A reader that checks the fields of a config.json one by one, so that none is overlooked."""

import math

from minitp.errors import InputError, shown
from minitp.loading.config_fields import NO_EFFECT, ONLY_VALUE, TURNED_OFF
from minitp.loading.quantized import FIELDS, refuse_quantized_config
from minitp.loading.rope_config import is_positive, read_ropes
from minitp.util.format import counted

# The largest integers that are read, far above those of any model, so that wrong ones are refused at once.
MOST, MOST_OF_ALL = {"num_hidden_layers": 10_000}, 2**31 - 1

GELU = "gelu_pytorch_tanh"

DTYPES = ("float32", "float16", "bfloat16")


class Reader:
    """A reader of config.json that records which fields it has read, so that it can report the others.

    Parameters
    ----------
    fields : dict
        The object in config.json, with the family's defaults.
    family : dict
        A row of FAMILIES.
    where : str
        The name of the file in error messages.
    types : dict
        The type of each field of Config, which decides how an optional field is read.
    """

    def __init__(self, fields, family, where, types):
        self.fields = fields
        self.family_reads = family["reads"]
        self.always = family.get("always", ())
        self.rope_aliases = family.get("rope_aliases", {})
        self.where, self.types = where, types
        self.read, self.unknown = set(), []

    def get(self, name, default=None):
        self.read.add(name)
        value = self.fields.get(name)
        return default if value is None else value

    def reject(self, name, value, expected):
        raise InputError(f"{self.where}: {name} is {shown(value)}, expected {expected}")

    def count(self, name):
        """Return a field that must be an integer of at least 0."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.reject(name, value, "an integer, 0 or more")
        return value

    def number(self, name, kind, default=None):
        value = self.get(name, default)
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        right_type = isinstance(value, int) or (kind is float and isinstance(value, float))
        if not right_type or not is_positive(value):
            self.reject(name, value, "a positive number" if kind is float else "a positive integer")
        most = MOST.get(name, MOST_OF_ALL)
        if kind is int and value > most:
            self.reject(name, value, f"at most {most}")
        return kind(value)

    def optional_count(self, name):
        """Return a field that must be a positive integer, or None if it is null or absent."""
        return None if self.get(name) is None else self.number(name, int)

    def optional_number(self, name):
        """Return a field that must be a positive number, or None if it is null or absent."""
        return None if self.get(name) is None else self.number(name, float)

    def flag(self, name):
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.reject(name, value, "true or false")
        return value

    def values(self):
        """Return the arguments of Config, by name."""
        refuse_quantized_config(self.fields, self.where)
        self.read |= FIELDS.keys()
        heads = self.number("num_attention_heads", int)
        kv_heads = self.number("num_key_value_heads", int, heads)
        hidden = self.number("hidden_size", int)
        if heads % kv_heads:
            self.reject("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
        if self.get("head_dim") is None and hidden % heads:
            self.reject("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}, or a head_dim")
        head_dim = self.number("head_dim", int, hidden // heads)
        if head_dim % 2:
            self.reject("head_dim", head_dim, "an even number (RoPE rotates pairs)")
        dtype = self.dtype()
        longest = self.number("max_position_embeddings", int)
        rope, local_rope = read_ropes(self, head_dim, longest)
        if rope.rope_type == "longrope":  # the frequencies for longer contexts are not supported
            longest = min(longest, rope.original_max_position_embeddings)
        window, full_attention_layers = self.windows()
        return dict(
            model_type=self.get("model_type"),
            vocab_size=self.number("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=self.ffn_columns(),
            num_hidden_layers=self.number("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", float, 1e-6),
            rope=rope,
            local_rope=local_rope,
            max_position_embeddings=longest,
            sliding_window=window,
            full_attention_layers=full_attention_layers,
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            hidden_act=self.activation(),
            **self.options(hidden, head_dim),
            eos_token_ids=self.eos(),
            dtype=dtype,
            unread=self.unread(),
        )

    def options(self, hidden, head_dim):
        """Return the optional fields of Config that this family has, by name."""
        found = {name: True for name in self.always if name in self.types}
        for name, kind in self.types.items():
            if name in self.family_reads and kind in READERS:
                found[name] = READERS[kind](self, name)
        if "attention_bias" in self.family_reads and self.flag("attention_bias"):
            found |= {"qkv_bias": True, "o_bias": True}
        if "scaled_embeddings" in self.always:
            found["embedding_multiplier"] = math.sqrt(hidden)
        if "query_pre_attn_scalar" in self.family_reads:
            found["attention_multiplier"] = self.number("query_pre_attn_scalar", float) ** -0.5
        if found.get("attention_multiplier") == head_dim**-0.5:
            del found["attention_multiplier"]
        if "num_local_experts" in self.family_reads:
            found["num_local_experts"], found["num_experts_per_tok"] = self.experts()
        if "no_rope_layers" in self.family_reads:
            found["layers_without_rope"] = self.layers_without_rope()
        return found

    def layers_without_rope(self):
        """Return the indices of the layers without RoPE.

        `no_rope_layers` has a 1 for each layer with RoPE, despite its name. If it is absent, every
        `no_rope_layer_interval`th layer has no RoPE.
        """
        layers, has_rope = range(self.number("num_hidden_layers", int)), self.get("no_rope_layers")
        self.read.add("no_rope_layer_interval")  # ignored if the layers are listed
        if has_rope is None:
            interval = self.number("no_rope_layer_interval", int)
            has_rope = [(i + 1) % interval != 0 for i in layers]
        is_list = isinstance(has_rope, list) and len(has_rope) >= len(layers)
        if not is_list or any(entry not in (0, 1) for entry in has_rope):
            self.reject(
                "no_rope_layers", has_rope, f"a list of {counted(len(layers), 'number')}, each 0 or 1"
            )
        return frozenset(i for i in layers if not has_rope[i])

    def windows(self):
        """Return (window or None, indices of the full-attention layers).

        In Qwen models, the window applies only with `use_sliding_window`, from layer `max_window_layers` on.
        """
        if "use_sliding_window" in self.family_reads:
            switched_on = self.flag("use_sliding_window")
            self.read |= {"sliding_window", "max_window_layers"} | {"layer_types"} & set(self.family_reads)
            if not switched_on:
                types = self.get("layer_types", [])
                if not isinstance(types, list) or "sliding_attention" in types:
                    expected = "a list without sliding_attention unless use_sliding_window is true"
                    self.reject("layer_types", self.get("layer_types"), expected)
                return None, frozenset()
        elif "sliding_window" not in self.family_reads:
            return None, frozenset()
        window = self.optional_count("sliding_window")
        if window is None and "rope_local_base_freq" not in self.family_reads:
            return None, frozenset()
        full_attention_layers = self.full_attention_layers()
        if len(full_attention_layers) == self.number("num_hidden_layers", int):
            return None, frozenset()
        if window is None:  # the layers with a window have another RoPE, so their window cannot be left out
            self.reject("sliding_window", None, "a positive integer, because some layers have a window")
        return window, full_attention_layers

    def full_attention_layers(self):
        """Return the indices of the full-attention layers, from `layer_types` or by the family's rule."""
        layers = range(self.number("num_hidden_layers", int))
        if "layer_types" not in self.family_reads:
            return frozenset()
        types = self.get("layer_types")
        if types is None and "alternating_windows" in self.always:
            return frozenset(layers[1::2])
        if "sliding_window_pattern" in self.family_reads:
            pattern = self.number("sliding_window_pattern", int)  # ignored if the layers are listed
            if types is None:
                return frozenset(layers[pattern - 1 :: pattern])
        if types is None and "no_rope_layers" in self.family_reads:
            return frozenset(layers) - self.layers_without_rope()
        if types is None:
            return frozenset(layers[: self.count("max_window_layers")])
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != len(layers) or any(t not in known for t in types):
            self.reject(
                "layer_types", types, f"a list of {counted(len(layers), 'name')}, each {' or '.join(known)}"
            )
        return frozenset(i for i in layers if types[i] == "full_attention")

    def activation(self):
        """Return the activation in `hidden_act`, or for Gemma in `hidden_activation`, which overrides it."""
        self.read.add("hidden_act")
        gemma = "hidden_activation" in self.family_reads
        name, choices = ("hidden_activation", (GELU,)) if gemma else ("hidden_act", ("silu", "swish"))
        value = self.get(name, choices[0])
        if value not in choices:
            self.reject(name, value, f"{choices[0]!r}")
        return choices[0]

    def dtype(self):
        """Return the checkpoint's dtype: `dtype`, or `torch_dtype` in older files."""
        older = self.get("torch_dtype") or "float32"  # read even if the newer field is there
        value = self.get("dtype") or older
        if value not in DTYPES:
            self.reject("dtype" if self.get("dtype") else "torch_dtype", value, f"one of {', '.join(DTYPES)}")
        return value

    def experts(self):
        """Return the number of experts, and the number of experts that process each token."""
        names = [name for name in ("num_local_experts", "num_experts") if name in self.family_reads]
        self.read |= set(names)  # the first that is there applies
        name = next((name for name in names if self.get(name) is not None), names[0])
        experts, per_token = self.number(name, int), self.number("num_experts_per_tok", int)
        if per_token > experts:
            self.reject("num_experts_per_tok", per_token, f"at most {name}, {experts}")
        return experts, per_token

    def ffn_columns(self):
        """Return the number of FFN columns, of each expert in a model with experts."""
        own = "moe_intermediate_size" in self.family_reads
        self.read.add("intermediate_size")  # in a family with its own field, that of layers without experts
        return self.number("moe_intermediate_size" if own else "intermediate_size", int)

    def eos(self):
        value = self.get("eos_token_id", [])
        self.read.add("bos_token_id")  # known, but the tokenizer decides when to add it
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            self.reject("eos_token_id", value, "a token id or a list of token ids")
        return tuple(ids)

    def unread(self):
        """Return the names of unknown fields; reject unsupported values of ONLY_VALUE's fields.

        A field that is null is like one that is absent. Any other value may turn on a feature, false too.
        """
        unknown = list(self.unknown)
        for name, value in self.fields.items():
            if value is None or name in self.read or name in NO_EFFECT:
                continue
            if name in ONLY_VALUE and value != ONLY_VALUE[name]:
                self.reject(name, value, f"{ONLY_VALUE[name]!r}, the only supported value")
            if name not in ONLY_VALUE and not (name in TURNED_OFF and value == TURNED_OFF[name]):
                unknown.append(name)
        return tuple(unknown)


# Readers, by type, of optional fields that have the same name in config.json and in Config.
READERS = {
    bool: Reader.flag,
    float: lambda reader, name: reader.number(name, float),
    float | None: Reader.optional_number,
}
