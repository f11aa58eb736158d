"""The tensors of engines: for each name, the tensors of a Hugging Face checkpoint that it joins.

The names were read in vLLM's and Hugging Face transformers' models, Megatron Core's GPT model with the
conversions of Megatron Bridge, GGUF's constants and mlx-lm. Models of a family name some tensors otherwise;
braces stand for these, as in {router}, and `checkpoint_names` has them. Experts that are stacked along a new
first axis have {n} in the names of their parts.
"""

from minitp.mapping.table import GROUPED, HALF_SPLIT, INTERLEAVED, EngineTensor

LAYER = "model.layers.{i}"


def plain(*parts, **options):
    """Return the EngineTensor of some tensors of a layer, or of those of a whole model."""
    return EngineTensor(tuple(f"{LAYER}.{part}" for part in parts), **options)


def of_model(name, **options):
    """Return the EngineTensor of a tensor outside the layers."""
    return EngineTensor((name,), **options)


def with_bias(engine_name, *parts, **options):
    """Return the entries of a joined projection's weight and bias."""
    return {
        f"{engine_name}.{kind}": plain(*[f"{part}.{kind}" for part in parts], **options)
        for kind in ("weight", "bias")
    }


QKV = [f"self_attn.{part}_proj" for part in "qkv"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
EXPERT = ["{expert}.{gate}.weight", "{expert}.{up}.weight"]
STACKED = {
    "gate_up": plain(*EXPERT),
    "gate": plain("{expert}.{gate}.weight"),
    "up": plain("{expert}.{up}.weight"),
    "down": plain("{expert}.{down}.weight"),
}
HF = {
    **with_bias(f"{LAYER}.self_attn.qkv_proj", *QKV),
    **with_bias(f"{LAYER}.mlp.gate_up_proj", *GATE_UP),
    f"{LAYER}.mlp.gate.weight": plain("{router}.weight"),
    f"{LAYER}.mlp.experts.gate_up_proj": STACKED["gate_up"],
    f"{LAYER}.mlp.experts.down_proj": STACKED["down"],
}
VLLM = {
    **with_bias(f"{LAYER}.self_attn.qkv_proj", *QKV),
    **with_bias(f"{LAYER}.mlp.gate_up_proj", *GATE_UP),
    **{
        f"{LAYER}.{block}.experts.{inner}{stack}_weight": STACKED[part]
        for block in ("mlp", "block_sparse_moe")
        for inner in ("", "routed_experts.")  # vLLM 0.32 has a module of this name
        for stack, part in (("w13", "gate_up"), ("w2", "down"))
    },
}
DECODER = "decoder.layers.{i}"
MEGATRON = {
    "embedding.word_embeddings.weight": of_model("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": of_model("model.norm.weight"),
    "output_layer.weight": of_model("lm_head.weight"),
    f"{DECODER}.input_layernorm.weight": plain("input_layernorm.weight"),
    f"{DECODER}.self_attention.linear_qkv.layer_norm_weight": plain("input_layernorm.weight"),
    **with_bias(f"{DECODER}.self_attention.linear_qkv", *QKV, order=GROUPED),
    f"{DECODER}.self_attention.q_layernorm.weight": plain("self_attn.q_norm.weight"),
    f"{DECODER}.self_attention.k_layernorm.weight": plain("self_attn.k_norm.weight"),
    **with_bias(f"{DECODER}.self_attention.linear_proj", "self_attn.o_proj"),
    f"{DECODER}.self_attention.linear_proj.post_layernorm.weight": plain("post_attention_layernorm.weight"),
    f"{DECODER}.pre_mlp_layernorm.weight": plain("{mlp_norm}.weight"),
    f"{DECODER}.mlp.linear_fc1.layer_norm_weight": plain("{mlp_norm}.weight"),
    **with_bias(f"{DECODER}.mlp.linear_fc1", *GATE_UP),
    **with_bias(f"{DECODER}.mlp.linear_fc2", "mlp.down_proj"),
    f"{DECODER}.mlp.linear_fc2.post_layernorm.weight": plain("post_feedforward_layernorm.weight"),
    f"{DECODER}.mlp.router.weight": plain("{router}.weight"),
    f"{DECODER}.mlp.experts.linear_fc1.weight{{n}}": plain(*EXPERT),
    f"{DECODER}.mlp.experts.linear_fc2.weight{{n}}": plain("{expert}.{down}.weight"),
    f"{DECODER}.mlp.experts.local_experts.{{n}}.linear_fc1.weight": plain(*EXPERT),
    f"{DECODER}.mlp.experts.local_experts.{{n}}.linear_fc2.weight": plain("{expert}.{down}.weight"),
}
BLOCK = "blk.{i}"


def llama_cpp(config):
    """Return the table of GGUF files for a model.

    Query and key rows have the order that llama.cpp's RoPE needs. Gemma's norms are stored as 1 + w, and
    Phi-3's gate and up are one tensor, which is called up.
    """
    rope = INTERLEAVED if rotates_neighbors("llama.cpp", config) else HALF_SPLIT
    norm = {"offset": 1.0} if config.norm_plus_one else {}
    up = GATE_UP if config.joined_projections else ["mlp.up_proj"]
    return {
        "token_embd.weight": of_model("model.embed_tokens.weight"),
        "output_norm.weight": of_model("model.norm.weight", **norm),
        "output.weight": of_model("lm_head.weight"),
        f"{BLOCK}.attn_norm.weight": plain("input_layernorm.weight", **norm),
        **with_bias(f"{BLOCK}.attn_q", "self_attn.q_proj", rope=rope),
        **with_bias(f"{BLOCK}.attn_k", "self_attn.k_proj", rope=rope),
        **with_bias(f"{BLOCK}.attn_v", "self_attn.v_proj"),
        **with_bias(f"{BLOCK}.attn_qkv", *QKV, rope=rope),
        f"{BLOCK}.attn_q_norm.weight": plain("self_attn.q_norm.weight", **norm),
        f"{BLOCK}.attn_k_norm.weight": plain("self_attn.k_norm.weight", **norm),
        **with_bias(f"{BLOCK}.attn_output", "self_attn.o_proj"),
        f"{BLOCK}.post_attention_norm.weight": plain("post_attention_layernorm.weight", **norm),
        f"{BLOCK}.ffn_norm.weight": plain("{mlp_norm}.weight", **norm),
        **with_bias(f"{BLOCK}.ffn_gate", "mlp.gate_proj"),
        **with_bias(f"{BLOCK}.ffn_up", *up),
        **with_bias(f"{BLOCK}.ffn_down", "mlp.down_proj"),
        f"{BLOCK}.post_ffw_norm.weight": plain("post_feedforward_layernorm.weight", **norm),
        f"{BLOCK}.ffn_gate_inp.weight": plain("{router}.weight"),
        f"{BLOCK}.ffn_gate_exps.weight": STACKED["gate"],
        f"{BLOCK}.ffn_up_exps.weight": STACKED["up"],
        f"{BLOCK}.ffn_down_exps.weight": STACKED["down"],
    }


MLX = {
    f"{LAYER}.{block}.switch_mlp.{part}_proj.weight": STACKED[part]
    for block in ("mlp", "block_sparse_moe")
    for part in ("gate", "up", "down")
} | {name: HF[name] for name in HF if "_proj." in name}
ENGINES = ("hf", "llama.cpp", "megatron", "vllm", "mlx")
# Architectures of GGUF whose queries and keys are rotated in pairs of neighbors, by model_type.
NEIGHBORS = ("llama", "mistral", "mixtral", "granite", "smollm3")


def rotates_neighbors(engine, config):
    """Return whether an engine's queries and keys are in the interleaved layout."""
    return engine == "llama.cpp" and config.model_type in NEIGHBORS


def tensor_tables(config):
    """Return the table of each engine for a model: engine -> name -> EngineTensor with {i} and {n}.

    Parameters
    ----------
    config : Config
    """
    return {"hf": HF, "vllm": VLLM, "megatron": MEGATRON, "llama.cpp": llama_cpp(config), "mlx": MLX}


def checkpoint_names(config):
    """Return what the braces in the names of checkpoint tensors stand for in a model."""
    block = "mlp" if config.experts_in_mlp else "block_sparse_moe"
    matrices = ("gate_proj", "up_proj", "down_proj") if config.experts_in_mlp else ("w1", "w3", "w2")
    return {
        "router": f"{block}.gate",
        "expert": f"{block}.experts.{{n}}",
        "mlp_norm": "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm",
        **dict(zip(("gate", "up", "down"), matrices, strict=True)),
    }
