"""The modules of Megatron Core's GPT model, and the steps that their inputs and outputs are.

Its arrays are [T, 1, D]: tokens first, then the batch. The projections of q, k and v are one matrix, grouped
by KV head. Norms that are part of a projection (of TransformerEngine) have no module; then `attn.norm` and
`mlp.norm` are not in a dump.
"""

from minitp.mapping.table import GROUPED, Source, into, out

LAYER = "decoder.layers.{i}"
ATTENTION, MLP = f"{LAYER}.self_attention", f"{LAYER}.mlp"
HEADS, FLAT = "T 1 H d", "T 1 Hd"
MEGATRON = {
    "embedding": [out("embed", "T 1 D")],
    f"{LAYER}.input_layernorm": [out("attn.norm", "T 1 D")],
    f"{ATTENTION}.linear_qkv": [Source("attn.q attn.k attn.v", "output", FLAT, order=GROUPED)],
    f"{ATTENTION}.q_layernorm": [out("attn.q_norm", HEADS)],
    f"{ATTENTION}.k_layernorm": [out("attn.k_norm", "T 1 K d")],
    f"{ATTENTION}.core_attention": [
        into("attn.q_rope", HEADS),
        into("attn.k_rope", "T 1 K d", index=1),
        out("attn.context", FLAT),
    ],
    f"{ATTENTION}.linear_proj": [into("attn.context", FLAT), out("attn.out", "T 1 D")],
    f"{LAYER}.pre_mlp_layernorm": [into("attn.residual", "T 1 D"), out("mlp.norm", "T 1 D")],
    f"{MLP}.linear_fc1": [out("mlp.gate mlp.up", "T 1 F")],
    f"{MLP}.linear_fc2": [into("mlp.act", "T 1 F"), out("mlp.out", "T 1 D")],
    MLP: [out("mlp.out", "T 1 D")],
    LAYER: [out("mlp.residual", "T 1 D")],
    "decoder.final_layernorm": [out("final_norm", "T 1 D")],
    "output_layer": [out("logits", "T 1 V")],
}
