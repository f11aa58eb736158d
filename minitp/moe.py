"""A mixture of experts in place of the dense feed-forward block.

Each token goes through X of E experts: those with the largest router logits. All ranks choose the same
experts, and each rank holds its FFN columns of every expert, so the split and the one all-reduce are the same
as in a dense model. The shape letters are those of `ops`. (Jiang et al., Mixtral of Experts, 2024.)
"""

from minitp import ops


def route(xp, logits, per_token, normalized=True):
    """Choose the X experts of each token, and the weights of their outputs.

    The X largest logits decide; of equal logits, the first is preferred. The weights are a softmax over these
    X logits only. (Jiang et al., Mixtral of Experts, 2024, section 2.1.) A softmax over all E logits,
    restricted to the X experts and normalized again, gives the same weights. Some Qwen3 models do not
    normalize again, so that the weights of a token add up to less than 1.

    Parameters
    ----------
    logits : [T, E]
    per_token : int
        The number of experts per token, X <= E.
    normalized : bool
        Whether the weights of each token add up to 1.

    Returns
    -------
    int [T, X], each row in ascending order, and float32 [T, X]
    """
    logits = logits.astype(xp.float32, copy=False)  # [T, E]
    # A run that overflows may have logits of -inf, and would choose the same expert twice.
    remaining, experts = xp.maximum(logits, -3e38), xp.arange(logits.shape[1])  # [T, E], [E]
    for _ in range(per_token):
        best = xp.argmax(remaining, axis=-1)[:, None] == experts[None, :]  # [T, E]
        remaining = xp.where(best, -xp.inf, remaining)  # [T, E]
    chosen = xp.nonzero(remaining == -xp.inf)[1].reshape(-1, per_token)  # [T, X]
    rows = xp.arange(logits.shape[0])[:, None]  # [T, 1]
    if normalized:
        return chosen, ops.softmax(xp, logits[rows, chosen])  # [T, X], [T, X]
    return chosen, ops.softmax(xp, logits)[rows, chosen]  # [T, X], [T, X]


def experts_act(xp, x, chosen, w_gate_up):
    """Compute SwiGLU of this rank's FFN columns, for each token and each of its experts.

    `x` is [T, D], `chosen` int [T, X] from `route`, and `w_gate_up` a list of [D, 2 F_r], one per expert.
    The result is [T, X, F_r].
    """
    acts = xp.empty((*chosen.shape, w_gate_up[0].shape[1] // 2), dtype=x.dtype)  # [T, X, F_r]
    for expert, w_r in enumerate(w_gate_up):
        rows, nth = xp.nonzero(chosen == expert)  # [n], [n]: tokens; the expert's index among their X
        if len(rows):  # in a decode pass, most experts have no token
            acts[rows, nth] = ops.swiglu(xp, ops.column_parallel(xp, x[rows], w_r))  # [n, F_r]
    return acts  # [T, X, F_r]


def experts_partial(xp, acts, chosen, weights, w_down):
    """Compute this rank's term of the weighted sum of the experts' outputs; an all-reduce must follow.

    `acts` is [T, X, F_r]; `chosen` int [T, X] and `weights` float32 [T, X] come from `route`; `w_down` is a
    list of [F_r, D], one per expert. The sum is in float32 and rounded once: [T, D] in `acts.dtype`.
    """
    total = xp.zeros((acts.shape[0], w_down[0].shape[1]), dtype=xp.float32)  # [T, D]
    for expert, w_r in enumerate(w_down):
        rows, nth = xp.nonzero(chosen == expert)  # [n], [n]; no row occurs twice, so += below is safe
        if len(rows):
            out = xp.matmul(acts[rows, nth], w_r, dtype=xp.float32)  # [n, D]
            total[rows] += weights[rows, nth][:, None] * out  # [n, D]
    return total.astype(acts.dtype, copy=False)  # [T, D]
