"""A model's configuration: the fields of config.json under Hugging Face's names."""

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minitp.errors import InputError, shown
from minitp.loading.config_reader import Reader
from minitp.loading.families import FAMILIES
from minitp.loading.rope_config import Rope
from minitp.util.files import read_json
from minitp.util.format import counted


def option(plain, words):
    """Define a field of Config whose value depends on the family.

    `plain` is Llama's value; a family's row in FAMILIES says where another value comes from. `words`
    describes other values in the error that `cuda.fused` raises because it has no kernels for them.
    """
    return dataclasses.field(default=plain, metadata={"words": words})


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the forward pass and generation read."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of each expert, if there are experts
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
    joined_projections: bool = False  # q, k and v are one tensor in the file, gate and up another
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    full_attention_layers: frozenset = frozenset()  # layers without the sliding window
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True  # the weights of a token's experts are normalized to add up to 1
    experts_in_mlp: bool = False  # the names in the file are mlp.experts.{n}.gate_proj, not .. .w1
    qk_norm: bool = option(False, "QK norm")
    norm_plus_one: bool = option(False, "norms that multiply by 1 + weight")
    post_norms: bool = option(False, "norms after the blocks")  # before the residual addition
    embedding_multiplier: float = option(1.0, "scaled embeddings")
    attention_multiplier: float = option(None, "another scale of the scores")  # None: 1 / sqrt(head_dim)
    residual_multiplier: float = option(1.0, "a residual_multiplier")  # scales a block's output
    logits_scaling: float = option(1.0, "logits_scaling")  # divides the logits
    attn_logit_softcapping: float | None = option(None, "soft caps")
    final_logit_softcapping: float | None = option(None, "soft caps")
    layers_without_rope: frozenset = option(frozenset(), "layers without RoPE")
    local_rope: Rope | None = option(None, "another RoPE in layers with a window")  # noqa: RUF009
    hidden_act: str = option("silu", "hidden_act {}")  # or gelu_pytorch_tanh
    unread: tuple = ()  # names of unknown fields, for a warning

    @property
    def rotary_dim(self):
        """The number of dimensions of each head that RoPE rotates, from the first."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @cached_property
    def windows(self):
        """The sliding window of each layer, or None for full attention."""
        layers = range(self.num_hidden_layers)
        return [None if i in self.full_attention_layers else self.sliding_window for i in layers]

    @cached_property
    def ropes(self):
        """The Rope of each layer, or None for a layer without RoPE."""
        local = self.local_rope or self.rope
        ropes = [self.rope if window is None else local for window in self.windows]
        return [None if i in self.layers_without_rope else rope for i, rope in enumerate(ropes)]

    def with_layers(self, layers, where):
        """Return the same model cut to its first `layers` layers (None: all of them)."""
        if layers is None:
            return self
        if not 1 <= layers <= self.num_hidden_layers:
            raise InputError(
                f"--layers {layers}: {where} has {counted(self.num_hidden_layers, 'layer')}; "
                f"choose from 1 to {self.num_hidden_layers}"
            )
        return dataclasses.replace(self, num_hidden_layers=layers)


def read_config(directory):
    """Read and check `directory`/config.json; generation_config.json may list more end-of-text tokens.

    Raises
    ------
    InputError
        if the file cannot be read or a field is not supported; the message is one line with the file, the
        field, its value and the supported values.
    """
    path = Path(directory) / "config.json"
    fields = read_json(path)
    config = parse_config(fields, str(path))
    generation = Path(directory) / "generation_config.json"
    if not os.path.lexists(generation):
        return config
    fields = {**fields, "eos_token_id": read_json(generation).get("eos_token_id")}
    more = parse_config(fields, str(generation)).eos_token_ids  # the fields of config.json are valid
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))


def parse_config(fields, where):
    """Return the Config for the fields of a config.json; `where` names the file in errors."""
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    family = FAMILIES.get(str(model_type))
    if family is None and "text_config" in fields:
        raise InputError(
            f"{where}: model_type {shown(model_type)} is not for text alone (it has a text_config); "
            f"supported are models for text alone: {', '.join(FAMILIES)}"
        )
    if family is None:
        raise InputError(
            f"{where}: model_type {shown(model_type)} with architectures {shown(architectures)} is not "
            f"supported; supported: {', '.join(FAMILIES)}"
        )
    if architectures not in (None, [family["architecture"]]):
        raise InputError(
            f"{where}: architectures {shown(architectures)} of model_type {model_type!r} is not supported; "
            f"supported: {family['architecture']}"
        )
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    return Config(**Reader({**family["defaults"], **fields}, family, where, types).values())
