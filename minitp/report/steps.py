"""Explanations of the steps of a trace, for readers of a report.

For each step there is a sentence, a formula and the operation. Shapes come from `trace.names`. In formulas
`_r` marks this rank's part, `Σ_r` is the sum over the ranks, and a step's name without its
block stands for its array: `norm` is `attn.norm` in the attention block.
"""

from minitp.trace.names import AFTER, BEFORE, LAYER, PARTIAL

NORM = "x / √(mean(x²) + eps) · w"
SPLIT_AXES = {"H": "H_r", "K": "K_r", "F": "F_r", "V": "V_r", "Hd": "H_r·d"}  # an axis as one rank has it

# step -> (operation, formula, sentence)
EXPLAINED = {
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


def explain(steps, config=None, per_rank=True):
    """Return the explanation of each step as [shape, formula, operation, sentence], by name.

    Parameters
    ----------
    steps : iterable of str
        Names as in `trace.names`; other names are ignored.
    config : Config or None
        The model's config, if it is known: some families compute a step differently.
    per_rank : bool
        Give the shape of one rank's array instead of the whole array.
    """
    table = EXPLAINED | _variants(config)
    found = {}
    for step in filter(table.get, steps):
        operation, formula, sentence = table[step]
        found[step] = [shape(step, per_rank), formula, operation, sentence]
    return found


def shape(step, per_rank=True):
    """Format a step's shape, in letters, for one rank's array or for the whole array.

    >>> shape("attn.q_rope"), shape("attn.context"), shape("attn.q_rope", per_rank=False)
    ('[H_r, T, d]', '[T, H_r·d]', '[H, T, d]')
    """
    axes = (BEFORE | LAYER | AFTER)[step].split()
    if per_rank and step not in PARTIAL and step != "logits":
        axes = [SPLIT_AXES.get(axis, axis) for axis in axes]
    return f"[{', '.join(axes)}]".replace("Hd", "H·d")


def _variants(config):
    """Return the entries of EXPLAINED that differ for a family of models."""
    found = {}
    if config is not None and config.norm_plus_one:
        for step, (operation, formula, sentence) in EXPLAINED.items():
            if operation == "ops.rms_norm":
                found[step] = ("ops.rms_norm_plus_one", formula.replace("· w", "· (1 + w)"), sentence)
    if config is not None and config.hidden_act != "silu":
        found["mlp.act"] = ("ops.geglu", "gelu(gate) · up", EXPLAINED["mlp.act"][2])
    if config is not None and config.num_local_experts:
        partial = "Σ over its experts: weight · experts_r W_down,r"
        found["mlp.out_partial"] = ("moe.experts_partial", partial, EXPLAINED["mlp.out_partial"][2])
    return found
