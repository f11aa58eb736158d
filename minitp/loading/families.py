"""The model families, keyed by the `model_type` of config.json (see docs/adding-a-family.md)."""

QWEN_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
QWEN_DEFAULTS |= {"sliding_window": 4096, "max_window_layers": 28}

# Keys of a family:
#   architecture   the name of its class in transformers
#   reads          the fields that only some families read, of those that it reads
#   defaults       the values that transformers assumes for absent fields
#   always         the features that all its models have, without a field in config.json
#   rope_aliases   older names of RoPE types
FAMILIES = {
    "llama": {
        "architecture": "LlamaForCausalLM",
        "reads": ("attention_bias", "mlp_bias"),
        "defaults": {"max_position_embeddings": 2048},
    },
    "mistral": {
        "architecture": "MistralForCausalLM",
        "reads": ("sliding_window",),
        "defaults": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    },
    "qwen2": {  # and Qwen2.5
        "architecture": "Qwen2ForCausalLM",
        "reads": ("use_sliding_window", "sliding_window", "layer_types"),
        "defaults": QWEN_DEFAULTS,
        "always": ("qkv_bias",),
    },
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "reads": ("attention_bias", "use_sliding_window", "sliding_window", "layer_types"),
        "defaults": {**QWEN_DEFAULTS, "head_dim": 128},
        "always": ("qk_norm",),
    },
    "qwen3_moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "reads": (
            "attention_bias",
            "use_sliding_window",
            "sliding_window",
            "num_local_experts",
            "num_experts",
            "moe_intermediate_size",
            "norm_topk_prob",
        ),
        "defaults": {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        "always": ("qk_norm", "experts_in_mlp"),
    },
    "smollm3": {
        "architecture": "SmolLM3ForCausalLM",
        "reads": (
            "attention_bias",
            "mlp_bias",
            "no_rope_layers",
            "use_sliding_window",
            "sliding_window",
            "layer_types",
        ),
        "defaults": {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
    },
    "gemma2": {
        "architecture": "Gemma2ForCausalLM",
        "reads": (
            "attention_bias",
            "sliding_window",
            "layer_types",
            "hidden_activation",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        "defaults": {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        "always": ("norm_plus_one", "post_norms", "scaled_embeddings", "alternating_windows"),
    },
    "gemma3_text": {
        "architecture": "Gemma3ForCausalLM",
        "reads": (
            "attention_bias",
            "sliding_window",
            "layer_types",
            "sliding_window_pattern",
            "rope_local_base_freq",
            "hidden_activation",
            "query_pre_attn_scalar",
            "final_logit_softcapping",
        ),
        "defaults": {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "tie_word_embeddings": True,
        },
        "always": ("qk_norm", "norm_plus_one", "post_norms", "scaled_embeddings"),
    },
    "granite": {
        "architecture": "GraniteForCausalLM",
        "reads": (
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        "defaults": {
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    },
    "mixtral": {
        "architecture": "MixtralForCausalLM",
        "reads": ("sliding_window", "num_local_experts"),
        "defaults": {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
    },
    "phi3": {  # and Phi-4
        "architecture": "Phi3ForCausalLM",
        "reads": ("sliding_window", "partial_rotary_factor"),
        "defaults": {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "always": ("joined_projections",),
        "rope_aliases": {"su": "longrope", "yarn": "longrope"},  # names in the first Phi-3 files
    },
}
