"""The experts that an engine chose: any of those with equal router logits; and those that it never chose.

In 16 bits, two logits are often equal. Which expert runs then depends on the engine's top-k.
"""

from itertools import combinations

import numpy as np

from minitp.oracle import ops

LIFT = 1e-12  # relative to a logit; less than a rounding of float32
MOST = 8  # number of equal logits in a row; rows with more are left alone


def break_ties(router, x, out, reference, weight):
    """Return router logits whose largest are those of the experts that the engine chose, [T, E] float64.

    Parameters
    ----------
    router, x, out : array
        The recorded logits [T, E], input [T, D] and output [T, D] of the experts.
    reference : Oracle
    weight : callable
        A function weight(expert, part) that returns a matrix [out, in] of an expert.
    """
    router, count = router.astype(np.float64), reference.experts_per_token  # [T, E]
    if count == router.shape[1]:
        return router
    sizes = -np.sort(-router, axis=-1)  # [T, E], the largest first
    for t in np.flatnonzero(sizes[:, count - 1] == sizes[:, count]):
        last = sizes[t, count - 1]
        tied, above = np.flatnonzero(router[t] == last), np.flatnonzero(router[t] > last)
        if len(tied) <= MOST:
            results = {e: expert_output(x[t], e, reference, weight) for e in (*above, *tied)}  # [D] each
            choices = []
            for chosen in combinations(tied, count - len(above)):
                row = router[t].copy()  # [E]
                row[list(chosen)] += LIFT * max(1, abs(last))
                shares = ops.route(row[None], count, reference.normalizes_shares)[0]  # [E]
                total = sum(shares[e] * results[e] for e in (*above, *chosen))  # [D]
                choices.append((np.linalg.norm(total - out[t]), chosen, row))
            router[t] = min(choices, key=lambda choice: choice[:2])[-1]
    return router


def expert_output(x, expert, reference, weight):
    """Return what an expert computes for one token: x [D] -> [D]."""
    gate, up, down = (weight(expert, part) for part in reference.expert_parts)
    return ops.linear(ops.swiglu(ops.linear(x, gate), ops.linear(x, up)), down)


def idle_experts(case):
    """Return the experts that no token chose, of each layer of a Case that has some: layer -> list of int."""
    reference, found = case.reference, {}
    for layer in range(case.plan.layers if reference.experts else 0):
        chosen = np.zeros(reference.experts, bool)  # [E]
        for pass_ in case.recording.passes:
            router = case.recorded(pass_.name, layer, "mlp.router").astype(np.float64)  # [T, E]
            chosen |= ops.choose_experts(router, reference.experts_per_token).any(axis=0)
        if not chosen.all():
            found[layer] = np.flatnonzero(~chosen).tolist()
    return found
