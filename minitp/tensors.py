"""Every tensor of a checkpoint, and how it is split over the ranks.

    column       column-parallel: each rank has its own columns of w, and so its own columns of x @ w
    row          row-parallel: each rank has its own rows of w, and so a term of the sum x @ w
    replicated   each rank has all of it

A matrix lies [out, in] in a checkpoint, so its columns are the rows of the file (axis 0), and its rows the
file's columns (axis 1). The letters name the size of each axis, as in the file:

    V vocabulary   D hidden   Hd query heads * head_dim   Kd key/value heads * head_dim
    F FFN columns   d head_dim   E experts
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """The shape of a tensor in letters, and the axis along which the ranks share it (None: all have it)."""

    shape: tuple
    axis: int | None


def column(*shape):
    """Split the columns of a matrix [out, in] by its `out`; or its bias [out]; or a table by its rows."""
    return Split(shape, 0)


def row(*shape):
    """Split the rows of a matrix [out, in] by its `in`."""
    return Split(shape, 1)


def replicated(*shape):
    """Split nothing."""
    return Split(shape, None)


MODEL_TENSORS = {
    "model.embed_tokens.weight": column("V", "D"),  # its rows, one a token of the vocabulary
    "model.norm.weight": replicated("D"),
    "lm_head.weight": column("V", "D"),
}
LAYER_TENSORS = {
    "input_layernorm.weight": replicated("D"),
    "self_attn.q_proj.weight": column("Hd", "D"),
    "self_attn.k_proj.weight": column("Kd", "D"),
    "self_attn.v_proj.weight": column("Kd", "D"),
    "self_attn.o_proj.weight": row("D", "Hd"),
    "post_attention_layernorm.weight": replicated("D"),
    "mlp.gate_proj.weight": column("F", "D"),
    "mlp.up_proj.weight": column("F", "D"),
    "mlp.down_proj.weight": row("D", "F"),
}

# What some families add to a layer, by the field of Config that says so.
OPTIONAL_TENSORS = {
    "qkv_bias": {
        "self_attn.q_proj.bias": column("Hd"),
        "self_attn.k_proj.bias": column("Kd"),
        "self_attn.v_proj.bias": column("Kd"),
    },
    "o_bias": {"self_attn.o_proj.bias": replicated("D")},
    "mlp_bias": {
        "mlp.gate_proj.bias": column("F"),
        "mlp.up_proj.bias": column("F"),
        "mlp.down_proj.bias": replicated("D"),
    },
    "qk_norm": {
        "self_attn.q_norm.weight": replicated("d"),
        "self_attn.k_norm.weight": replicated("d"),
    },
    "post_norms": {  # with these, post_attention_layernorm comes after attention, too
        "pre_feedforward_layernorm.weight": replicated("D"),
        "post_feedforward_layernorm.weight": replicated("D"),
    },
    "num_local_experts": {"block_sparse_moe.gate.weight": replicated("E", "D")},
}
# Each expert's gate, down and up, in place of the dense mlp's: under block_sparse_moe.experts.{n}
EXPERT_TENSORS = {
    "w1.weight": column("F", "D"),
    "w2.weight": row("D", "F"),
    "w3.weight": column("F", "D"),
}
# Tensors that some checkpoints keep one below the other in a single one.
JOINED = {
    "self_attn.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


def tensor_table(config):
    """The Split of every tensor of the model by its name; what JOINED has together is listed apart."""
    layer = dict(LAYER_TENSORS)
    for option, tensors in OPTIONAL_TENSORS.items():
        if getattr(config, option):
            layer |= tensors
    if config.num_local_experts:
        layer = {name: split for name, split in layer.items() if not name.startswith("mlp.")}
    for n in range(config.num_local_experts):
        layer |= {f"block_sparse_moe.experts.{n}.{name}": split for name, split in EXPERT_TENSORS.items()}
    table = dict(MODEL_TENSORS)
    if config.tie_word_embeddings:
        del table["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        table |= {f"model.layers.{i}.{name}": split for name, split in layer.items()}
    return table
