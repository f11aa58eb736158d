"""The dumps of other engines, made from the arrays of four ranks of minitp."""

import numpy as np
from dump_files import write
from safetensors import safe_open
from tiny import UNEVEN

TP, D = 4, UNEVEN["head_dim"]
PROMPT = [100, 3, 40, 60, 80, 15, 25]
DENSE = {"attention_bias": True, "mlp_bias": True}
MIXTURE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 3}
MIXTURE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": True}
PARTS = [f"self_attn.{part}_proj" for part in "qkv"]
PASSES = ("prefill", "decode.1")


class Reference:
    """A trace of four ranks, with the whole arrays and those of each rank."""

    def __init__(self, path, plan):
        self.path, self.plan = path, plan
        with safe_open(path, framework="np") as file:
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def of_rank(self, rank):
        """Return a rank's arrays by name."""
        prefix = f"rank{rank}/"
        found = {name: x for name, x in self.arrays.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): x for name, x in found.items()}


def flat(heads):
    """Join heads: [n, T, d] -> [T, n d]."""
    return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)


def grouped(plan, rank, q, k, v):
    """Join a rank's heads as Megatron does: [H, ..], [K, ..], [K, ..] -> [H + 2 K, ..]."""
    found = []
    for kv, (start, stop) in enumerate(plan.query_groups(rank)):
        found += [*q[start:stop], k[kv], v[kv]]
    return np.stack(found)


def megatron_steps(reference, rank):
    """Return a rank's arrays under the names of Megatron's modules, [T, 1, ..]."""
    ours, theirs = reference.of_rank(rank), {}
    for pass_name in PASSES:
        names = {"embedding": "embed", "decoder.final_layernorm.output": "final_norm"}
        names["output_layer.output.0"] = "logits_partial"
        for i in range(2):
            layer, step = f"decoder.layers.{i}", f"layers.{i}"
            names[f"{layer}.self_attention.linear_proj.input"] = f"{step}.attn.context"
            names[f"{layer}.self_attention.linear_proj.output"] = f"{step}.attn.out"
            names[f"{layer}.pre_mlp_layernorm"] = f"{step}.mlp.norm"
            names[f"{layer}.mlp.linear_fc2.input.0"] = f"{step}.mlp.act"
            names[layer] = f"{step}.mlp.residual"
            q, k, v, gate, up = (ours[f"{pass_name}/{step}.{x}"] for x in STEPS)
            joined = flat(grouped(reference.plan, rank, q, k, v))  # [T, (H + 2 K) d]
            theirs[f"{pass_name}/{layer}.self_attention.linear_qkv.output.0"] = joined[:, None]
            theirs[f"{pass_name}/{layer}.mlp.linear_fc1"] = np.concatenate((gate, up), axis=-1)[:, None]
            key = ours[f"{pass_name}/{step}.attn.k_rope"].transpose(1, 0, 2)[:, None]  # [T, 1, K, d]
            theirs[f"{pass_name}/{layer}.self_attention.core_attention.input.1"] = key
        theirs |= {
            f"{pass_name}/{name}": ours[f"{pass_name}/{step}"][:, None] for name, step in names.items()
        }
    return theirs


STEPS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")


def hf_steps(reference, rank):
    """Return a rank's arrays under the names of transformers' modules, [1, T, ..]."""
    ours, theirs = reference.of_rank(rank), {}
    for pass_name in PASSES:
        for i in range(2):
            layer, step = f"{pass_name}/model.layers.{i}", f"{pass_name}/layers.{i}"
            for part in "qkv":
                theirs[f"{layer}.self_attn.{part}_proj"] = flat(ours[f"{step}.attn.{part}"])[None]
            theirs[f"{layer}.mlp.up_proj.output"] = ours[f"{step}.mlp.up"][None]
            theirs[f"{layer}.mlp.down_proj.input"] = ours[f"{step}.mlp.act"][None]
            theirs[f"{layer}.output.0"] = ours[f"{step}.mlp.residual"][None]
        theirs[f"{pass_name}/lm_head"] = ours[f"{pass_name}/logits_partial"][None]
        theirs[f"{pass_name}/model.norm"] = ours[f"{pass_name}/final_norm"][None]
        theirs[f"{pass_name}/model.embed_tokens"] = ours[f"{pass_name}/embed"][None]
    return theirs


def weights_of(reference, rank):
    """Return a rank's weights under the checkpoint's names."""
    arrays = reference.of_rank(rank)
    return {name[8:]: array for name, array in arrays.items() if name.startswith("weights/")}


def vllm_weights(reference, rank):
    """Return a rank's weights under vLLM's names: joined projections, stacked experts."""
    tensors = weights_of(reference, rank)
    for i in range(2):
        layer = f"model.layers.{i}"
        for kind in ("weight", "bias"):
            if f"{layer}.self_attn.q_proj.{kind}" in tensors:
                parts = [tensors.pop(f"{layer}.{part}.{kind}") for part in PARTS]
                tensors[f"{layer}.self_attn.qkv_proj.{kind}"] = np.concatenate(parts)
            if f"{layer}.mlp.gate_proj.{kind}" in tensors:
                parts = [tensors.pop(f"{layer}.mlp.{part}_proj.{kind}") for part in ("gate", "up")]
                tensors[f"{layer}.mlp.gate_up_proj.{kind}"] = np.concatenate(parts)
        if f"{layer}.mlp.experts.0.up_proj.weight" in tensors:
            gate, up, down = (
                np.stack([tensors.pop(f"{layer}.mlp.experts.{n}.{part}_proj.weight") for n in range(3)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{layer}.mlp.experts.w13_weight"] = np.concatenate((gate, up), axis=1)
            tensors[f"{layer}.mlp.experts.w2_weight"] = down
    return tensors


def megatron_weights(reference, rank):
    """Return a rank's matrices under Megatron's names."""
    tensors, theirs = weights_of(reference, rank), {}
    for i in range(2):
        q, k, v = (tensors[f"model.layers.{i}.{part}.weight"].reshape(-1, D, 20) for part in PARTS)
        joined = grouped(reference.plan, rank, q, k, v)  # [H + 2 K, d, D]
        theirs[f"module.decoder.layers.{i}.self_attention.linear_qkv.weight"] = joined.reshape(-1, 20)
        theirs[f"module.decoder.layers.{i}.mlp.linear_fc2.weight"] = tensors[
            f"model.layers.{i}.mlp.down_proj.weight"
        ]
    return theirs


def write_ranks(folder, dump, reference, kind="npz"):
    """Write what a function of a reference and a rank returns to a file for each rank."""
    folder.mkdir()
    for rank in range(TP):
        arrays = {name: np.ascontiguousarray(x) for name, x in dump(reference, rank).items()}
        write(folder / f"rank{rank}.{kind}", arrays)
    return folder


def broken(dump, change, at):
    """Return a function like `dump` in which one rank's arrays are changed."""

    def changed(reference, rank):
        arrays = dump(reference, rank)
        if rank == at:
            change(arrays)
        return arrays

    return changed


def scaled(name):
    def change(arrays):
        arrays[name] = 1.5 * arrays[name]

    return change
