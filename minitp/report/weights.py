"""The tensors of the checkpoint as cells of the map: a column for each tensor that every layer has.

A `*` in a tensor's general name stands for the layer or the expert: `model.layers.*.mlp.up_proj.weight`. The
tensors outside the layers stand next to the steps that use them. The experts of a layer share a cell.
"""

import re

BESIDE = {  # step outside the layers -> the tensor that it reads
    "embed_partial": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "logits_partial": "lm_head.weight",
}

READERS = {  # end of a layer tensor's general name -> the step that reads it
    "input_layernorm.weight": "attn.norm",
    "self_attn.q_proj.weight": "attn.q",
    "self_attn.k_proj.weight": "attn.k",
    "self_attn.v_proj.weight": "attn.v",
    "self_attn.q_proj.bias": "attn.q",
    "self_attn.k_proj.bias": "attn.k",
    "self_attn.v_proj.bias": "attn.v",
    "self_attn.q_norm.weight": "attn.q_norm",
    "self_attn.k_norm.weight": "attn.k_norm",
    "self_attn.o_proj.weight": "attn.out_partial",
    "self_attn.o_proj.bias": "attn.out",
    "post_attention_layernorm.weight": "mlp.norm",
    "pre_feedforward_layernorm.weight": "mlp.norm",
    "post_feedforward_layernorm.weight": "mlp.post_norm",
    "mlp.gate_proj.weight": "mlp.gate",
    "mlp.up_proj.weight": "mlp.up",
    "mlp.gate_proj.bias": "mlp.gate",
    "mlp.up_proj.bias": "mlp.up",
    "mlp.down_proj.weight": "mlp.out_partial",
    "mlp.down_proj.bias": "mlp.out",
    "block_sparse_moe.gate.weight": "mlp.router",
    "block_sparse_moe.experts.*.w1.weight": "mlp.experts",
    "block_sparse_moe.experts.*.w2.weight": "mlp.out_partial",
    "block_sparse_moe.experts.*.w3.weight": "mlp.experts",
    "mlp.gate.weight": "mlp.router",
    "mlp.experts.*.gate_proj.weight": "mlp.experts",
    "mlp.experts.*.up_proj.weight": "mlp.experts",
    "mlp.experts.*.down_proj.weight": "mlp.out_partial",
}


def general_name(name):
    """Replace the layer and the expert in a tensor's name by `*`.

    >>> general_name("model.layers.3.block_sparse_moe.experts.5.w1.weight")
    'model.layers.*.block_sparse_moe.experts.*.w1.weight'
    """
    return re.sub(r"\b(layers|experts)\.\d+\.", r"\1.*.", name)


def layer_of(name):
    """Return the number of the layer that a tensor belongs to, or None."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match and int(match[1])


def columns(names):
    """Return the general names of the tensors that layers have, in order."""
    general = dict.fromkeys(map(general_name, names))
    return [name for name in general if name.startswith("model.layers.*.")]


def beside(names):
    """Return the entries of BESIDE for the tensors that there are."""
    return {step: tensor for step, tensor in BESIDE.items() if tensor in names}


def readers(names, steps):
    """Return general name -> the step that reads the tensor, for those of `steps`."""
    prefix = "model.layers.*."
    table = {prefix + end: step for end, step in READERS.items()}
    table |= {tensor: step for step, tensor in BESIDE.items()}
    general = {general_name(name) for name in names}
    if f"{prefix}pre_feedforward_layernorm.weight" in general:  # Gemma, where this norm follows the block
        table[f"{prefix}post_attention_layernorm.weight"] = "attn.post_norm"
    return {name: table[name] for name in general if table.get(name) in steps}


def grouped(items, name_of, place_of=lambda item: None):
    """Return lists of items that share a cell: the same general name, layer and place, in order."""
    groups = {}
    for item in items:
        name = name_of(item)
        groups.setdefault((general_name(name), layer_of(name), place_of(item)), []).append(item)
    return list(groups.values())
