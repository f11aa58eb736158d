"""Explanations of the steps of a trace, for readers of a report.

For each step there is a sentence, a formula, the operation, and the line of the source where the operation
begins. Shapes come from `trace.names`. In formulas
`_r` marks this rank's part, `Σ_r` is the sum over the ranks, and a step's name without its
block stands for its array: `norm` is `attn.norm` in the attention block.
"""

import inspect
from functools import cache
from importlib import import_module
from pathlib import Path

import minitp
from minitp.trace.names import AFTER, BEFORE, LAYER, PARTIAL
from minitp.util.format import counted

NORM = "x / √(mean(x²) + eps) · w"
SPLIT_AXES = {"H": "H_r", "K": "K_r", "F": "F_r", "V": "V_r", "Hd": "H_r·d"}  # an axis as one rank has it
# Shapes of all steps; block_table is only in passes over a paged cache, and so not in the tables.
LETTERS = {"tokens": "T", "positions": "T", "block_table": "B"} | BEFORE | LAYER | AFTER
OWNERS = {  # first part of an operation's name -> the module, or the class, that has it
    "comm": "comm.base:Comm",
    "KVCache": "kv_cache:KVCache",
    "Loader": "loading.weights:Loader",
    "Model": "model:Model",
    "PagedCache": "paged_cache:PagedCache",
    "SequenceSlice": "model:SequenceSlice",
}

# step -> (operation, formula, sentence)
EXPLAINED = {
    "tokens": (
        "Model.forward_batch",
        "the token ids of this pass",
        "The tokens that went into this pass. Every rank must have the same ones.",
    ),
    "positions": (
        "SequenceSlice.__init__",
        "cache.length, cache.length + 1, ..",
        "The position of each token in its sequence, which decides its RoPE angles and its mask.",
    ),
    "block_table": (
        "PagedCache.slots",
        "position p is in block_table[p // block_size]",
        "The blocks of the paged cache that hold this sequence. Every rank must have the same ones.",
    ),
    "embed_partial": (
        "ops.embed_partial",
        "E[token] if this rank has that row, else 0",
        "The embeddings of the tokens whose rows this rank holds; zeros for all other tokens.",
    ),
    "embed": (
        "comm.all_reduce",
        "Σ_r embed_partial_r",
        "The embeddings of all tokens, the beginning of the residual stream.",
    ),
    "attn.norm": ("ops.rms_norm", NORM, "The residual stream, normalized for the attention block."),
    "attn.q": ("ops.column_parallel", "norm W_q,r", "The queries of this rank's heads."),
    "attn.k": ("ops.column_parallel", "norm W_k,r", "The keys of this rank's KV heads."),
    "attn.v": ("ops.column_parallel", "norm W_v,r", "The values of this rank's KV heads."),
    "attn.q_norm": ("ops.rms_norm", NORM, "Each head's queries, normalized over the head's dimensions."),
    "attn.k_norm": ("ops.rms_norm", NORM, "Each head's keys, normalized over the head's dimensions."),
    "attn.q_rope": (
        "ops.apply_rope",
        "q cos θ + rotate_half(q) sin θ",
        "The queries, rotated by the angles of their positions.",
    ),
    "attn.k_rope": (
        "ops.apply_rope",
        "k cos θ + rotate_half(k) sin θ",
        "The keys, rotated by the angles of their positions.",
    ),
    "attn.k_cache": (
        "KVCache.append",
        "[earlier keys, k_rope]",
        "The keys that attention reads: those of earlier passes, then the new ones.",
    ),
    "attn.v_cache": (
        "KVCache.append",
        "[earlier values, v]",
        "The values that attention reads: those of earlier passes, then the new ones.",
    ),
    "attn.scores": (
        "ops.attention_scores",
        "q · k / √d, and −∞ where masked",
        "How well each query matches each key that it may attend to.",
    ),
    "attn.probs": (
        "ops.softmax",
        "exp(s − max s) / Σ exp(s − max s)",
        "The scores of each query as weights that add up to 1.",
    ),
    "attn.context": (
        "ops.attention_context",
        "probs v_cache",
        "The mean of the values, weighted by the probabilities; the heads are concatenated.",
    ),
    "attn.out_partial": (
        "ops.row_parallel",
        "context_r W_o,r",
        "This rank's term of the attention block's output. Only the sum over the ranks is the output.",
    ),
    "attn.out": (
        "comm.all_reduce",
        "Σ_r out_partial_r + bias",
        "The attention block's output: the sum of all ranks' terms, and then the bias, if there is one.",
    ),
    "attn.post_norm": ("ops.rms_norm", NORM, "The attention block's output, normalized after the sum."),
    "attn.residual": (
        "Model._all_reduce_and_add",
        "x + out",
        "The residual stream with the attention block's output added.",
    ),
    "mlp.norm": ("ops.rms_norm", NORM, "The residual stream, normalized for the MLP block."),
    "mlp.router": (
        "ops.column_parallel",
        "norm W_router",
        "How well each expert suits each token. Every rank computes all of these numbers.",
    ),
    "mlp.experts": (
        "moe.experts_act",
        "silu(norm W_gate,r) · norm W_up,r",
        "The activations of the experts chosen for each token, in this rank's columns.",
    ),
    "mlp.gate": ("ops.column_parallel", "norm W_gate,r", "This rank's columns of the gate projection."),
    "mlp.up": ("ops.column_parallel", "norm W_up,r", "This rank's columns of the up projection."),
    "mlp.act": ("ops.swiglu", "silu(gate) · up", "The up projection, scaled by the activated gate."),
    "mlp.out_partial": (
        "ops.row_parallel",
        "act_r W_down,r",
        "This rank's term of the MLP block's output. Only the sum over the ranks is the output.",
    ),
    "mlp.out": (
        "comm.all_reduce",
        "Σ_r out_partial_r + bias",
        "The MLP block's output: the sum of all ranks' terms, and then the bias, if there is one.",
    ),
    "mlp.post_norm": ("ops.rms_norm", NORM, "The MLP block's output, normalized after the sum."),
    "mlp.residual": (
        "Model._all_reduce_and_add",
        "x + out",
        "The residual stream with the MLP block's output added: the next layer's input.",
    ),
    "final_norm": ("ops.rms_norm", NORM, "The residual stream after the last layer, normalized."),
    "logits_partial": (
        "ops.logits_partial",
        "final_norm W_lm_head,r",
        "This rank's columns of the logits. They are concatenated, not summed.",
    ),
    "logits": (
        "comm.all_gather",
        "[logits_0 | logits_1 | ..]",
        "The logits of the whole vocabulary: the columns of all ranks, concatenated.",
    ),
}


