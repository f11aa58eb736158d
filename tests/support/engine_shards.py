"""The shards of other engines, cut from a checkpoint by the rules of each engine, right or wrong.

They are written with NumPy alone, so that a mistake in minitp's plan would not be made again.
"""

import json
import re

import numpy as np
from safetensors.numpy import save_file
from tiny import CONFIG, UNEVEN, random_tensors

from minitp.compare.rank_folder import open_ranks
from minitp.lint.run import lint
from minitp.loading.source import open_model

QWEN_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 8}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
GEMMA = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 8}
MODELS = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4},
    "wide": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8},
    "uneven": UNEVEN,
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
    "mixtral": MIXTRAL | {"num_experts_per_tok": 2},
    "qwen3-moe": QWEN_MOE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "gemma2": GEMMA | {"hidden_activation": "gelu_pytorch_tanh"},
}
DENSE = ("llama", "wide", "uneven", "tied", "phi3")  # the models that `megatron` writes


class Model:
    """A tiny checkpoint in a new directory, with its tensors; joined ones are taken apart."""

    def __init__(self, directory, name, tensors=None):
        fields = {**CONFIG, "pad_token_id": None, **MODELS[name]}
        stored = random_tensors(fields, seed=3) if tensors is None else tensors
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(fields))
        save_file(stored, directory / "model.safetensors")
        self.source = open_model(str(directory), 1)
        self.config = self.source.config
        self.tensors = separate(stored, self.config)


