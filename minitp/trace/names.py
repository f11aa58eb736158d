"""The names of the steps of a forward pass, in order, and how the ranks share each of them.

A step is called `<pass>/<step>`: the pass is `prefill` or `decode.1`, `decode.2`, ..; the step `embed`,
`layers.3.attn.q_rope`, `logits`. The whole arrays have the shapes beside the names; H, K, F and V are split
over the ranks in runs, and a rank's own array has only its run of them.

    replicated   the same bits on all ranks
    sharded      each rank has its run along one axis; two ranks may both hold a KV head
    partial      the sum over the ranks is the value
"""

import re
from dataclasses import dataclass

BEFORE = {  # step -> its shape as a whole
    "embed_partial": "T D",
    "embed": "T D",
}
ATTENTION = {
    "attn.norm": "T D",
    "attn.q": "H T d",
    "attn.k": "K T d",
    "attn.v": "K T d",
    "attn.q_norm": "H T d",
    "attn.k_norm": "K T d",
    "attn.q_rope": "H T d",
    "attn.k_rope": "K T d",
    "attn.k_cache": "K S d",
    "attn.v_cache": "K S d",
    "attn.scores": "H T S",
    "attn.probs": "H T S",
    "attn.context": "T Hd",
    "attn.out_partial": "T D",
    "attn.out": "T D",
    "attn.post_norm": "T D",
    "attn.residual": "T D",
}
MLP = {
    "mlp.norm": "T D",
    "mlp.router": "T E",
    "mlp.experts": "T X F",
    "mlp.gate": "T F",
    "mlp.up": "T F",
    "mlp.act": "T F",
    "mlp.out_partial": "T D",
    "mlp.out": "T D",
    "mlp.post_norm": "T D",
    "mlp.residual": "T D",
}
AFTER = {
    "final_norm": "T D",
    "logits_partial": "T V",  # the ranks' columns side by side; not a term of a sum, in spite of its name
    "logits": "T V",
}
LAYER = ATTENTION | MLP
ONLY_WITH = {  # steps that not all models have, and the tensor by which those that do are known
    "attn.q_norm": "self_attn.q_norm.weight",
    "attn.k_norm": "self_attn.k_norm.weight",
    "attn.post_norm": "pre_feedforward_layernorm.weight",
    "mlp.post_norm": "post_feedforward_layernorm.weight",
    "mlp.router": "block_sparse_moe.gate.weight",
    "mlp.experts": "block_sparse_moe.gate.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.gate_proj.weight",
    "mlp.act": "mlp.gate_proj.weight",
}
WEIGHTS = "weights/"  # before a checkpoint tensor's name: weights are steps, too
PARTIAL = ("embed_partial", "attn.out_partial", "mlp.out_partial")
FLOAT32 = ("attn.scores", "attn.probs", "logits_partial", "logits")  # in any dtype
LARGE = ("attn.scores", "attn.probs")  # [H, T, S]: in a trace only if asked for by name


@dataclass(frozen=True)
class Kind:
    """How the ranks share a step: `kind` as above; `axis` and each rank's (start, stop) if it is sharded."""

    kind: str
    axis: int | None = None
    ranges: tuple = ()


def layer_steps(plan):
    """The part of LAYER that a model with this Plan has."""

    def has(step):
        return step not in ONLY_WITH or f"model.layers.0.{ONLY_WITH[step]}" in plan.tensors

    return {step: letters for step, letters in LAYER.items() if has(step)}


def step_names(plan):
    """All steps of a pass of a model with this Plan, in the order in which they happen."""
    inner = [f"layers.{i}.{step}" for i in range(plan.layers) for step in layer_steps(plan)]
    return [*BEFORE, *inner, *AFTER]


def full_name(pass_name, layer, step):
    """The name of a step in the tables above, in a pass; `layer` None outside the layers.

    >>> full_name("decode.1", 3, "attn.q_rope")
    'decode.1/layers.3.attn.q_rope'
    """
    return f"{pass_name}/{step}" if layer is None else f"{pass_name}/layers.{layer}.{step}"


def split_name(name):
    """A full name in three: its pass, its layer or None, and its place in the tables above.

    >>> split_name("decode.1/layers.3.attn.q_rope")
    ('decode.1', 3, 'attn.q_rope')
    >>> split_name("prefill/embed")
    ('prefill', None, 'embed')
    """
    passed, _, step = name.rpartition("/")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", step)
    return (passed, int(match[1]), match[2]) if match else (passed, None, step)


def kinds(plan, head_dim):
    """The Kind of each step that a model with this Plan has."""
    ranges = {
        "H": plan.head_ranges,
        "K": plan.kv_head_ranges,
        "Hd": tuple((start * head_dim, stop * head_dim) for start, stop in plan.head_ranges),
        "F": plan.ffn_ranges,
        "V": plan.vocab_ranges,
    }
    found = {}
    for step, letters in (BEFORE | layer_steps(plan) | AFTER).items():
        dims = letters.split()
        axis = next((i for i, dim in enumerate(dims) if dim in ranges), None)
        if step in PARTIAL:
            found[step] = Kind("partial")
        elif axis is None or step == "logits":
            found[step] = Kind("replicated")
        else:
            found[step] = Kind("sharded", axis, ranges[dims[axis]])
    return found
