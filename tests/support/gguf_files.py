"""GGUF files for the tests, written with the gguf library as llama.cpp's converter writes them."""

import gguf
import numpy as np
from safetensors.numpy import load_file
from tiny import byte_tokens, write_tiny

from minitp.util.files import read_json

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL = 1, 3

# Rows of 256 and 512 suit the blocks of K quantizations; three ranks get 171, 171 and 170 of 512 columns.
SHAPES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)


def gguf_name(name):
    """Translate a name: `model.layers.0.self_attn.q_proj.weight` is `blk.0.attn_q.weight`."""
    part, kind = name.rsplit(".", 1)
    prefix = ""
    if part.startswith("model.layers."):
        layer, part = part.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{layer}."
    return f"{prefix}{NAMES[part]}.{kind}"


def interleaved(weight, heads):
    """Reorder the rows of q or k from halves to pairs of neighbors, head by head."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for pair in range(size // 2):
            out[head * size + 2 * pair] = weight[head * size + pair]
            out[head * size + 2 * pair + 1] = weight[head * size + size // 2 + pair]
    return out


def quantized(weight, kind, rng):
    """Return a quantized matrix's bytes; random bytes for K quantizations, which the library cannot write."""
    if kind not in ("Q4_K", "Q6_K"):
        return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    numbers, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (weight.size // numbers, nbytes), dtype=np.uint8)
    scale = {"Q4_K": slice(0, 4), "Q6_K": slice(208, 210)}[kind]  # d and dmin; d
    blocks[:, scale] = np.tile(np.array([1e-4], "<f2").view(np.uint8), (scale.stop - scale.start) // 2)
    return blocks.reshape(len(weight), -1)


def add_vocabulary(writer, tokens=None, types=None, merges=(), pre="gpt-2", model="gpt2", **more):
    """Add a tokenizer: by default the 256 bytes, no merges, <s> (256) and </s> (257)."""
    tokens = [*byte_tokens(), "<s>", "</s>"] if tokens is None else tokens
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [CONTROL if t in ("<s>", "</s>") else NORMAL for t in tokens] if types is None else types
    )
    if merges:  # an empty list cannot be written
        writer.add_token_merges(list(merges))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)


def write_gguf(path, kind="F32", edit=None, architecture="llama", vocabulary=None, **overrides):
    """Write a tiny model, and next to it, as path.stem, the Hugging Face directory from which it is made.

    Parameters
    ----------
    kind : str
        The type of the matrices.
    edit : callable, optional
        Called as edit(writer, tensors), to add metadata or change `tensors`, GGUF name -> (array, type).
    vocabulary : dict, optional
        Arguments for `add_vocabulary`.
    overrides
        Fields of config.json that differ from SHAPES.
    """
    directory = write_tiny(path.with_suffix(""), **{**SHAPES, **overrides})
    fields, rng = read_json(directory / "config.json"), np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    add_vocabulary(writer, **{"bos_token_id": 256, "eos_token_id": 257} | (vocabulary or {}))
    tensors = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f"{part}." in name:
                weight = interleaved(weight, fields[heads])
        tensors[gguf_name(name)] = (weight, kind if weight.ndim == 2 else "F32")
    if edit is not None:
        edit(writer, tensors)
    for name, (weight, tensor_kind) in tensors.items():
        data = weight if weight.ndim == 1 else quantized(weight, tensor_kind, rng)
        raw = None if data.dtype == np.float32 else gguf.GGMLQuantizationType[tensor_kind]
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
