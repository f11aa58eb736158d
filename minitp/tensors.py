"""The tensors of a checkpoint, and how each one is split over the ranks.

    column       column-parallel: each rank holds some columns of w, and computes those columns of x @ w
    row          row-parallel: each rank holds some rows of w, and computes one term of the sum x @ w
    replicated   each rank holds the whole tensor

A checkpoint stores w as [out, in], so the columns of w are the rows of the file's tensor (axis 0), and the
rows of w are its columns (axis 1). Each axis has the letters of its size, in the order of the file:

    V vocabulary size   D hidden size   Hd query heads * head_dim   Kd key/value heads * head_dim
    F FFN columns       d head_dim      E experts
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """The shape of a tensor in letters, and the axis that is split over the ranks (None: replicated)."""

    shape: tuple
    axis: int | None


def column(*shape):
    """Split a matrix [out, in] or a bias [out] along `out`, or the embedding table along its rows."""
    return Split(shape, 0)


def row(*shape):
    """Split a matrix [out, in] along `in`."""
    return Split(shape, 1)


def replicated(*shape):
    """Hold the whole tensor on every rank."""
    return Split(shape, None)


MODEL_TENSORS = {
    "model.embed_tokens.weight": column("V", "D"),  # split along its rows, one per token of the vocabulary
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

# The tensors that some families add to a layer, by the field of Config that turns them on.
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
    "post_norms": {  # post_attention_layernorm then comes after attention, not before the mlp
        "pre_feedforward_layernorm.weight": replicated("D"),
        "post_feedforward_layernorm.weight": replicated("D"),
    },
}
# The router and the matrices of each expert {n}; they replace the matrices of the dense mlp.
EXPERT_TENSORS = {
    "block_sparse_moe.gate.weight": replicated("E", "D"),
    "block_sparse_moe.experts.{n}.w1.weight": column("F", "D"),  # gate
    "block_sparse_moe.experts.{n}.w2.weight": row("D", "F"),  # down
    "block_sparse_moe.experts.{n}.w3.weight": column("F", "D"),  # up
}
# The same tensors in a checkpoint with `experts_in_mlp`.
MLP_EXPERT_TENSORS = {
    "mlp.gate.weight": replicated("E", "D"),
    "mlp.experts.{n}.gate_proj.weight": column("F", "D"),
    "mlp.experts.{n}.up_proj.weight": column("F", "D"),
    "mlp.experts.{n}.down_proj.weight": row("D", "F"),
}
# Tensors that some checkpoints store as one, concatenated along `out`.
JOINED = {
    "self_attn.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


def tensor_table(config):
    """Return the Split of each tensor of the model, by name; joined tensors are listed by their parts."""
    layer = dict(LAYER_TENSORS)
    for option, tensors in OPTIONAL_TENSORS.items():
        if getattr(config, option):
            layer |= tensors
    if config.num_local_experts:
        layer = {name: split for name, split in layer.items() if not name.startswith("mlp.")}
        experts = MLP_EXPERT_TENSORS if config.experts_in_mlp else EXPERT_TENSORS
        for n in range(config.num_local_experts):
            layer |= {name.format(n=n): split for name, split in experts.items()}
    table = dict(MODEL_TENSORS)
    if config.tie_word_embeddings:
        del table["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        table |= {f"model.layers.{i}.{name}": split for name, split in layer.items()}
    return table
