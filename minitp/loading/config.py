"""What a model's config.json says, under Hugging Face's own names, and nothing silently ignored."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minitp.errors import InputError
from minitp.loading.families import FAMILIES
from minitp.loading.rope_config import Rope, read_rope

# Fields that would change the maths, with the only value for which the maths here is right.
ONLY_VALUE = {
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_decoder": True,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
}

# Fields that say nothing about the forward pass.
NO_MATHS = {
    "_name_or_path", "_attn_implementation", "architectures", "model_type", "transformers_version",
    "transformers.js_config", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "pad_token_id", "unk_token_id", "return_dict",
    "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "chunk_size_feed_forward",
    "problem_type", "id2label", "label2id", "name_or_path", "auto_map", "attn_implementation", "sep_token_id",
    "decoder_start_token_id", "max_length", "min_length", "do_sample", "num_beams", "temperature", "top_k",
    "top_p", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences",
    "cache_implementation", "sliding_window_size", "resid_pdrop", "embd_pdrop", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise",
}  # fmt: skip

GELU = "gelu_pytorch_tanh"

DTYPES = ("float32", "float16", "bfloat16")


def option(plain, words):
    """A field in which families differ: `plain` is Llama's value, `words` name what another one asks for.

    A family's row in FAMILIES says where the value comes from. By these words `cuda.fused` refuses what it
    has no kernels for.
    """
    return dataclasses.field(default=plain, metadata={"words": words})


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the forward pass and generation read."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    eos_token_ids: tuple
    dtype: str
    tie_word_embeddings: bool = False
    joined_projections: bool = False  # the file has q, k and v in one tensor, and gate and up in another
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    full_attention_layers: frozenset = frozenset()  # those that see everything in spite of sliding_window
    num_experts_per_tok: int = 0
    num_local_experts: int = option(0, "experts")
    qk_norm: bool = option(False, "a norm of q and k")
    norm_plus_one: bool = option(False, "norms that multiply with 1 + weight")
    post_norms: bool = option(False, "norms after the blocks")  # before the addition
    embedding_multiplier: float = option(1.0, "scaled embeddings")
    attention_multiplier: float = option(None, "another scale of the scores")  # None: 1 / sqrt(head_dim)
    residual_multiplier: float = option(1.0, "a residual_multiplier")  # of what a block adds to the stream
    logits_scaling: float = option(1.0, "logits_scaling")  # logits are divided by it
    attn_logit_softcapping: float | None = option(None, "soft caps")
    final_logit_softcapping: float | None = option(None, "soft caps")
    layers_without_rope: frozenset = option(frozenset(), "layers without RoPE")
    hidden_act: str = option("silu", "hidden_act {}")  # or GELU
    unread: tuple = ()  # fields that nothing here knows, for a warning

    @cached_property
    def windows(self):
        """The sliding window of each layer, None where it sees everything."""
        layers = range(self.num_hidden_layers)
        return [None if i in self.full_attention_layers else self.sliding_window for i in layers]

    def with_layers(self, layers, where):
        """The same model cut to its first `layers` layers (None: all of them)."""
        if layers is None:
            return self
        if not 1 <= layers <= self.num_hidden_layers:
            raise InputError(
                f"--layers {layers}: {where} has {self.num_hidden_layers} layers; give 1 to that"
            )
        return dataclasses.replace(self, num_hidden_layers=layers)


def read_config(directory):
    """Read and check `directory`/config.json (and generation_config.json for the end-of-text tokens).

    Raises
    ------
    InputError
        with one line that names the file, the field, its value and what was expected.
    """
    path = Path(directory) / "config.json"
    fields = read_json(path)
    generation = Path(directory) / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            fields = {**fields, "eos_token_id": eos}
    return parse_config(fields, str(path))


def read_json(path):
    """The object in a JSON file, or an InputError that says what is wrong with it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        wanted = "; --model wants a Hugging Face model directory" if Path(path).name == "config.json" else ""
        raise InputError(f"{path}: no such file{wanted}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep or long for Python
        raise InputError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_config(fields, where):
    """A Config from the fields of a config.json; `where` names it in errors."""
    family = FAMILIES.get(str(fields.get("model_type")))
    if family is None or fields.get("architectures") not in (None, [family["architecture"]]):
        known = ", ".join(f"{name} ({f['architecture']})" for name, f in FAMILIES.items())
        raise InputError(
            f"{where}: model_type {fields.get('model_type')!r} with architectures "
            f"{fields.get('architectures')!r} is not supported; supported: {known}"
        )
    return Reader({**family["defaults"], **fields}, family, where).config()


class Reader:
    """Takes fields out of config.json one by one, so that what is left over is known."""

    def __init__(self, fields, family, where):
        self.fields = fields
        self.family_reads = family["reads"]
        self.always = family.get("always", ())
        self.rope_aliases = family.get("rope_aliases", {})
        self.where = where
        self.read = set()

    def get(self, name, default=None):
        self.read.add(name)
        value = self.fields.get(name)
        return default if value is None else value

    def refuse(self, name, value, expected):
        raise InputError(f"{self.where}: {name} is {value!r}, expected {expected}")

    def count(self, name):
        """An integer that may be 0."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(name, value, "an integer, 0 or more")
        return value

    def number(self, name, kind, default=None):
        value = self.get(name, default)
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        right_type = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not right_type or not value > 0:
            self.refuse(name, value, "a positive number" if kind is float else "a positive integer")
        return kind(value)

    def optional_number(self, name):
        """A positive number, or None where it is null or absent."""
        return None if self.get(name) is None else self.number(name, float)

    def flag(self, name):
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def config(self):
        heads = self.number("num_attention_heads", int)
        kv_heads = self.number("num_key_value_heads", int, heads)
        hidden = self.number("hidden_size", int)
        if heads % kv_heads:
            self.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
        if self.get("head_dim") is None and hidden % heads:
            self.refuse("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}, or a head_dim")
        head_dim = self.number("head_dim", int, hidden // heads)
        if head_dim % 2:
            self.refuse("head_dim", head_dim, "an even number (RoPE turns pairs)")
        dtype = self.get("dtype") or self.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            self.refuse("dtype", dtype, "one of " + ", ".join(DTYPES))
        longest = self.number("max_position_embeddings", int)
        rope = read_rope(self, head_dim, longest)
        if rope.rope_type == "longrope":  # has other frequencies beyond that, to which nothing switches
            longest = min(longest, rope.original_max_position_embeddings)
        window, full_attention_layers = self.windows()
        return Config(
            model_type=self.get("model_type"),
            vocab_size=self.number("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=self.number("intermediate_size", int),
            num_hidden_layers=self.number("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", float, 1e-6),
            rope=rope,
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
        """The fields in which families differ, as far as the family's row says that it has them."""
        found = {}
        for field in dataclasses.fields(Config):
            name = field.name
            if name in self.always:
                found[name] = True
            elif name in self.family_reads and field.type in READERS:
                found[name] = READERS[field.type](self, name)
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
        """From `no_rope_layers`, a 1 for each layer with RoPE; or every `no_rope_layer_interval`th layer."""
        layers, turns = range(self.number("num_hidden_layers", int)), self.get("no_rope_layers")
        interval = self.number("no_rope_layer_interval", int)
        if turns is None:
            turns = [(i + 1) % interval != 0 for i in layers]
        if not isinstance(turns, list) or len(turns) < len(layers) or any(t not in (0, 1) for t in turns):
            self.refuse("no_rope_layers", turns, f"a list of {len(layers)}, each 0 or 1")
        return frozenset(i for i in layers if not turns[i])

    def windows(self):
        """sliding_window, and the layers that it does not concern.

        Qwen's count only with `use_sliding_window`, and from layer `max_window_layers` on.
        """
        if "use_sliding_window" in self.family_reads:
            switched_on = self.flag("use_sliding_window")
            self.read |= {"sliding_window", "max_window_layers", "layer_types"}
            if not switched_on:
                if "sliding_attention" in (self.get("layer_types") or ()):
                    self.refuse("layer_types", self.get("layer_types"), "use_sliding_window true with these")
                return None, frozenset()
        elif "sliding_window" not in self.family_reads:
            return None, frozenset()
        if self.get("sliding_window") is None:
            return None, frozenset()
        window, full_attention_layers = self.number("sliding_window", int), self.full_attention_layers()
        if len(full_attention_layers) == self.number("num_hidden_layers", int):
            return None, frozenset()
        return window, full_attention_layers

    def full_attention_layers(self):
        """From `layer_types`, or where that is absent by the family's rule."""
        layers = range(self.number("num_hidden_layers", int))
        if "layer_types" not in self.family_reads:
            return frozenset()
        types = self.get("layer_types")
        if types is None and "alternating_windows" in self.always:
            return frozenset(layers[1::2])
        if types is None and "no_rope_layers" in self.family_reads:
            return frozenset(layers) - self.layers_without_rope()
        if types is None:
            return frozenset(layers[: self.count("max_window_layers")])
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != len(layers) or any(t not in known for t in types):
            self.refuse("layer_types", types, f"a list of {len(layers)}, each one of {', '.join(known)}")
        return frozenset(i for i in layers if types[i] == "full_attention")

    def activation(self):
        """`hidden_act`, or Gemma's `hidden_activation`, beside which `hidden_act` does not count."""
        self.read.add("hidden_act")
        gemma = "hidden_activation" in self.family_reads
        name, choices = ("hidden_activation", (GELU,)) if gemma else ("hidden_act", ("silu", "swish"))
        value = self.get(name, choices[0])
        if value not in choices:
            self.refuse(name, value, f"{choices[0]!r}")
        return choices[0]

    def experts(self):
        """How many there are, and how many of them a token goes through."""
        experts, per_token = (self.number(n, int) for n in ("num_local_experts", "num_experts_per_tok"))
        if per_token > experts:
            self.refuse("num_experts_per_tok", per_token, f"at most num_local_experts, {experts}")
        return experts, per_token

    def eos(self):
        value = self.get("eos_token_id", [])
        self.read.add("bos_token_id")  # the tokenizer knows when to put it in front
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            self.refuse("eos_token_id", value, "a token id or a list of them")
        return tuple(ids)

    def unread(self):
        """Refuse fields that change the maths; return those that nobody here knows."""
        unknown = []
        for name, value in self.fields.items():
            if name in ONLY_VALUE:
                if value is not None and value != ONLY_VALUE[name]:
                    self.refuse(name, value, f"{ONLY_VALUE[name]!r}: nothing else is supported")
            elif name not in self.read and name not in NO_MATHS and value not in (None, False, [], {}):
                unknown.append(name)
        return tuple(unknown)


READERS = {  # of a field that is called the same in config.json, by its type
    bool: Reader.flag,
    float: lambda reader, name: reader.number(name, float),
    float | None: Reader.optional_number,
}
