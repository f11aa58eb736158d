"""Make tests/goldens: tiny random checkpoints, and what Hugging Face transformers computes from them.

    pip install torch==2.13.0 transformers==5.23.0      (CPU; the versions of the committed data)
    python tests/make_goldens.py [NAME ..]

The same versions write the same bytes. Each goldens/NAME is a Hugging Face directory with a golden.npz:

    prompt        int64 [T]       token ids; T is 24, or the length of prompt_text
    logits        float32 [T, V]  of the prompt, computed in float32 from the stored weights, eager attention
    continuation  int64 [20]      greedy tokens, end-of-text ignored, each computed from the whole sequence
    gap           the smallest distance between the two largest logits of a new token, in standard deviations
                  of its logits
    prompt_text, text             the prompt and the continuation as text, for the model with a tokenizer

Weights are redrawn until no greedy choice is near a tie, so a correct implementation must continue with the
same tokens. Everything is random, norm weights and biases too, so that leaving one out changes the results.
Queries and keys are large enough for attention to prefer some positions over others.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_TOKENS, NEW_TOKENS = 24, 20
MIN_GAP = 0.05  # standard deviations; float32 rounding moves a logit by less than 1e-5 of one
SEEDS = 20000  # maximum number of seeds to try
MIN_DISTINCT = 10  # different tokens in a continuation, because repetition hides errors
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # plain operations

LLAMA = {
    "model_type": "llama",
    "vocab_size": 101,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MISTRAL = {**LLAMA, "model_type": "mistral"}
QWEN2 = {**LLAMA, "model_type": "qwen2", "rms_norm_eps": 1e-6}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "tie_word_embeddings": True}
del GEMMA2["hidden_act"]  # hidden_activation defaults to gelu_pytorch_tanh
MIXTRAL = {**LLAMA, "model_type": "mixtral"}
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0}
QWEN3 = {**QWEN2, "model_type": "qwen3"}
SMOLLM3 = {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 3, "pad_token_id": 0}
GRANITE = {**LLAMA, "model_type": "granite"}
QWEN3_MOE = {**QWEN2, "model_type": "qwen3_moe", "intermediate_size": 64}  # of layers without experts
GEMMA3 = {**GEMMA2, "model_type": "gemma3_text", "tie_word_embeddings": False}

# NAME -> the fields of config.json, and options. With "by_hand", config.json is written as it stands below,
# in the older spelling; otherwise transformers writes it.
VARIANTS = {
    "llama1": {  # multi-head attention, float16, no rope_theta at all
        "by_hand": True,
        "config": LLAMA
        | {"hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 3, "rms_norm_eps": 1e-6}
        | {"torch_dtype": "float16"},
    },
    "llama2": {  # grouped heads, several files
        "max_shard_size": "40KB",
        "config": LLAMA
        | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
        | {"vocab_size": 96, "intermediate_size": 64},
    },
    "llama-bias": {
        "config": LLAMA
        | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
        | {"attention_bias": True, "mlp_bias": True},
    },
    "llama3": {
        "config": LLAMA
        | {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    },
    "llama-linear": {
        "by_hand": True,
        "config": LLAMA
        | {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
        | {"torch_dtype": "float32"},
    },
    "tinyllama": {  # bfloat16
        "config": LLAMA
        | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "dtype": "bfloat16"},
    },
    "smollm2": {  # three query heads per KV head, tied embeddings
        "config": LLAMA
        | {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    },
    "mistral-v01": {  # a sliding window shorter than the prompt
        "by_hand": True,
        "config": MISTRAL
        | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 7}
        | {"rope_theta": 10000.0, "torch_dtype": "float32"},
    },
    "mistral-v02": {  # one KV head
        "config": MISTRAL
        | {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": None}
        | {"vocab_size": 128, "intermediate_size": 48}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    },
    "mistral-v03": {  # all heads together are wider than the hidden size
        "config": MISTRAL
        | {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
        | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    },
    "qwen2": {  # tied embeddings; all layers have full attention, regardless of sliding_window
        "by_hand": True,
        "config": QWEN2
        | {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}
        | {"torch_dtype": "bfloat16"},
    },
    "qwen2-window": {  # only the second layer has a window
        "config": QWEN2
        | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    },
    "qwen3": {  # QK norm, heads wider than hidden_size / num_attention_heads
        "config": QWEN3
        | {"hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}
        | {"tie_word_embeddings": True, "dtype": "bfloat16"},
    },
    "qwen3-bias": {  # biases, also of the output projection, and a window in the first layer
        "config": QWEN3
        | {"hidden_size": 32, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6}
        | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    },
    "qwen3-yarn": {  # a context longer than the original one
        "config": QWEN3
        | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    },
    "mistral-nemo": {  # all heads together are narrower than the hidden size
        "config": MISTRAL
        | {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
        | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    },
    "phi3": {  # joined tensors, a window, several files
        "max_shard_size": "30KB",
        "config": PHI3
        | {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "sliding_window": 9},
    },
    "phi3-longrope": {
        "by_hand": True,
        "config": PHI3
        | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "torch_dtype": "bfloat16"}
        | {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
        | {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.25, 1.5, 3.0],
                "long_factor": [2.0, 4.0, 8.0, 16.0],
            }
        },
    },
    "phi3-partial": {  # RoPE over 6 of each head's 8 dimensions, as in Phi-4-mini
        "by_hand": True,
        "config": PHI3
        | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "torch_dtype": "bfloat16"}
        | {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75, "sliding_window": 11}
        | {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.25, 2.0],
                "long_factor": [2.0, 4.0, 8.0],
            }
        },
    },
    "phi3-half": {  # the newer spelling, and another type of RoPE
        "config": PHI3
        | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "dtype": "bfloat16"}
        | {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    },
    "mixtral": {  # two of five experts
        "config": MIXTRAL
        | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 21}
        | {"num_local_experts": 5, "dtype": "bfloat16"},
    },
    "mixtral-window": {  # three of four experts, and no rope_theta
        "by_hand": True,
        "config": MIXTRAL
        | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 10}
        | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6},
    },
    "gemma2": {  # caps small enough to change the results, a window in the first and third layer
        "config": GEMMA2
        | {"hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
        | {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 7}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "dtype": "bfloat16"},
    },
    "gemma2-uncapped": {
        "config": GEMMA2
        | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "attention_bias": True}
        | {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 9}
        | {"layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": False}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "smollm3": {  # the second layer has no RoPE
        "config": SMOLLM3
        | {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "no_rope_layers": [1, 0, 1]}
        | {"attention_bias": True, "dtype": "bfloat16"},
    },
    "smollm3-window": {  # by the interval, only the second layer has no RoPE, but a window; tied by default
        "by_hand": True,
        "config": {name: value for name, value in SMOLLM3.items() if name != "tie_word_embeddings"}
        | {"hidden_size": 48, "num_attention_heads": 8, "no_rope_layer_interval": 2, "mlp_bias": True}
        | {"use_sliding_window": True, "sliding_window": 7, "torch_dtype": "float16"},
    },
    "granite": {  # the published multipliers, except attention_multiplier
        "config": GRANITE
        | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}
        | {"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "residual_multiplier": 0.22}
        | {"logits_scaling": 8.0, "dtype": "bfloat16"},
    },
    "granite-bias": {  # no attention_multiplier, which defaults to 1
        "by_hand": True,
        "config": GRANITE
        | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        | {"embedding_multiplier": 0.3, "residual_multiplier": 1.7, "logits_scaling": 3}
        | {"rope_theta": 500000.0, "torch_dtype": "float32"},
    },
    "qwen3-moe": {  # three of five experts; their weights do not add up to 1
        "config": QWEN3_MOE
        | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
        | {"moe_intermediate_size": 13, "num_experts": 5, "num_experts_per_tok": 3}
        | {"norm_topk_prob": False, "dtype": "bfloat16"},
    },
    "qwen3-moe-window": {  # as it is published, but with a window, in all layers; two of four experts
        "by_hand": True,
        "config": QWEN3_MOE
        | {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "attention_bias": True}
        | {"moe_intermediate_size": 10, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1000.0}
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    },
    "gemma3": {  # a RoPE for the window of the first and third layer, a scaled one for the second
        "config": GEMMA3
        | {"hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
        | {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 7, "sliding_window_pattern": 2}
        | {"dtype": "bfloat16", "final_logit_softcapping": 20.0}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            }
        },
    },
    "gemma3-older": {  # the older spelling; only the third layer has no window
        "by_hand": True,
        "config": {name: value for name, value in GEMMA3.items() if name != "tie_word_embeddings"}
        | {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 3}
        | {"head_dim": 6, "query_pre_attn_scalar": 24, "intermediate_size": 11, "sliding_window": 5}
        | {"sliding_window_pattern": 3}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "attention_bias": True}
        | {"torch_dtype": "float16"},
    },
    "text": {  # a tokenizer; bfloat16; a padded vocabulary; end-of-text in the middle of the continuation
        "prompt": "The cat and the dog: 12 of them, and 30 more in the house",
        "config": LLAMA
        | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "dtype": "bfloat16"}
        | {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0},
    },
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [" the", " and", " of", " in", " to", " is", " that", " house", " water", "The", "ing", "er", "on"]


def make(name, variant):
    """Find weights for one variant, write its directory, and compute golden.npz from the written files."""
    fields = dict(variant["config"])
    dtype = getattr(torch, fields.get("dtype") or fields.get("torch_dtype") or "float32")
    model_type = fields.pop("model_type")
    config = AutoConfig.for_model(model_type, **fields)
    check_config(name, config, fields)
    model = AutoModelForCausalLM.from_config(config, **EAGER, dtype=torch.float32).eval()
    tokenizer = bpe_tokenizer() if "prompt" in variant else None
    seed = next((seed for seed in range(SEEDS) if suits(model, seed, dtype, variant, tokenizer)), None)
    if seed is None:
        sys.exit(
            f"{name}: none of {SEEDS} seeds gives {MIN_DISTINCT} different tokens without a tie; "
            "untie the embeddings, or change what makes the model repeat itself"
        )

    directory = GOLDENS / name
    shutil.rmtree(directory, ignore_errors=True)
    model.to(dtype).save_pretrained(directory, max_shard_size=variant.get("max_shard_size", "50GB"))
    (directory / "generation_config.json").unlink()
    if variant.get("by_hand"):
        architectures = json.loads((directory / "config.json").read_text())["architectures"]
        by_hand = {"architectures": architectures, "model_type": model_type, **fields}
        (directory / "config.json").write_text(json.dumps(by_hand, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))

    golden = golden_of(directory, seed, variant, tokenizer)
    assert golden["gap"] > MIN_GAP
    np.savez(directory / "golden.npz", **golden)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{name:14} seed {seed:5}  gap {golden['gap']:.3f}  {size / 1e3:6.1f} KB", flush=True)


def check_config(name, config, fields):
    """Check that transformers understands a config as the variant intends."""
    rope = config.rope_parameters
    scaling = {**(fields.get("rope_scaling") or fields.get("rope_parameters") or {})}
    theta = config.default_theta
    if config.model_type == "gemma3_text":  # one RoPE for the layers with a window, one for the others
        local, rope, theta = rope["sliding_attention"], rope["full_attention"], theta["global"]
        assert local == scaling.get("sliding_attention", {"rope_type": "default", "rope_theta": 10000.0})
        scaling = scaling.get("full_attention", scaling)
    assert rope["rope_type"] == scaling.get("rope_type", scaling.get("type", "default"))
    assert rope["rope_theta"] == scaling.get("rope_theta", fields.get("rope_theta", theta))
    window = None if fields.get("use_sliding_window") is False else fields.get("sliding_window")
    assert getattr(config, "sliding_window", None) == window
    if name == "mistral-v01":
        assert config.sliding_window < PROMPT_TOKENS
    if name == "llama3":  # wavelengths in all three bands of the formula
        pairs = range(config.head_dim // 2)
        frequencies = [rope["rope_theta"] ** (-2 * i / config.head_dim) for i in pairs]
        turns = [rope["original_max_position_embeddings"] * f / (2 * math.pi) for f in frequencies]
        assert max(turns) > rope["high_freq_factor"]
        assert min(turns) < rope["low_freq_factor"]
        assert any(rope["low_freq_factor"] < n < rope["high_freq_factor"] for n in turns)


def suits(model, seed, dtype, variant, tokenizer):
    """Set the model's weights by `seed`; return whether the continuation is fit for the tests."""
    set_weights(model, seed, dtype, tokenizer)
    prompt = prompt_ids(seed, model.config.vocab_size, variant, tokenizer)
    continuation, gap = greedy(model, prompt, stop_below=MIN_GAP)
    if gap <= MIN_GAP or len(set(continuation)) < MIN_DISTINCT:
        return False
    if tokenizer is None:
        return True
    eos = model.config.eos_token_id
    eos_in_middle = eos in continuation[8:15] and eos not in continuation[:8]
    return eos_in_middle and tokenizer.decode(continuation).isprintable()