WEIGHTS = (
    "Loader.load",
    "this rank's slice of the checkpoint's tensor",
    "A tensor of the checkpoint. Each rank must hold exactly its slice.",
)


def explain(steps, config=None, per_rank=True):
    """Return the explanation of each step as [shape, formula, operation, sentence, source], by name.

    The source is the file and the line at which the operation begins, such as "minitp/ops.py:27".

    Parameters
    ----------
    steps : iterable of str
        Names as in `trace.names`, or `weights` for the tensors of the checkpoint; other names are ignored.
    config : Config or None
        The model's config, if it is known: some families compute a step differently.
    per_rank : bool
        Give the shape of one rank's array instead of the whole array.
    """
    table = EXPLAINED | {"weights": WEIGHTS} | ({} if config is None else _variants(config))
    found = {}
    for step in filter(table.get, steps):
        operation, formula, sentence = table[step]
        letters = shape(step, per_rank) if step in LETTERS else ""
        found[step] = [letters, formula, operation, sentence, source_line(operation)]
    return found


def shape(step, per_rank=True):
    """Format a step's shape, in letters, for one rank's array or for the whole array.

    >>> shape("attn.q_rope"), shape("attn.context"), shape("attn.q_rope", per_rank=False)
    ('[H_r, T, d]', '[T, H_r·d]', '[H, T, d]')
    """
    axes = LETTERS[step].split()
    if per_rank and step not in PARTIAL and step != "logits":
        axes = [SPLIT_AXES.get(axis, axis) for axis in axes]
    return f"[{', '.join(axes)}]".replace("Hd", "H·d")


