"""Record Hugging Face transformers on two ranks with `minitp.probe`, for the tests of `minitp judge`.

    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 .      (CPU; the committed
    files were made with these versions)
    torchrun --nproc_per_node 2 tests/support/make_rank_recordings.py [NAME ..]

The models are sharded by transformers' own plans. Most have a fault, which only one rank may have.
rank_recordings.json lists the model, the step and rank that must be blamed first, and words of the
explanation.
"""

import json
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import minitp.probe

TESTS = Path(__file__).resolve().parents[1]
FOLDER, INDEX = TESTS / "support" / "rank_recordings", TESTS / "support" / "rank_recordings.json"
PROMPT = [3, 50, 7, 7, 91]


def nothing(model, rank):
    """Leave the model as it is."""


def whole(module):
    """Return the whole weight of a module; all ranks call this."""
    return module.weight.full_tensor() if isinstance(module.weight, DTensor) else module.weight


def own(module):
    """Return this rank's part of a weight, which can be changed."""
    return module.weight.to_local() if isinstance(module.weight, DTensor) else module.weight


def set_rows(module, rows):
    own(module).copy_(rows)


def replace_all_reduce(change, counts):
    """Replace the all-reduces of some numbers in a pass by change(tensor, all_reduce)."""
    original, seen = dist.all_reduce, [0]

    def all_reduce(tensor, *args, **kwargs):
        seen[0] += 1
        if seen[0] - 1 in counts:
            return change(tensor, lambda: original(tensor, *args, **kwargs))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce


def no_sum(model, rank):
    replace_all_reduce(lambda tensor, all_reduce: None, {2})


def rank_1_left_out(model, rank):
    def change(tensor, all_reduce):
        if rank == 1:
            tensor.zero_()
        all_reduce()

    replace_all_reduce(change, {1})


def sum_of_means(model, rank):
    def change(tensor, all_reduce):
        all_reduce()
        tensor /= 2

    replace_all_reduce(change, {3})


def summed_twice(model, rank):
    def change(tensor, all_reduce):
        all_reduce()
        all_reduce()

    replace_all_reduce(change, {0})


def kv_of_rank_0(model, rank):
    for name in "kv":
        module = getattr(model.model.layers[1].self_attn, f"{name}_proj")
        rows = whole(module)
        if rank == 1:
            set_rows(module, rows[: len(own(module))])


def ranks_exchanged(model, rank):
    module = model.model.layers[0].mlp.up_proj
    set_rows(module, whole(module).chunk(2)[1 - rank])


def rows_dealt_out(model, rank):
    module = model.model.layers[1].mlp.gate_proj
    set_rows(module, whole(module)[rank::2])


def heads_dealt_out(model, rank):
    module = model.model.layers[0].self_attn.q_proj
    by_head = whole(module).view(6, -1, module.in_features)  # [H, d, D]
    set_rows(module, by_head[rank::2].reshape(-1, module.in_features))


def columns_exchanged(model, rank):
    module = model.model.layers[1].self_attn.o_proj
    columns = whole(module).chunk(2, dim=1)
    if rank == 1:
        set_rows(module, columns[0])


def norm_over_shard(model, rank):
    norm = model.model.layers[1].post_attention_layernorm

    def forward(x):
        part = x.chunk(2, dim=-1)[rank]
        return norm.weight * x * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    norm.forward = forward


def bias_on_each_rank(model, rank):
    module = model.model.layers[0].self_attn.o_proj
    bias = module.bias.full_tensor() if isinstance(module.bias, DTensor) else module.bias

    def forward(x):
        output = x @ own(module).T + bias
        dist.all_reduce(output)
        return output

    module.forward = forward


def other_bias(model, rank):
    module = model.model.layers[1].self_attn.q_proj
    bias = module.bias.full_tensor()
    if rank == 1:
        module.bias.to_local().copy_(bias.chunk(2)[0])


def vocabulary_offset(model, rank):
    """Look up each rank's rows of the embedding; rank 1 subtracts one too few from the token ids."""
    module = model.model.embed_tokens
    rows = whole(module).chunk(2)[rank]  # [V_r, D]

    def forward(ids):
        local = ids - rank * len(rows)
        inside = (local >= 0) & (local < len(rows))
        output = torch.where(inside[..., None], rows[(local + rank) % len(rows)], 0)
        dist.all_reduce(output)
        return output

    module.forward = forward


def logits_exchanged(model, rank):
    head = model.lm_head
    forward = head.forward

    def exchanged(x):
        return torch.cat(forward(x).chunk(2, dim=-1)[::-1], dim=-1)

    head.forward = exchanged


