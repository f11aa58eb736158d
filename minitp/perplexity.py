"""How well a model predicts a given text."""

import math

from minitp.model import host_logits

CHUNK = 128  # positions whose logits, float32 [128, V], are held at a time


def perplexity(model, token_ids, context, progress=lambda tokens: None):
    """exp of the mean negative log-likelihood of each token given those before it.

    The text is cut into windows of `context` tokens, each read on its own; the first token of a window has
    nothing before it and is not scored.

    Returns
    -------
    (perplexity, scored) : float, int
        The same on every rank.
    """
    total, scored = 0.0, 0
    for start in range(0, len(token_ids) - 1, context):
        window = token_ids[start : start + context]
        cache = model.new_cache(len(window))
        for at in range(0, len(window), CHUNK):
            logits = model.forward(window[at : at + CHUNK], cache, logits_at=slice(None))  # [n, V]
            found = sum_log_likelihood(model.device.xp, logits, window[at + 1 : at + 1 + CHUNK])
            total -= host_logits(model, found).item()
            progress(len(logits))
        scored += len(window) - 1
    return math.exp(total / scored), scored


def sum_log_likelihood(xp, logits, targets):
    """Sum log softmax(logits[i])[targets[i]] over i; logits float32 [n, V], at most n targets; one number."""
    count = len(targets)
    logits = logits[:count].astype(xp.float64)  # [count, V]
    top = logits.max(axis=-1, keepdims=True)  # [count, 1]
    log_sum = xp.log(xp.exp(logits - top).sum(axis=-1)) + top[:, 0]  # [count]
    return (logits[xp.arange(count), xp.asarray(targets, dtype=int)] - log_sum).sum()
