"""The names of the steps of a forward pass, in order, and the distribution of each over the ranks.

A step is called `<pass>/<step>`. The pass is `prefill`, `decode.1`, `decode.2`, .. (`check.passes` has more);
the step is for example `embed`, `layers.3.attn.q_rope` or `logits`. The tables below give the shapes of the
whole arrays. H, K, F and V are split over the ranks in contiguous ranges, and a rank's array has only its own
range.

    replicated   the same bits on all ranks
    sharded      each rank has its range of one axis; two ranks may hold the same KV head
    partial      the sum over the ranks is the value
"""

import re
from dataclasses import dataclass

BEFORE = {  # step -> shape of the whole array
    "tokens": "T",
    "positions": "T",
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
    "logits_partial": "T V",  # the ranks' columns concatenated; despite its name, not a term of a sum
    "logits": "T V",
}
LAYER = ATTENTION | MLP
ROUTERS = ("block_sparse_moe.gate.weight", "mlp.gate.weight")  # its names in the two kinds of checkpoints
ONLY_WITH = {  # steps of only some models -> tensors of which exactly those models have one
    "attn.q_norm": ("self_attn.q_norm.weight",),
    "attn.k_norm": ("self_attn.k_norm.weight",),
    "attn.post_norm": ("pre_feedforward_layernorm.weight",),
    "mlp.post_norm": ("post_feedforward_layernorm.weight",),
    "mlp.router": ROUTERS,
    "mlp.experts": ROUTERS,
    "mlp.gate": ("mlp.gate_proj.weight",),
    "mlp.up": ("mlp.gate_proj.weight",),
    "mlp.act": ("mlp.gate_proj.weight",),
}
WEIGHTS = "weights/"  # prefix of a checkpoint tensor's name in a trace
PARTIAL = ("embed_partial", "attn.out_partial", "mlp.out_partial")
INTEGERS = ("tokens", "positions", "block_table")  # int64 in a run of any dtype
FLOAT32 = ("attn.scores", "attn.probs", "logits_partial", "logits")  # float32 in a run of any dtype
LARGE = ("attn.scores", "attn.probs")  # [H, T, S]; in a trace only if requested by name


BLOCK_TABLE = "block_table"  # [B], the blocks of a sequence in a paged cache; recorded only by `check`


@dataclass(frozen=True)
class Kind:
    """The distribution of a step over the ranks; if sharded, the axis and each rank's (start, stop)."""

    kind: str
    axis: int | None = None
    ranges: tuple = ()


def layer_steps(plan):
    """Return the entries of LAYER that apply to a model with this Plan."""

    def has(step):
        names = ONLY_WITH.get(step)
        return names is None or any(f"model.layers.0.{name}" in plan.tensors for name in names)

    return {step: letters for step, letters in LAYER.items() if has(step)}


def step_names(plan):
    """Return all steps of a pass of a model with this Plan, in the order in which they happen."""
    inner = [f"layers.{i}.{step}" for i in range(plan.layers) for step in layer_steps(plan)]
    return [*BEFORE, *inner, *AFTER]


def full_name(pass_name, layer, step):
    """Return the full name of a step of the tables above; `layer` is None for steps outside the layers.

    >>> full_name("decode.1", 3, "attn.q_rope")
    'decode.1/layers.3.attn.q_rope'
    """
    return f"{pass_name}/{step}" if layer is None else f"{pass_name}/layers.{layer}.{step}"


def split_name(name):
    """Split a full name into the pass, the layer (or None), and the step's name in the tables above.

    >>> split_name("decode.1/layers.3.attn.q_rope")
    ('decode.1', 3, 'attn.q_rope')
    >>> split_name("prefill/embed")
    ('prefill', None, 'embed')
    """
    pass_name, _, step = name.rpartition("/")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", step)
    return (pass_name, int(match[1]), match[2]) if match else (pass_name, None, step)


def kinds(plan, head_dim):
    """Return the Kind of each step that a model with this Plan has."""
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