def one_head_scaled(model, rank):
    """Multiply the value head of rank 1 by two."""
    if rank == 1:
        own(model.model.layers[0].self_attn.v_proj).mul_(2)


def joined_gate_and_up(model, rank):
    mlp = model.model.layers[1].mlp
    joined = torch.cat((whole(mlp.gate_proj), whole(mlp.up_proj)))  # [2 F, D]
    for module, rows in zip((mlp.gate_proj, mlp.up_proj), joined.chunk(2)[rank].chunk(2), strict=True):
        set_rows(module, rows)


def joined_experts(model, rank):
    weight = model.model.layers[0].mlp.experts.gate_up_proj  # [E, 2 F, D]
    weight.to_local().copy_(weight.full_tensor().chunk(2, dim=1)[rank])


# name -> the model, the fault, the step that is wrong first, its rank, and words of the explanation
CASES = {
    "llama": ("llama2", nothing, None, None, ""),
    "bias": ("llama-bias", nothing, None, None, ""),
    "mixtral": ("mixtral", nothing, None, None, ""),
    "phi3": ("phi3-partial", nothing, None, None, ""),
    "no sum": ("llama2", no_sum, "layers.1.attn.out", "all", "the sum over the ranks is left out"),
    "rank 1 left out": ("llama2", rank_1_left_out, "layers.0.mlp.out", "all", "sum of rank 1 is left out"),
    "mean of ranks": ("llama2", sum_of_means, "layers.1.mlp.out", "all", "divided by the number of ranks"),
    "summed twice": ("llama2", summed_twice, "layers.0.attn.out", "all", "summed twice"),
    "kv of rank 0": ("llama2", kv_of_rank_0, "layers.1.attn.k", 1, "rows of the weight are those of rank 0"),
    "ranks exchanged": ("llama2", ranks_exchanged, "layers.0.mlp.up", 0, "are those of rank 1"),
    "rows dealt out": ("llama2", rows_dealt_out, "layers.1.mlp.gate", 0, "every 2nd row"),
    "heads dealt out": ("llama2", heads_dealt_out, "layers.0.attn.q", 0, "every 2nd head"),
    "columns of rank 0": ("llama2", columns_exchanged, "layers.1.attn.out_partial", 1, "those of rank 0"),
    "norm over the shard": ("llama2", norm_over_shard, "layers.1.mlp.norm", 0, "of this rank's part"),
    "bias on each rank": ("llama-bias", bias_on_each_rank, "layers.0.attn.out_partial", 0, "is added to the"),
    "bias of rank 0": ("llama-bias", other_bias, "layers.1.attn.q", 1, "the bias is that of rank 0"),
    "vocabulary offset": ("llama2", vocabulary_offset, "embed", "all", "rank 1"),
    "logits exchanged": ("llama2", logits_exchanged, "logits", "all", "columns are in another order"),
    "joined gate and up": ("llama2", joined_gate_and_up, "layers.1.mlp.gate", 1, "is split as a whole"),
    "joined experts": ("mixtral-window", joined_experts, "layers.0.mlp.out_partial", 0, "split as a whole"),
    "value head of rank 1": ("llama2", one_head_scaled, "layers.0.attn.v", 1, "times 2"),
}  # fmt: skip


def file_name(name):
    return name.replace(" ", "-")


def main():
    dist.init_process_group("gloo")
    rank, original = dist.get_rank(), dist.all_reduce
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        golden, fault, *_ = CASES[name]
        model = AutoModelForCausalLM.from_pretrained(
            TESTS / "goldens" / golden,
            dtype=torch.float32,
            distributed_config=DistributedConfig(tp_size=2),
            experts_implementation="eager",
        ).eval()
        model.config._name_or_path = golden
        with torch.no_grad():
            fault(model, rank)
            with minitp.probe.record(model, FOLDER / file_name(name)):
                output = model(torch.tensor([PROMPT]), use_cache=True)
                if fault is nothing:
                    token = output.logits[0, -1].argmax()[None, None]
                    model(token, past_key_values=output.past_key_values, use_cache=True)
        dist.all_reduce = original
        if rank == 0:
            print(FOLDER / file_name(name))
    index = {
        name: {"folder": file_name(name), "model": golden, "step": step, "rank": blamed, "words": words}
        for name, (golden, _, step, blamed, words) in CASES.items()
    }
    if rank == 0:
        INDEX.write_text(json.dumps(index, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
