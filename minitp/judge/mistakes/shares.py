"""The common mistakes in the shares of a mixture's experts, and in what each expert gets and returns."""

import numpy as np

from minitp.oracle import ops
from minitp.util.format import counted


def share_mistakes(mixture):
    """Try mistakes in the choice of the experts and in their shares."""
    router, count, normalized = mixture.router, mixture.count, mixture.normalized
    other = (
        "normalized over all experts, not over the chosen ones"
        if normalized
        else ("normalized over the chosen experts, not over all")
    )
    yield f"the shares are {other}", mixture.total(ops.route(router, count, not normalized))
    for number in range(1, min(count + 3, router.shape[1] + 1)):
        if number != count:
            text = (
                f"{number} experts per token, not {count}"
                if number > 1
                else f"1 expert per token, not {count}"
            )
            yield text, mixture.total(ops.route(router, number, normalized))
    chosen = mixture.shares > 0  # [T, E]
    yield "all experts of a token have the same share", mixture.total(chosen / count)
    yield "the experts' outputs are added without their shares", mixture.total(chosen.astype(np.float64))
    sigmoid = np.where(chosen, 1 / (1 + np.exp(-router)), 0)  # [T, E]
    yield "the shares are sigmoids, not a softmax", mixture.total(sigmoid)
    total = sigmoid.sum(axis=-1, keepdims=True)  # [T, 1]
    yield "the shares are normalized sigmoids, not a softmax", mixture.total(sigmoid / total)
    lowest = ops.route(-router, count, normalized)  # [T, E]
    yield "the experts with the smallest logits", mixture.total(lowest)
    lowest = np.where(lowest > 0, ops.softmax(router), 0)  # [T, E]
    if normalized:
        lowest /= lowest.sum(axis=-1, keepdims=True)
    yield "the experts with the smallest shares", mixture.total(lowest)
    over_tokens = ops.softmax(router.T).T  # [T, E]
    chosen_so = ops.choose_experts(over_tokens, count)  # [T, E]
    for selected in (chosen_so, chosen):
        shares = np.where(selected, over_tokens, 0)  # [T, E]
        shares = shares / shares.sum(axis=-1, keepdims=True) if normalized else shares  # [T, E]
        yield "the softmax is over the tokens, not over the experts", mixture.total(shares)
    if count > 1:
        exchanged = np.zeros_like(mixture.shares)  # [T, E]
        for t, row in enumerate(chosen):
            experts = sorted(np.flatnonzero(row), key=lambda e: mixture.shares[t, e])
            exchanged[t, experts] = mixture.shares[t, experts[::-1]]
        yield "the shares of a token's experts are in the wrong order", mixture.total(exchanged)


def dispatch_mistakes(mixture):
    """Try mistakes in what the experts get, and in the sum of what they return."""
    shares, chosen = mixture.shares, mixture.shares > 0  # [T, E] each
    found = np.zeros_like(mixture.x)  # [T, D]
    for expert in mixture.experts:
        for t in np.flatnonzero(chosen[:, expert]):
            found[t] += mixture.output_of(shares[t, expert] * mixture.x[t : t + 1], expert)[0]
    yield "an expert's input is scaled by its share, not its output", found
    if mixture.count > 1:
        numbers = np.arange(shares.shape[1])
        last = np.max(np.where(chosen, numbers, -1), axis=-1)  # [T]
        dropped = sorted({int(e) for e in np.nonzero(chosen & (numbers != last[:, None]))[1]})
        only = f" (or expert {dropped[0]} is left out)" if len(dropped) == 1 else ""
        text = f"an expert's output overwrites those of the experts before it{only}"
        yield text, mixture.total(np.where(numbers == last[:, None], shares, 0))
    order = np.argsort(-mixture.router, axis=-1, kind="stable")[:, : mixture.count]  # [T, X]
    for row, whose in ((-1, "last"), (0, "first")):
        same = np.zeros_like(shares)  # [T, E]
        same[:, order[row]] = np.take_along_axis(shares, order, axis=-1)
        yield f"all tokens use the experts of the {whose} token", mixture.total(same)
    yield from limited(mixture, chosen)


def limited(mixture, chosen):
    """Try a largest number of tokens per expert, from the first token that is wrong: chosen [T, E]."""
    found, right = mixture.wrong.s(mixture.wrong.step), mixture.wrong.right()  # [T, D] each
    if found.shape != right.shape:
        return
    errors, sizes = (np.linalg.norm(each, axis=-1) for each in (found - right, right))  # [T] each
    wrong = np.flatnonzero(errors > 1e-2 * sizes)
    before = np.cumsum(chosen, axis=0) - chosen  # [T, E], the tokens of each expert before this one
    for most in sorted({int(before[t, e]) for t in wrong[:1] for e in np.flatnonzero(chosen[t])} - {0}):
        kept = np.where(chosen & (before < most), mixture.shares, 0)  # [T, E]
        text = f"an expert takes at most {counted(most, 'token')}, and drops the others"
        yield text, mixture.total(kept)