@cache
def source_line(operation):
    """Return the file and line at which an operation begins, or "" if its source is not in the package.

    >>> source_line("ops.softmax").rpartition(":")[0]
    'minitp/ops.py'
    """
    owner, name = operation.split(".")
    module, _, class_name = OWNERS.get(owner, owner).partition(":")
    holder = import_module(f"minitp.{module}")
    function = getattr(getattr(holder, class_name) if class_name else holder, name)
    code = inspect.unwrap(function).__code__
    root = Path(minitp.__file__).parent
    path = Path(code.co_filename)
    if not path.is_relative_to(root):  # another function has replaced it
        return ""
    return f"minitp/{path.relative_to(root).as_posix()}:{code.co_firstlineno}"


def _variants(config):
    """Return the entries of EXPLAINED that differ for a model with this config."""
    found = {}

    def change(step, formula=None, operation=None, more=""):
        old_operation, old_formula, sentence = found.get(step, EXPLAINED[step])
        found[step] = (operation or old_operation, formula or old_formula, sentence + more)

    if config.norm_plus_one:
        for step, (operation, formula, _) in EXPLAINED.items():
            if operation == "ops.rms_norm":
                change(step, formula.replace("· w", "· (1 + w)"), "ops.rms_norm_plus_one")
    if config.embedding_multiplier != 1:
        change("embed_partial", f"{config.embedding_multiplier:g} · {EXPLAINED['embed_partial'][1]}")
    for name in "qkv" if config.qkv_bias else "":
        change(f"attn.{name}", f"norm W_{name},r + b_{name},r")
    for name in "qk" if config.qk_norm else "":
        change(f"attn.{name}_rope", f"{name}_norm cos θ + rotate_half({name}_norm) sin θ")
    if config.rotary_dim < config.head_dim:
        dimensions = counted(config.head_dim, "dimension")
        first = f"Only the first {config.rotary_dim} of each head's {dimensions} are rotated."
        for name in "qk":
            change(f"attn.{name}_rope", more=f" {first}")
    if config.layers_without_rope:
        layers = ", ".join(map(str, sorted(config.layers_without_rope)))
        for name in "qk":
            change(f"attn.{name}_rope", more=f" Layers without RoPE, where θ is 0: {layers}.")
    if config.local_rope:
        for name in "qk":
            change(f"attn.{name}_rope", more=" The layers with a window have a RoPE of their own.")
    change("attn.scores", _scores(config))
    for block, bias in (("attn", config.o_bias), ("mlp", config.mlp_bias)):
        change(f"{block}.out", f"Σ_r out_partial_r{' + bias' if bias else ''}")
        added = "post_norm" if config.post_norms else "out"
        factor = f"{config.residual_multiplier:g} · " if config.residual_multiplier != 1 else ""
        change(f"{block}.residual", f"x + {factor}{added}")
    for name in ("gate", "up") if config.mlp_bias else ():
        change(f"mlp.{name}", f"norm W_{name},r + b_{name},r")
    if config.hidden_act != "silu":
        change("mlp.act", "gelu(gate) · up", "ops.geglu")
    if config.num_local_experts:
        partial = "Σ over its experts: weight · experts_r W_down,r"
        weights = "these experts, so that they add up to 1" if config.norm_topk_prob else "all experts"
        more = f" The weights of a token's experts are a softmax over {weights}."
        change("mlp.out_partial", partial, "moe.experts_partial", more)
    change("logits_partial", _logits(config))
    return found


def _scores(config):
    scale = "/ √d" if config.attention_multiplier is None else f"· {config.attention_multiplier:.6g}"
    return f"{_capped(f'q · k {scale}', config.attn_logit_softcapping)}, and −∞ where masked"


def _logits(config):
    logits = EXPLAINED["logits_partial"][1]
    logits += f" / {config.logits_scaling:g}" if config.logits_scaling != 1 else ""
    return _capped(logits, config.final_logit_softcapping)


def _capped(formula, cap):
    return formula if cap is None else f"{cap:g} · tanh(({formula}) / {cap:g})"
