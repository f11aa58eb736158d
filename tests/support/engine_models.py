"""The models with which other engines are recorded: Hugging Face directories, and GGUF files of them.

Heads of 32 dimensions suit vLLM on a CPU, and rows of 64 numbers suit the blocks of Q8_0.
"""

import re

import gguf
import numpy as np
from gguf_files import interleaved
from safetensors.numpy import load_file
from tiny import write_tiny

from minitp.util.files import read_json

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False},
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "hidden_size": 128,  # mlx-lm's heads have hidden_size / heads dimensions
        "tie_word_embeddings": False,
    },
}
PROMPT, NEXT = [3, 50, 7, 22], 17  # the tokens of the recordings
EXPERT = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight")


def write_engine_model(directory, family):
    """Write the Hugging Face directory of a family, without a tokenizer, and return its Path."""
    return write_tiny(directory / family, tokenizer=False, **SIZES | FAMILIES[family])


def write_engine_gguf(path, directory, kind="F32"):
    """Write a model of FAMILIES as a GGUF file whose matrices have a type such as F16, and return its path.

    The names, the order of the rows and the metadata are those of llama.cpp's convert_hf_to_gguf.py.
    """
    fields = read_json(directory / "config.json")
    architecture = "qwen3" if fields["model_type"] == "qwen3" else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_rope_dimension_count(fields["head_dim"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_vocab_size(fields["vocab_size"])
    if "num_local_experts" in fields:
        writer.add_expert_count(fields["num_local_experts"])
        writer.add_expert_used_count(fields["num_experts_per_tok"])
    writer.add_tokenizer_model("none")
    for name, weight in gguf_tensors(
        load_file(directory / "model.safetensors"), fields, architecture
    ).items():
        is_matrix = weight.ndim > 1 and "gate_inp" not in name  # the router stays in float32
        quantization = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        data = gguf.quants.quantize(weight, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(tensors, fields, architecture):
    """Return the tensors under their names in a GGUF file, experts stacked, q and k in its order."""
    layers = fields["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    stacked, found = {}, {}
    for name, weight in tensors.items():
        expert = EXPERT.fullmatch(name)
        if expert:
            key = f"{expert[1]}block_sparse_moe.experts.{expert[3]}.weight"
            stacked.setdefault(key, {})[int(expert[2])] = weight
            continue
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and f"{part}." in name:
                weight = interleaved(weight, fields[heads])
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weight
    for name, experts in stacked.items():
        whole = np.stack([experts[number] for number in sorted(experts)])  # [E, out, in]
        found[names.get_name(name, try_suffixes=(".weight",))] = whole
    return found