def set_weights(model, seed, dtype, tokenizer):
    """Draw random weights, rounded to the dtype in which they will be stored."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(tuple(parameter.shape))
        if name.endswith("norm.weight"):
            values = 1 + values / 4
        elif name.endswith("bias"):
            values /= 2
        elif name.startswith(("model.embed_tokens", "lm_head")):
            if model.config.tie_word_embeddings:  # otherwise every token predicts itself
                values /= 8
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv_proj"))
            values *= (2.0 if sharp else 1.0) / values.shape[-1] ** 0.5
        if name.startswith("lm_head") and tokenizer is not None:  # make unreadable tokens improbable
            for token in range(len(values)):
                text = tokenizer.decode([token])
                readable = text and text.isascii() and text.isprintable()
                if not readable and token != model.config.eos_token_id:
                    values[token] /= 4
        parameter.data = torch.tensor(values, dtype=torch.float32).to(dtype).to(torch.float32)
    model.tie_weights()


def prompt_ids(seed, vocab_size, variant, tokenizer):
    """Return random tokens, or those of the variant's text."""
    if tokenizer is None:
        return np.random.default_rng([seed, 1]).integers(0, vocab_size, PROMPT_TOKENS).tolist()
    ids = tokenizer.encode(variant["prompt"]).ids
    assert tokenizer.decode(ids) == variant["prompt"]
    return ids


@torch.no_grad()
def logits_of(model, ids):
    """Return the logits of all positions, float32 [T, V]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def greedy(model, prompt, stop_below=0.0):
    """Return NEW_TOKENS greedy tokens, end-of-text ignored, and their smallest gap (see the module)."""
    ids, smallest = list(prompt), math.inf
    while len(ids) < len(prompt) + NEW_TOKENS:
        last = logits_of(model, ids)[-1]  # [V]
        second, first = np.sort(last)[-2:]
        smallest = min(smallest, float((first - second) / last.std()))
        if smallest <= stop_below:
            break
        ids.append(int(last.argmax()))
    return ids[len(prompt) :], smallest


def golden_of(directory, seed, variant, tokenizer):
    """Return the contents of golden.npz, computed from the files of `directory` alone."""
    model, faults = AutoModelForCausalLM.from_pretrained(
        directory, **EAGER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(faults.values()), faults  # missing, unexpected or mismatched keys
    model.eval()
    assert model.config._attn_implementation == "eager"
    prompt = prompt_ids(seed, model.config.vocab_size, variant, tokenizer)
    continuation, gap = greedy(model, prompt)
    golden = {"prompt": np.array(prompt), "logits": logits_of(model, prompt)}
    golden |= {"continuation": np.array(continuation), "gap": np.array(gap)}
    assert golden["logits"].dtype == np.float32
    if tokenizer is not None:
        golden |= {"prompt_text": np.array(variant["prompt"])}
        golden |= {"text": np.array(tokenizer.decode(continuation))}
    return golden


def bpe_tokenizer():
    """Return a byte-level BPE with three special tokens, the 256 bytes, and merges that spell WORDS."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in WORDS:
        letters = word.replace(" ", "\u0120")
        for i in range(1, len(letters)):
            merge = (letters[:i], letters[i])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for name in sys.argv[1:] or VARIANTS:
        make(name, VARIANTS[name])
