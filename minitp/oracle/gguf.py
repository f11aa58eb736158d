"""The tensors of a GGUF file for the oracle; this module imports nothing else from this package.

It differs from `loading.gguf` on purpose: the `gguf` library reads the header and whole tensors, where
`loading.gguf` reads the header itself and only the blocks that a rank needs; and the rows of q and k are
reordered by reshaping, not with an index.
"""

import glob
import re
from pathlib import Path

import gguf

# Hugging Face's names of modules -> llama.cpp's names
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_tensor(path):
    """Return the `tensor` argument of Oracle for a GGUF file of the llama architecture.

    Returns
    -------
    callable
        A function tensor(name, index=...) that returns a tensor by its Hugging Face name, or a part of it, in
        float32 or float16.
    """
    readers = [gguf.GGUFReader(part) for part in parts(Path(path))]
    reader, tensors = readers[0], {tensor.name: tensor for each in readers for tensor in each.tensors}
    heads = reader.get_field("llama.attention.head_count").contents()
    kv_heads = reader.get_field("llama.attention.head_count_kv")
    kv_heads = heads if kv_heads is None else kv_heads.contents()

    def tensor(name, index=...):
        found = tensors[gguf_name(name)]
        whole = gguf.quants.dequantize(found.data, found.tensor_type)  # [out, in] or [n]
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if f".{part}." in name:
                pairs = whole.reshape(
                    count, -1, 2, *whole.shape[1:]
                )  # [H, d/2, 2, in]: neighboring rows are a pair
                whole = pairs.swapaxes(1, 2).reshape(
                    whole.shape
                )  # [H * d, in]: row i and row i + d/2 of a head are a pair
        return whole[index]

    return tensor


def parts(path):
    """Return the paths of all parts of a model in order; `path` is the first or the only one."""
    beginning = re.fullmatch(r"(.*-)00001(-of-\d{5}\.gguf)", path.name)
    if beginning is None:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(beginning[1])}?????{beginning[2]}"))


def gguf_name(name):
    """Return llama.cpp's name of a tensor, such as `blk.3.attn_q.weight` for layer 3's q_proj.weight."""
    part, kind = name.rsplit(".", 1)
    if part in OUTSIDE:
        return f"{OUTSIDE[part]}.{kind}"
    _, _, layer, *rest = part.split(".")
    return f"blk.{layer}.{(ATTENTION | MLP | NORMS)[rest[-1]]}.{kind}"
