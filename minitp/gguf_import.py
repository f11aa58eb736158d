"""A GGUF file of the llama architecture, written out as a Hugging Face directory in float16."""

import json
import re

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minitp.errors import InputError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type


def convert(path, directory):
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json into `directory`.

    Raises
    ------
    InputError
        if the file is of another architecture, or its tokenizer of another kind than byte-level BPE.
    """
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise InputError(f"{path}: architecture {meta['general.architecture']!r}, expected 'llama'")
    config = make_config(meta)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = hugging_face_name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = unpermute(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            values = unpermute(values, config["num_key_value_heads"])
        tensors[name] = np.ascontiguousarray(values, dtype=np.float16)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    save_file(tensors, directory / "model.safetensors")
    write_json(directory / "config.json", config)
    make_tokenizer(meta, path).save(str(directory / "tokenizer.json"))
    tokens = meta["tokenizer.ggml.tokens"]
    write_json(
        directory / "tokenizer_config.json",
        {
            "chat_template": meta.get("tokenizer.chat_template"),
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
        },
    )


def make_config(meta):
    """config.json from a GGUF file's metadata."""
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 10),  # stored in float32
        "rope_theta": meta["llama.rope.freq_base"],
        "max_position_embeddings": meta["llama.context_length"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "dtype": "float16",
    }


def hugging_face_name(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer, part, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name).groups()
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{NAMES[part]}.{kind}"


def unpermute(values, heads):
    """Rows of q or k [H * d, D] from GGUF's RoPE pairs (2i, 2i + 1) to the halves (i, i + d/2)."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)  # [H, d/2, 2, D]
    return pairs.swapaxes(1, 2).reshape(rows, columns)  # [H * d, D]


def make_tokenizer(meta, path):
    """Byte-level BPE from a GGUF file's metadata, as the `tokenizers` library has it."""
    kind = (meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise InputError(f"{path}: tokenizer {kind} is not supported, expected ('gpt2', 'smollm')")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, type_ in types if type_ == CONTROL_TOKEN]
    )
    return tokenizer


def write_json(path, value):
    """One JSON object, readable."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
