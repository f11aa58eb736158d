"""The modules of Hugging Face transformers, and the steps that their inputs and outputs are.

A recipe maps a module's path, in which {i} stands for the number of a layer, to a list of Source.
"""

from minitp.mapping.table import into, out

LAYERS = "model.layers.{i}"
ATTENTION, MLP = f"{LAYERS}.self_attn", f"{LAYERS}.mlp"
# Hugging Face transformers, by model_type. Rotated queries and keys, the cache and the probabilities are
# arguments and results of functions; see `record.ProbeRecorder.observed`.
LLAMA = {
    "model.layers.0": [into("embed")],
    f"{LAYERS}.input_layernorm": [out("attn.norm")],
    f"{ATTENTION}.q_proj": [out("attn.q", "1 T Hd")],
    f"{ATTENTION}.k_proj": [out("attn.k", "1 T Kd")],
    f"{ATTENTION}.v_proj": [out("attn.v", "1 T Kd")],
    f"{ATTENTION}.o_proj": [into("attn.context", "1 T Hd"), out("attn.out")],
    f"{LAYERS}.post_attention_layernorm": [into("attn.residual"), out("mlp.norm")],
    f"{MLP}.gate_proj": [out("mlp.gate", "1 T F")],
    f"{MLP}.up_proj": [out("mlp.up", "1 T F")],
    f"{MLP}.down_proj": [into("mlp.act", "1 T F"), out("mlp.out")],
    LAYERS: [out("mlp.residual")],
    "model.norm": [out("final_norm")],
    "": [out("logits", "1 T V")],
}
HEAD_NORMS = {
    f"{ATTENTION}.q_norm": [out("attn.q_norm", "1 T H d")],
    f"{ATTENTION}.k_norm": [out("attn.k_norm", "1 T K d")],
}
TRANSPOSED_HEAD_NORMS = {  # Gemma 3 transposes before the norm
    f"{ATTENTION}.q_norm": [out("attn.q_norm", "1 H T d")],
    f"{ATTENTION}.k_norm": [out("attn.k_norm", "1 K T d")],
}
JOINED = {
    f"{ATTENTION}.qkv_proj": [out("attn.q attn.k attn.v", "1 T Hd")],
    f"{MLP}.gate_up_proj": [out("mlp.gate mlp.up", "1 T F")],
}
POST_NORMS = {
    f"{LAYERS}.post_attention_layernorm": [out("attn.post_norm")],
    f"{LAYERS}.pre_feedforward_layernorm": [into("attn.residual"), out("mlp.norm")],
    f"{LAYERS}.post_feedforward_layernorm": [out("mlp.post_norm")],
}
EXPERTS = {f"{MLP}.gate": [out("mlp.router", "T E")], MLP: [out("mlp.out")]}
TRANSFORMERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "qwen3": LLAMA | HEAD_NORMS,
    "phi3": LLAMA | JOINED,
    "gemma2": LLAMA | POST_NORMS,
    "gemma3_text": LLAMA | POST_NORMS | TRANSPOSED_HEAD_NORMS,
    "mixtral": LLAMA | EXPERTS,
    "qwen3_moe": LLAMA | HEAD_NORMS | EXPERTS,
}
