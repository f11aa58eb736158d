"""The tiny models of the tests: Hugging Face directories with random weights and a byte tokenizer."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from minitp.loading.config import parse_config
from minitp.shard import make_plan

BOS, EOS = 256, 257  # token ids; the lower ids are the bytes, in the order of byte_tokens()
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
# Sizes that do not divide evenly: 9 query heads on 3 KV heads, 37 FFN columns, 101 tokens; H * d is not D.
UNEVEN = {"vocab_size": 101, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2}
UNEVEN |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 6, "max_position_embeddings": 64}


def write_tiny(directory, tokenizer=True, bos=False, seed=0, **config_overrides):
    """Write a model into `directory` (created if needed) and return its Path.

    Parameters
    ----------
    tokenizer : bool
        Whether to write a tokenizer.json, with a token for each byte, <s> and </s>.
    bos : bool
        Whether the tokenizer adds <s> before a text.
    seed : int
        The seed of the weights.
    config_overrides
        Fields of config.json that differ from CONFIG.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fields = {**CONFIG, **config_overrides}
    (directory / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    save_file(random_tensors(fields, seed), directory / "model.safetensors")
    if tokenizer:
        byte_tokenizer(bos).save(str(directory / "tokenizer.json"))
    return directory


def random_tensors(fields, seed=0):
    """Return all tensors of a config.json's `fields`: float32, scaled so that activations stay near one."""
    rng = np.random.default_rng(seed)
    plan = make_plan(parse_config(fields, "tiny"), tp=1)
    tensors = {}
    for name, shard in plan.tensors.items():
        values = rng.standard_normal(shard.shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1 + values / 10
        elif not name.startswith(("model.embed_tokens", "lm_head")):
            values /= np.float32(shard.shape[-1] ** 0.5)
        tensors.setdefault(shard.part_of or name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in tensors.items()}


def byte_tokens():
    """Return the 256 characters with which byte-level BPE writes bytes; their indices are the token ids."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(bos=False):
    """Return a byte-level BPE without merges, so each byte of a text is one token."""
    vocabulary = {token: i for i, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer
