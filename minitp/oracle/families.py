"""The families' settings, read from the dict in config.json: defaults, windows, RoPE and tensors.

DEFAULTS are the values that transformers assumes for fields that config.json omits, FAMILY_DEFAULTS those
that it assumes for a family instead, and NOT_READ the fields that it does not read for a family.
"""

import numpy as np

from minitp.oracle.ops import attention_factor, original_length, rope_inverse_frequencies

DEFAULTS = dict(num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6)
DEFAULTS |= dict(tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
FAMILY_DEFAULTS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
}
FAMILY_DEFAULTS["qwen3"] = FAMILY_DEFAULTS["qwen2"] | {"head_dim": 128}
FAMILY_DEFAULTS["qwen3_moe"] = dict(num_key_value_heads=4, sliding_window=4096, norm_topk_prob=False)
FAMILY_DEFAULTS["qwen3_moe"] |= dict(moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
FAMILY_DEFAULTS["phi3"] = dict(rms_norm_eps=1e-5, sliding_window=None, max_position_embeddings=4096)
FAMILY_DEFAULTS["phi3"] |= dict(original_max_position_embeddings=4096)
FAMILY_DEFAULTS["gemma2"] = dict(num_key_value_heads=4, head_dim=256, sliding_window=4096)
FAMILY_DEFAULTS["gemma2"] |= dict(tie_word_embeddings=True, query_pre_attn_scalar=256)
FAMILY_DEFAULTS["gemma2"] |= dict(hidden_activation="gelu_pytorch_tanh", sliding_window_pattern=2)
FAMILY_DEFAULTS["gemma3_text"] = FAMILY_DEFAULTS["gemma2"] | dict(sliding_window_pattern=6)
FAMILY_DEFAULTS["gemma3_text"] |= dict(final_logit_softcapping=None)
FAMILY_DEFAULTS["gemma3_text"] |= dict(rope_theta=1e6, rope_local_base_freq=1e4)
FAMILY_DEFAULTS["gemma2"] |= dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
FAMILY_DEFAULTS["mixtral"] = dict(num_key_value_heads=8, sliding_window=None, rms_norm_eps=1e-5)
FAMILY_DEFAULTS["mixtral"] |= dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6)
FAMILY_DEFAULTS["smollm3"] = dict(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True)
FAMILY_DEFAULTS["smollm3"] |= dict(sliding_window=None, no_rope_layers=None, no_rope_layer_interval=4)
FAMILY_DEFAULTS["granite"] = dict(embedding_multiplier=1, attention_multiplier=1)
FAMILY_DEFAULTS["granite"] |= dict(residual_multiplier=1, logits_scaling=1)
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
NOT_READ = {"llama": {"sliding_window": None}, "mistral": NO_BIASES, "qwen2": NO_BIASES}
NOT_READ["gemma2"] = {"mlp_bias": False, "sliding_window_pattern": 2}
NOT_READ["gemma3_text"] = {"mlp_bias": False, "attn_logit_softcapping": None}
NOT_READ |= {"phi3": NO_BIASES, "mixtral": NO_BIASES | {"norm_topk_prob": True}}
NOT_READ |= {"qwen3": {"mlp_bias": False}, "qwen3_moe": {"mlp_bias": False, "layer_types": None}}
NOT_READ["smollm3"] = {}
NOT_READ["granite"] = {"sliding_window": None}

GEMMA = ("gemma2", "gemma3_text")
# family -> the block with the experts, and the names of an expert's gate, up and down projection
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def settings(config):
    """Return the fields of config.json that the family reads, with its defaults; raise ValueError."""
    family = config.get("model_type")
    if family not in FAMILY_DEFAULTS:
        raise ValueError(f"model_type {family!r}: expected one of {', '.join(FAMILY_DEFAULTS)}")
    fields = {**DEFAULTS, **FAMILY_DEFAULTS[family], **config, **NOT_READ[family]}
    if family == "qwen3_moe":  # all layers have experts, and the size of a dense layer is not used
        fields["intermediate_size"] = fields["moe_intermediate_size"]
        fields["num_local_experts"] = config.get("num_local_experts") or fields["num_experts"]
        if fields.get("decoder_sparse_step") not in (None, 1) or fields.get("mlp_only_layers"):
            raise ValueError("qwen3_moe with layers without experts is not supported")
    return fields


