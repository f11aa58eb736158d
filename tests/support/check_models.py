"""The models that `check` is tested with."""

from paths import GOLDENS
from safetensors.numpy import load_file, save_file
from tiny import UNEVEN, write_tiny

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


DTYPES = ("float32", "float16", "bfloat16")


SHAPE = UNEVEN | {"num_hidden_layers": 3}

SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 10}
GEMMA |= {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "sliding_window": 5}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 10}
GEMMA3 |= {"sliding_window": 5, "sliding_window_pattern": 2, "rope_theta": 1e5, "rope_local_base_freq": 50}
QWEN3_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}
QWEN3_MOE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 37, "norm_topk_prob": False}
GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": True}
GRANITE |= {"embedding_multiplier": 3.0, "attention_multiplier": 0.1}
GRANITE |= {"residual_multiplier": 0.22, "logits_scaling": 7.0}
MODELS = {
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "granite": GRANITE,
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "scaled": {"rope_scaling": {**SCALING, "original_max_position_embeddings": 32}},
    "mixture": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "shares": QWEN3_MOE,
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
    "loud": {},
    "unturned": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layers": [0, 0, 0],
    },
    "normed": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "partial": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": 0.75,
    },
}


# A token of each rank's part of the vocabulary, including the first and the last row.
PROMPT = [100, 3, 40, 60, 80, 15, 25, 35, 52, 71, 95, 0]


def write_models(root, shape):
    """Write MODELS in this shape; return their directories by name."""
    found = {name: write_tiny(root / name, tokenizer=False, **{**shape, **f}) for name, f in MODELS.items()}
    tensors = load_file(found["loud"] / "model.safetensors")
    for i in range(3):  # scores of a hundred and more, for which exp() in float32 overflows
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] *= 100
    save_file(tensors, found["loud"] / "model.safetensors")
    return found


def blame(result):
    """Return (full name, rank) of all findings that a CheckResult blames."""
    return [(finding.name, finding.rank) for finding in result.blamed()]
