"""A mixture of experts in place of the dense feed-forward part. (Jiang et al., Mixtral of Experts, 2024.)

Each token goes through X of E experts, the ones with the largest router logits. All ranks route alike, and
each holds its FFN columns of every expert: so the split, and the one all-reduce, are those of a dense model.
Shape letters as in `ops`.
"""

from minitp import ops


def route(xp, logits, per_token):
    """Which experts each token goes through, and with which weights they count.

    Those with the largest logits, the first of equals, weighted by the softmax over these alone: the same as
    normalising their shares of the softmax over all. (Jiang et al., Mixtral of Experts, 2024, section 2.1.)

    Parameters
    ----------
    logits : [T, E]
    per_token : int
        X, at most E.

    Returns
    -------
    int [T, X], in ascending order, and float32 [T, X]
    """
    logits = logits.astype(xp.float32, copy=False)  # [T, E]
    left, experts = logits, xp.arange(logits.shape[1])  # [T, E], [E]
    for _ in range(per_token):
        best = xp.argmax(left, axis=-1)[:, None] == experts[None, :]  # [T, E]
        left = xp.where(best, -xp.inf, left)  # [T, E]
    chosen = xp.nonzero(left != logits)[1].reshape(-1, per_token)  # [T, X]
    rows = xp.arange(logits.shape[0])[:, None]  # [T, 1]
    return chosen, ops.softmax(xp, logits[rows, chosen])  # [T, X], [T, X]


def experts_act(xp, x, chosen, w_gate_up):
    """SwiGLU of this rank's FFN columns, for each token those of its experts.

    `x` [T, D], `chosen` int [T, X] from `route`, `w_gate_up` [D, 2 F_r] of each expert; returns [T, X, F_r].
    """
    acts = xp.empty((*chosen.shape, w_gate_up[0].shape[1] // 2), dtype=x.dtype)  # [T, X, F_r]
    for expert, w_r in enumerate(w_gate_up):
        rows, nth = xp.nonzero(chosen == expert)  # [n], [n]
        acts[rows, nth] = ops.swiglu(xp, ops.column_parallel(xp, x[rows], w_r))  # [n, F_r]
    return acts  # [T, X, F_r]


def experts_partial(xp, acts, chosen, weights, w_down):
    """This rank's term of the weighted sum of the experts' outputs: an all-reduce must follow.

    `acts` [T, X, F_r], `chosen` int [T, X] and `weights` float32 [T, X] from `route`, `w_down` [F_r, D] of
    each expert; returns [T, D] in the dtype of `acts`, summed in float32 and rounded once.
    """
    total = xp.zeros((acts.shape[0], w_down[0].shape[1]), dtype=xp.float32)  # [T, D]
    for expert, w_r in enumerate(w_down):
        rows, nth = xp.nonzero(chosen == expert)  # [n], [n]; no row twice
        out = xp.matmul(acts[rows, nth], w_r, dtype=xp.float32)  # [n, D]
        total[rows] += weights[rows, nth][:, None] * out  # [n, D]
    return total.astype(acts.dtype, copy=False)  # [T, D]
