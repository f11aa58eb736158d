"""The fields of a config.json, made from a GGUF file's metadata."""

import numpy as np

from minitp.errors import InputError
from minitp.util.format import counted

ARCHITECTURE = "llama"  # also of Mistral models, which llama.cpp converts to this architecture

ROPE_FACTORS = "rope_freqs.weight"
ENDS = ("eos", "eot", "eom")  # the tokens that end a text, tokenizer.ggml.{}_token_id

# The values of all Llama 3 models so far; `llama3_scaling` checks that the file's factors follow from them.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def make_fields(file):
    """Return a GGUF file's config.json fields; unknown `llama.*` entries are kept, to be reported."""
    where, metadata = file.path, dict(file.metadata)
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(
            f"{where}: architecture {architecture!r} is not supported in GGUF files; only 'llama' is; "
            "use a Hugging Face directory"
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{where}: tensor token_embd.weight is missing; the file may hold only a vocabulary")

    def take(name, default=None):
        return plain(metadata.pop(f"llama.{name}", default))

    for name in ("expert_count", "expert_used_count"):
        if take(name):
            raise InputError(
                f"{where}: a mixture of experts (llama.{name}) is not supported in GGUF files; "
                "use a Hugging Face directory"
            )
    heads, hidden = take("attention.head_count"), take("embedding_length")
    if not isinstance(heads, int) or heads < 1 or not isinstance(hidden, int):
        raise InputError(
            f"{where}: llama.attention.head_count is {heads!r} and llama.embedding_length {hidden!r}, "
            "expected positive integers"
        )
    layers = take("block_count")
    found_layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if layers != len(found_layers):
        raise InputError(
            f"{where}: llama.block_count is {layers!r}, but the file has tensors of "
            f"{counted(len(found_layers), 'layer')}"
        )
    head_dim = take("attention.key_length", hidden // heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        value = take(name, head_dim)
        if value != head_dim:
            raise InputError(f"{where}: llama.{name} is {value!r}, expected the head size, {head_dim}")
    take("vocab_size")  # not needed, because it follows from the shape of the embedding
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon"),
        "rope_theta": take("rope.freq_base", 10000.0),
        "max_position_embeddings": take("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends(metadata),
        "dtype": dtype(file),
    }
    fields["rope_scaling"] = rope_scaling(file, fields, take)
    return fields | {name: value for name, value in metadata.items() if name.startswith("llama.")}


def plain(value):
    """Return a float32 as the shortest decimal that rounds to it, such as 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def ends(metadata):
    """Return the ids of all tokens that end a text, without duplicates."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    return list(dict.fromkeys(number for number in ids if number is not None))


def dtype(file):
    """Return the dtype to compute in on GPUs: that of the file, or float16 if the file is quantized."""
    first = file.tensors.get("blk.0.attn_q.weight", file.tensors["token_embd.weight"])
    return {"F32": "float32", "BF16": "bfloat16"}.get(first.type.name, "float16")


def rope_scaling(file, fields, take):
    """Return config.json's rope_scaling, or None; `take(name)` pops an entry of the metadata."""
    kind, factor = take("rope.scaling.type", "none"), take("rope.scaling.factor")
    older, original = take("rope.scale_linear"), take("rope.scaling.original_context_length")
    take("rope.scaling.finetuned")
    if older not in (None, 1.0) and kind == "none":
        kind, factor = "linear", older
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise InputError(
                f"{file.path}: llama.rope.scaling.type is {kind!r}, expected 'none' in a file with "
                f"{ROPE_FACTORS}"
            )
        return llama3_scaling(file, fields, original or ORIGINAL_CONTEXT)
    if kind == "none":
        return None
    if kind != "linear":
        raise InputError(
            f"{file.path}: llama.rope.scaling.type {kind!r} is not supported in GGUF files; "
            f"supported: none, linear, and Llama 3's ({ROPE_FACTORS})"
        )
    return {"rope_type": "linear", "factor": factor}


def llama3_scaling(file, fields, original):
    """Return the llama3 parameters that yield the file's factors, or raise an InputError if none do.

    A pair's angle is divided by its factor: 1 for short wavelengths, `factor` for long ones, and in between
    the interpolation of `rope.rope_inverse_frequencies`.
    """
    count = fields["head_dim"] // 2
    if file.tensors[ROPE_FACTORS].shape != (count,):
        shape = list(file.tensors[ROPE_FACTORS].shape)
        raise InputError(f"{file.path}: tensor {ROPE_FACTORS} has shape {shape}, expected [{count}]")
    factors = file.read(ROPE_FACTORS, slice(0, 1), slice(0, count))[0].astype(np.float64)  # [d/2]
    factor = plain(float(factors.max()))
    frequencies = fields["rope_theta"] ** (-np.arange(count) / count)  # [d/2]
    turns = original * frequencies / (2 * np.pi)  # [d/2] over the original context
    smooth = np.clip((turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR), 0, 1)  # [d/2]
    expected = 1 / ((1 - smooth) / factor + smooth)  # [d/2]
    if not np.allclose(factors, expected, rtol=1e-4):  # the file stores float32
        raise InputError(
            f"{file.path}: the values of {ROPE_FACTORS} are not Llama 3's for factor {factor}, "
            f"low_freq_factor {LOW_FREQ_FACTOR}, high_freq_factor {HIGH_FREQ_FACTOR} and an original context "
            f"of {original}; no other scaling is supported in GGUF files"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": original,
    }
