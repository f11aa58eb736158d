"""The log-likelihoods of token ids, from a model on ranks or from the oracle."""

import numpy as np

CHUNK = 128  # positions per forward pass, whose logits are float32 [128, V]


def log_likelihoods(model, token_ids, progress=lambda tokens: None):
    """Return the log-likelihood of each token given those before it; all ranks call this.

    Parameters
    ----------
    model : Model
    token_ids : list of int
        T tokens; the first one has no predecessor and no log-likelihood.
    progress : callable
        A function that is called with the number of tokens done since its last call.

    Returns
    -------
    float64 [T - 1]
        The same on every rank.
    """
    from minitp.generate import host_logits

    cache, found = model.new_cache(len(token_ids)), []
    for start in range(0, len(token_ids), CHUNK):
        logits = model.forward(token_ids[start : start + CHUNK], cache, logits_at=slice(None))  # [n, V]
        targets = token_ids[start + 1 : start + 1 + CHUNK]
        found.append(
            host_logits(model, of_targets(model.device.xp, logits, targets))
        )  # [n], at the end [n-1]
        progress(len(logits))
    return np.concatenate(found)  # [T - 1]


def oracle_log_likelihoods(oracle, token_ids):
    """Return what `log_likelihoods` does, computed by the Oracle: float64 [T - 1]."""
    return of_targets(np, oracle.logits(token_ids), token_ids[1:])  # [T - 1]


def of_targets(xp, logits, targets):
    """Return log softmax(logits[i])[targets[i]] for each target: logits [n, V] -> float64 [targets]."""
    count = len(targets)
    logits = logits[:count].astype(xp.float64)  # [count, V]
    top = logits.max(axis=-1, keepdims=True)  # [count, 1]
    log_sum = xp.log(xp.exp(logits - top).sum(axis=-1)) + top[:, 0]  # [count]
    return logits[xp.arange(count), xp.asarray(targets, dtype=int)] - log_sum  # [count]
