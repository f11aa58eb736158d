"""The modules of vLLM, and the steps that their inputs and outputs are, by model_type.

Read in vLLM 0.32.0 (vllm/model_executor/models/). The tokens of all sequences lie one after another on the
first axis. A norm within a layer is given its input and the residual stream, adds them, and returns the norm
and the sum, so the stream after layer i is the second output of a norm of layer i + 1, or of the last norm.
"""

from minitp.mapping.table import into, out
from minitp.mapping.transformers import ATTENTION, LAYERS, MLP

# Steps that vLLM rounds to a smaller dtype than the model's, by model_type.
ROUNDINGS = {"gemma2": {"attn.context": "float16"}}  # on a CPU it approximates the tanh of the soft cap
NORM = [out("attn.norm", "T D"), out("mlp.residual", "T D", index=1, offset=-1)]
AFTER_ATTENTION = [out("mlp.norm", "T D"), out("attn.residual", "T D", index=1)]
LLAMA = {
    "model.layers.0": [into("embed", "T D", index=1)],
    f"{LAYERS}.input_layernorm": NORM,
    f"{ATTENTION}.qkv_proj": [out("attn.q attn.k attn.v", "T Hd")],
    f"{ATTENTION}.attn": [into("attn.q_rope", "T Hd"), into("attn.k_rope", "T Kd", index=1)],
    f"{ATTENTION}.o_proj": [into("attn.context", "T Hd"), out("attn.out", "T D")],
    f"{LAYERS}.post_attention_layernorm": AFTER_ATTENTION,
    f"{MLP}.gate_up_proj": [out("mlp.gate mlp.up", "T F")],
    f"{MLP}.down_proj": [into("mlp.act", "T F"), out("mlp.out", "T D")],
    "model.norm": [out("final_norm", "T D"), out("mlp.residual", "T D", index=1, offset=-1)],
    "logits_processor": [out("logits", "T V")],
}
HEAD_NORMS = {
    f"{ATTENTION}.q_norm": [out("attn.q_norm", "T H d")],
    f"{ATTENTION}.k_norm": [out("attn.k_norm", "T K d")],
}
POST_NORMS = {
    f"{LAYERS}.post_attention_layernorm": [out("attn.post_norm", "T D")],
    f"{LAYERS}.pre_feedforward_layernorm": AFTER_ATTENTION,
    f"{LAYERS}.post_feedforward_layernorm": [out("mlp.post_norm", "T D")],
}
PLAIN_NORMS = {  # Granite adds outside the norms
    f"{LAYERS}.input_layernorm": [out("attn.norm", "T D")],
    f"{LAYERS}.post_attention_layernorm": [into("attn.residual", "T D"), out("mlp.norm", "T D")],
    LAYERS: [out("mlp.residual", "T D")],
    "model.norm": [out("final_norm", "T D")],
}


def experts(block):
    """Return the steps of a mixture's block, whose router is called `gate`."""
    return {
        f"{LAYERS}.{block}.gate": [out("mlp.router", "T E")],
        f"{LAYERS}.{block}": [out("mlp.out", "T D")],
    }


VLLM = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | HEAD_NORMS,
    "gemma2": LLAMA | POST_NORMS,
    "gemma3_text": LLAMA | POST_NORMS | HEAD_NORMS,
    "granite": LLAMA | PLAIN_NORMS,
    "mixtral": LLAMA | experts("block_sparse_moe"),
    "qwen3_moe": LLAMA | HEAD_NORMS | experts("mlp"),
}