def heads_of(config, tp, rank):
    """Return a rank's query heads and its KV heads, as lists."""
    group = config.num_attention_heads // config.num_key_value_heads
    heads = np.array_split(np.arange(config.num_attention_heads), tp)[rank].tolist()
    return heads, list(dict.fromkeys(head // group for head in heads))


def rows_of_heads(heads, d):
    """Return the rows of some heads."""
    return np.concatenate([np.arange(head * d, (head + 1) * d) for head in heads])


def cut(tensors, config, tp):
    """Return the tensors of each rank under the checkpoint's names."""
    d, ranks = config.head_dim, []
    for rank in range(tp):
        heads, kv_heads = heads_of(config, tp, rank)
        columns = np.array_split(np.arange(config.intermediate_size), tp)[rank]
        tokens = np.array_split(np.arange(config.vocab_size), tp)[rank]
        held = {}
        for name, x in tensors.items():
            if re.search(r"(embed_tokens|lm_head)\.weight$", name):
                x = x[tokens]
            elif re.search(r"q_proj\.(weight|bias)$", name):
                x = x[rows_of_heads(heads, d)]
            elif re.search(r"[kv]_proj\.(weight|bias)$", name):
                x = x[rows_of_heads(kv_heads, d)]
            elif name.endswith("o_proj.weight"):
                x = x[:, rows_of_heads(heads, d)]
            elif re.search(r"(gate_proj|up_proj|\.w1|\.w3)\.(weight|bias)$", name):
                x = x[columns]
            elif re.search(r"(down_proj|\.w2)\.weight$", name):
                x = x[:, columns]
            held[name] = x.copy()
        ranks.append(held)
    return ranks


def separate(tensors, config):
    """Return the tensors with joined ones, such as Phi-3's, taken apart."""
    q, k = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    found = {}
    for name, x in tensors.items():
        if ".qkv_proj." in name:
            for letter, part in zip("qkv", np.split(x, [q, q + k]), strict=True):
                found[name.replace("qkv_proj", f"{letter}_proj")] = part
        elif ".gate_up_proj." in name:
            for word, part in zip(("gate", "up"), np.split(x, 2), strict=True):
                found[name.replace("gate_up_proj", f"{word}_proj")] = part
        else:
            found[name] = x
    return found


def grouped(q, k, v, queries):
    """Join rows by KV head: its query heads, its key head, its value head; `queries` has the counts."""
    d, parts, start = len(k) // len(queries), [], 0
    for number, count in enumerate(queries):
        head = slice(number * d, (number + 1) * d)
        parts += [q[start : start + count * d], k[head], v[head]]
        start += count * d
    return np.concatenate(parts)


def vllm(ranks):
    """Return the ranks' tensors with vLLM's names: q, k, v and gate, up joined, experts stacked."""
    found = []
    for held in ranks:
        new = {}
        for name, x in held.items():
            if ".q_proj." in name:
                parts = [held[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                new[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts)
            elif ".experts." not in name and ".gate_proj." in name:
                up = held[name.replace("gate_proj", "up_proj")]
                new[name.replace("gate_proj", "gate_up_proj")] = np.concatenate((x, up))
            elif not re.search(r"[kv]_proj|up_proj|\.experts\.", name):
                new[name] = x
        new |= stacked(held)
        found.append(new)
    return found


def stacked(held):
    """Return the experts of each layer as two stacks, w13 [E, 2F, D] and w2 [E, D, F]."""
    new, down = {}, re.compile(r"(.*\.experts)\.(\d+)\.(w2|down_proj)\.weight$")
    for name in held:
        found = down.match(name)
        if found and f"{found[1]}.w2_weight" not in new:
            first, third = ("w1", "w3") if found[3] == "w2" else ("gate_proj", "up_proj")
            numbers = sorted(int(m[2]) for m in map(down.match, held) if m and m[1] == found[1])
            both = [
                np.concatenate([held[f"{found[1]}.{n}.{part}.weight"] for part in (first, third)])
                for n in numbers
            ]
            new[f"{found[1]}.w13_weight"] = np.stack(both)
            new[f"{found[1]}.w2_weight"] = np.stack(
                [held[f"{found[1]}.{n}.{found[3]}.weight"] for n in numbers]
            )
    return new


def megatron(ranks, config):
    """Return the ranks' tensors with the names of Megatron Core: q, k, v grouped by KV head."""
    found, tp = [], len(ranks)
    names = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    for rank, held in enumerate(ranks):
        heads, kv_heads = heads_of(config, tp, rank)
        group = config.num_attention_heads // config.num_key_value_heads
        queries = [sum(head // group == kv for head in heads) for kv in kv_heads]
        new = {}
        for name, x in held.items():
            layer = name.replace("model.layers", "decoder.layers")
            if name in names:
                new[names[name]] = x
            elif name.endswith("input_layernorm.weight"):
                new[layer.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")] = x
            elif name.endswith("post_attention_layernorm.weight"):
                new[layer.replace("post_attention_layernorm.", "mlp.linear_fc1.layer_norm_")] = x
            elif ".q_proj." in name:
                parts = [held[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                new[layer.replace("self_attn.q_proj", "self_attention.linear_qkv")] = grouped(*parts, queries)
            elif ".o_proj." in name:
                new[layer.replace("self_attn.o_proj", "self_attention.linear_proj")] = x
            elif ".gate_proj." in name:
                both = np.concatenate((x, held[name.replace("gate_proj", "up_proj")]))
                new[layer.replace("gate_proj", "linear_fc1")] = both
            elif ".down_proj." in name:
                new[layer.replace("down_proj", "linear_fc2")] = x
        found.append({f"module.{name}": x for name, x in new.items()})
    return found


def of_engine(engine, model, tp):
    """Return the ranks' tensors as an engine has them."""
    ranks = cut(model.tensors, model.config, tp)
    if engine == "megatron":
        return megatron(ranks, model.config)
    return vllm(ranks) if engine == "vllm" else ranks


def write(directory, ranks, file="rank{}.safetensors"):
    """Write each rank's tensors into a file of `directory` and return the directory."""
    for rank, held in enumerate(ranks):
        path = directory / file.format(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.asarray(x, order="C") for name, x in held.items()}
        np.savez(path, **arrays) if path.suffix == ".npz" else save_file(arrays, path)
    return directory


def linted(model, ranks, folder, file="rank{}.safetensors", **options):
    """Write the ranks' tensors into `folder` and return the result of lint."""
    return lint(open_ranks(write(folder / "shards", ranks, file)), model.source, **options)