def activation(fields):
    """Return the activation, `silu` or `gelu_pytorch_tanh`; raise ValueError for any other."""
    gemma = fields["model_type"] in GEMMA
    act = fields["hidden_activation" if gemma else "hidden_act"]
    expected = "gelu_pytorch_tanh" if gemma else "silu"
    if act != expected and (act, expected) != ("swish", "silu"):
        raise ValueError(f"hidden_act {act!r}: expected {expected}")
    return expected


def has_rope(fields, layer):
    """Return True if a layer applies RoPE, as all do except, by default, every fourth layer of SmolLM3."""
    if fields["model_type"] != "smollm3":
        return True
    listed, interval = fields["no_rope_layers"], fields["no_rope_layer_interval"]
    return (layer + 1) % interval > 0 if listed is None else listed[layer] == 1


def slides(fields, layer):
    """Return True if a layer has the sliding window, in a model that has one."""
    family, types = fields["model_type"], fields.get("layer_types")
    if family in ("qwen2", "qwen3", "smollm3", *GEMMA) and types is not None:
        return types[layer] == "sliding_attention"
    if family in GEMMA:
        return (layer + 1) % fields["sliding_window_pattern"] > 0
    if family == "smollm3":
        return not has_rope(fields, layer)
    return layer >= fields["max_window_layers"] if family in ("qwen2", "qwen3") else True


def sliding_window(fields, layer):
    """Return the number of keys that a query of this layer sees, including its own; None for all."""
    has_switch = fields["model_type"] in ("qwen2", "qwen3", "qwen3_moe", "smollm3")
    switched_on = fields.get("use_sliding_window") or not has_switch
    return fields["sliding_window"] if switched_on and slides(fields, layer) else None


def rotation(fields, layer):
    """Return a layer's RoPE: the angle per position of each pair, [R/2], and the factor of q and k.

    In Gemma 3, the layers with a window have one RoPE and the others another. (Gemma Team, Gemma 3, 2025,
    section 2.)
    """
    of_layer = fields
    if fields["model_type"] == "gemma3_text":
        local = slides(fields, layer)
        kind, theta = ("sliding", "rope_local_base_freq") if local else ("full", "rope_theta")
        rope = {"rope_theta": fields[theta]}
        rope |= (fields.get("rope_parameters") or {}).get(f"{kind}_attention") or {}
        rope |= {} if local else fields.get("rope_scaling") or {}
        of_layer = {**fields, "rope_scaling": None, "rope_parameters": rope}
    return rope_inverse_frequencies(of_layer), attention_factor(of_layer)


def longest_context(fields):
    """Return the number of tokens for which the angles of `rotation` are right; infinite but for longrope."""
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    scaling = scaling.get("full_attention") or scaling  # as Gemma 3 writes it
    return original_length(fields, scaling) if "short_factor" in scaling else np.inf


def parts_of_joined(tensor, q, kv, ffn):
    """Wrap `tensor` for a checkpoint with q, k and v in one tensor, and gate and up in another.

    The numbers of rows of q, of k or v, and of gate or up are `q`, `kv` and `ffn`.
    """
    rows = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    rows |= {"gate_proj": (0, ffn), "up_proj": (ffn, 2 * ffn)}

    def part(name, *index):
        block, _, kind = name.rpartition(".")
        block, _, projection = block.rpartition(".")
        if projection not in rows:
            return tensor(name, *index)
        joined = "qkv_proj" if block.endswith("self_attn") else "gate_up_proj"
        return tensor(f"{block}.{joined}.{kind}")[slice(*rows[projection])][index[0] if index else ...]

    return part
