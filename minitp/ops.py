"""Every operation of the transformer, written out: pure functions of arrays.

`xp` is the array module, `numpy` or `cupy`; every function works with both. Shape letters in this package:

    T tokens of this pass    D hidden size         d head_dim            V vocabulary size
    R dimensions of each head that RoPE rotates: d, or fewer with `partial_rotary_factor`
    H query heads            K key/value heads     G query heads that share a KV head
    S keys that attention reads: all so far, or those within the sliding window
    F FFN columns            E experts             X experts that each token goes through
    B sequences of a decode pass on a GPU          n any number of rows or heads
    H_r, K_r, F_r, V_r: this rank's part of H, K, F, V

Weights are stored as `[in, out]`, so a projection is `x @ w`. Norms, RoPE and softmax compute in float32
whatever the dtype of `x`, and matrix products accumulate in float32, as a GPU does with 16-bit inputs.
"""

import math

# --- embedding ------------------------------------------------------------------------------------------


def embed_partial(xp, token_ids, table, first_row):
    """Look up the embedding rows that this rank holds; rows of tokens on other ranks are zero.

    Each token's row is on one rank, so the sum over all ranks is the embedding: an all-reduce must follow.
    (Shoeybi et al., Megatron-LM, 2019, section 3.)

    Parameters
    ----------
    token_ids : int [T]
    table : [V_r, D]
        This rank's rows of the embedding table.
    first_row : int
        The token id of the first row of `table`.

    Returns
    -------
    [T, D] in the dtype of `table`
    """
    if len(table) == 0:  # there are more ranks than tokens in the vocabulary
        return xp.zeros((len(token_ids), table.shape[1]), dtype=table.dtype)  # [T, D]
    local = token_ids - first_row  # [T]
    is_local = (local >= 0) & (local < table.shape[0])  # [T]
    rows = table[xp.where(is_local, local, 0)]  # [T, D]
    rows = xp.where(is_local[:, None], rows, xp.zeros_like(rows))  # [T, D]
    return rows.astype(table.dtype, copy=False)  # [T, D]: CuPy's `where` returns float32 for bfloat16


def scaled(xp, x, multiplier):
    """Multiply `x` [T, D] by a number in float32, and round once to the dtype of `x`.

    Gemma scales its embeddings (Gemma Team, Gemma 2, 2024). Granite also scales what each block adds to the
    residual stream (Granite Team, Granite 3.0, 2024). With a multiplier of 1 the result is `x` itself.
    """
    if multiplier == 1:
        return x
    return (x.astype(xp.float32, copy=False) * multiplier).astype(x.dtype, copy=False)  # [T, D]


# --- normalization --------------------------------------------------------------------------------------


def rms_norm(xp, x, weight, eps):
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis.

    `x` is [T, D] and `weight` [D], or [n, T, d] and [d] to normalize each head; the result has the shape and
    dtype of `x`. As in Hugging Face's Llama, the normalized value is rounded to that dtype before it is
    multiplied by the weight. (Zhang and Sennrich, RMSNorm, 2019.)
    """
    x32 = x.astype(xp.float32, copy=False)  # [T, D]
    mean_square = (x32 * x32).sum(axis=-1, keepdims=True) / x.shape[-1]  # [T, 1]
    normed = x32 / xp.sqrt(mean_square + eps)  # [T, D]
    return normed.astype(x.dtype, copy=False) * weight  # [T, D]


def rms_norm_plus_one(xp, x, weight, eps):
    """Compute Gemma's x / sqrt(mean(x^2) + eps) * (1 + weight) in float32, and round once.

    `x` is [T, D] and `weight` [D], or [n, T, d] and [d] to normalize each head; the result has the shape and
    dtype of `x`. (Gemma Team, Gemma 2, 2024.)
    """
    x32 = x.astype(xp.float32, copy=False)  # [T, D]
    mean_square = (x32 * x32).sum(axis=-1, keepdims=True) / x.shape[-1]  # [T, 1]
    gain = 1 + weight.astype(xp.float32, copy=False)  # [D]
    return (x32 / xp.sqrt(mean_square + eps) * gain).astype(x.dtype, copy=False)  # [T, D]


# --- projections ----------------------------------------------------------------------------------------


def matmul(xp, a, b):
    """Compute a @ b in float32, and round once to the dtype of `a`: [n, m] @ [m, k] -> [n, k]."""
    return xp.matmul(a, b, dtype=xp.float32).astype(a.dtype, copy=False)  # [n, k]


def column_parallel(xp, x, w_r, bias_r=None):
    """Compute this rank's columns of y = x @ w + bias, without communication.

    w = [ w_0 | w_1 | .. ] is split by columns, and so is y. `x` [T, D] is the same on all ranks; `w_r`
    [D, n_r] and `bias_r` [n_r] are this rank's columns. The sum is in float32 and rounded once, to [T, n_r].
    (Shoeybi et al., Megatron-LM, 2019, section 3.)
    """
    y_r = xp.matmul(x, w_r, dtype=xp.float32)  # [T, n_r]
    y_r = y_r if bias_r is None else y_r + bias_r  # [T, n_r]
    return y_r.astype(x.dtype, copy=False)  # [T, n_r]


def row_parallel(xp, x_r, w_r):
    """Compute this rank's term of x @ w = x_0 @ w_0 + x_1 @ w_1 + ..; an all-reduce must follow.

    `x_r` [T, n_r] holds this rank's columns of x, and `w_r` [n_r, D] the matching rows of w; the result is
    [T, D]. The bias is added after the all-reduce; in each term, it would be counted once per rank.
    (Shoeybi et al., Megatron-LM, 2019, section 3.)
    """
    return matmul(xp, x_r, w_r)  # [T, D]


def logits_partial(xp, x, w_r, softcap=None, scaling=1.0):
    """Compute this rank's vocabulary columns of the logits; an all-gather must follow.

    Despite the name, the result is not a term of a sum: the all-gather concatenates the columns of all ranks.
    `x` is [n, D] and `w_r` [D, V_r]; the result [n, V_r] is divided by `scaling` (Granite Team, Granite 3.0,
    2024) and limited by `soft_cap` if `softcap` is given. The logits stay float32, because rounding could
    make two of them equal.
    """
    logits_r = xp.matmul(x, w_r, dtype=xp.float32)  # [n, V_r]
    logits_r = logits_r if scaling == 1 else logits_r / scaling  # [n, V_r]
    return logits_r if softcap is None else soft_cap(xp, logits_r, softcap)  # [n, V_r]


def soft_cap(xp, x, cap):
    """Compute cap * tanh(x / cap): close to x for small x, and never outside [-cap, cap].

    `x` may have any shape. (Bello et al., 2016; Gemma Team, Gemma 2, 2024, section 2.)
    """
    return xp.tanh(x / cap) * cap  # the shape of x


# --- rotary position embedding --------------------------------------------------------------------------


def rope_cos_sin(xp, positions, inverse_frequencies, attention_factor=1.0):
    """Compute the cosines and signed sines of each position's angles, in the form that `apply_rope` takes.

    `positions` is int [T] and `inverse_frequencies` float32 [R/2]. The results are float32 [T, R] each:
    [cos(angles), cos(angles)] and [-sin(angles), sin(angles)]. Both are multiplied by `attention_factor`, so
    the rotated part of the scores is multiplied by its square. (Peng et al., YaRN, 2023, section 3.4.)
    """
    angles = positions.astype(xp.float32)[:, None] * inverse_frequencies[None, :]  # [T, R/2]
    cos, sin = xp.cos(angles) * attention_factor, xp.sin(angles) * attention_factor  # [T, R/2], [T, R/2]
    return xp.concatenate((cos, cos), axis=-1), xp.concatenate((-sin, sin), axis=-1)  # [T, R], [T, R]


def apply_rope(xp, x, cos, sin):
    """Rotate the pairs (x[i], x[i + R/2]) of each head by the angles of its position.

        rotated[i]       = x[i] * cos(angle[i])       - x[i + R/2] * sin(angle[i])
        rotated[i + R/2] = x[i + R/2] * cos(angle[i]) + x[i] * sin(angle[i])

    In most models R is d. Phi-4-mini rotates only the first R = 0.75 d dimensions of each head, and the
    others stay as they are. (Black et al., GPT-NeoX-20B, 2022, section 2.1.)

    This is the half-split ("rotate_half") layout of Hugging Face checkpoints. Meta's original files pair
    (x[2i], x[2i + 1]) instead. Weights in one layout with code for the other give fluent-looking garbage.

    `x` is [n, T, d] for n heads; `cos` and the signed `sin`, [T, R] each, come from `rope_cos_sin`.
    The result is [n, T, d] in the dtype of `x`. (Su et al., RoFormer, 2021, section 3.2.2.)
    """
    half = cos.shape[-1] // 2  # R/2
    x32 = x[..., : 2 * half].astype(xp.float32, copy=False)  # [n, T, R]
    partner = xp.concatenate((x32[..., half:], x32[..., :half]), axis=-1)  # [n, T, R]
    rotated = (x32 * cos + partner * sin).astype(x.dtype, copy=False)  # [n, T, R]
    rest = x[..., 2 * half :]  # [n, T, d - R]
    return xp.concatenate((rotated, rest), axis=-1) if rest.shape[-1] else rotated  # [n, T, d]


# --- attention ------------------------------------------------------------------------------------------


def split_heads(xp, qkv, heads, kv_heads):
    """Split the joined projection into two views: q and k together, [H_r + K_r, T, d], and v, [K_r, T, d].

    `qkv` is [T, (H_r + 2 K_r) * d]: the columns of all q heads, then those of k, then those of v. Queries and
    keys stay together because RoPE rotates both in the same way.
    """
    per_head = qkv.reshape(qkv.shape[0], heads + 2 * kv_heads, -1)  # [T, H_r + 2 K_r, d]
    by_head = per_head.transpose(1, 0, 2)  # [H_r + 2 K_r, T, d]
    return by_head[: heads + kv_heads], by_head[heads + kv_heads :]  # [H_r + K_r, T, d], [K_r, T, d]


def causal_mask(xp, query_positions, first_key, stop_key, window=None):
    """Return the mask of visible keys, bool [T, S], for the keys at positions first_key .. stop_key - 1.

    A query at position i sees the keys j <= i. With a sliding window it sees only the last `window` of them,
    including its own: i - window < j <= i. (Jiang et al., Mistral 7B, 2023, section 2.)
    """
    query = query_positions[:, None]  # [T, 1]
    key = xp.arange(first_key, stop_key)[None, :]  # [1, S]
    visible = key <= query  # [T, S]
    return visible if window is None else visible & (key > query - window)  # [T, S]


def attention_scores(xp, q, k, query_groups, mask=None, scale=None, softcap=None):
    """Compute the attention scores q . k / sqrt(d), with -inf for each key that the mask hides.

    (Vaswani et al., Attention Is All You Need, 2017, section 3.2.1; Ainslie et al., GQA, 2023.)

    Parameters
    ----------
    q : [H_r, T, d]
    k : [K_r, S, d]
    query_groups : list of (start, stop)
        The range of query heads that read each KV head. The ranges may differ in size, so q cannot be
        reshaped to [K_r, G, T, d]; instead the function loops over the KV heads.
    mask : bool [T, S] or None
        The keys that each query may see; None if it may see all of them.
    scale : float or None
        A factor to use instead of 1 / sqrt(d).
    softcap : float or None
        The limit of the scores, for `soft_cap`; None for no limit.

    Returns
    -------
    float32 [H_r, T, S]
    """
    heads, tokens, d = q.shape
    keys = k.shape[1]
    scores = xp.empty((heads, tokens, keys), dtype=xp.float32)  # [H_r, T, S]
    for kv_head, (start, stop) in enumerate(query_groups):
        rows = q[start:stop].reshape(-1, d)  # [G * T, d]
        products = xp.matmul(rows, k[kv_head].T, dtype=xp.float32)  # [G * T, S]
        scores[start:stop] = products.reshape(stop - start, tokens, keys)  # [G, T, S]
    scores *= 1 / math.sqrt(d) if scale is None else scale
    if softcap is not None:
        scores = soft_cap(xp, scores, softcap)  # [H_r, T, S]
    if mask is not None:
        # Overwrite the scores instead of adding -inf, which would keep the NaNs of keys that are hidden.
        xp.copyto(scores, -xp.inf, where=~mask)
    return scores  # [H_r, T, S]


def softmax(xp, scores):
    """Compute exp(s - max) / sum(exp(s - max)) over the last axis.

    Subtracting the maximum keeps exp from overflowing. `scores` is float32 [..., S] with at least one finite
    entry in each row; the result has the same shape.
    """
    weights = scores - scores.max(axis=-1, keepdims=True)  # [..., S]
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights  # [..., S]


def attention_context(xp, probs, v, query_groups):
    """Compute each query's mean of the values, weighted by its probabilities.

    `probs` float32 [H_r, T, S] is first rounded to the dtype of `v` [K_r, S, d]; `query_groups` is as in
    `attention_scores`. The result, [T, H_r * d], has the heads side by side, as the output projection needs.
    """
    heads, tokens, keys = probs.shape
    d = v.shape[2]
    probs = probs.astype(v.dtype, copy=False)  # [H_r, T, S]
    context = xp.empty((heads, tokens, d), dtype=v.dtype)  # [H_r, T, d]
    for kv_head, (start, stop) in enumerate(query_groups):
        rows = probs[start:stop].reshape(-1, keys)  # [G * T, S]
        means = matmul(xp, rows, v[kv_head])  # [G * T, d]
        context[start:stop] = means.reshape(stop - start, tokens, d)  # [G, T, d]
    return context.transpose(1, 0, 2).reshape(tokens, heads * d)  # [T, H_r * d]


# --- feed-forward ---------------------------------------------------------------------------------------


def swiglu(xp, gate_up):
    """Compute silu(gate) * up, where silu(x) = x / (1 + exp(-x)).

    `gate_up` is [T, 2 F_r], with the gate columns first; the result is [T, F_r] in the same dtype. (Shazeer,
    GLU Variants Improve Transformer, 2020.)
    """
    columns = gate_up.shape[-1] // 2
    gate = gate_up[:, :columns].astype(xp.float32, copy=False)  # [T, F_r]
    up = gate_up[:, columns:].astype(xp.float32, copy=False)  # [T, F_r]
    # Below -80 silu is too small to change a float32 sum, and below -88 exp(-x) would overflow.
    silu = gate / (1 + xp.exp(-xp.maximum(gate, -80)))  # [T, F_r]
    return (silu * up).astype(gate_up.dtype, copy=False)  # [T, F_r]


def geglu(xp, gate_up):
    """Compute gelu(gate) * up, where gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    `gate_up` is [T, 2 F_r], with the gate columns first; the result is [T, F_r] in the same dtype. (Hendrycks
    and Gimpel, GELU, 2016, section 2; Shazeer, GLU Variants Improve Transformer, 2020.)
    """
    columns = gate_up.shape[-1] // 2
    gate = gate_up[:, :columns].astype(xp.float32, copy=False)  # [T, F_r]
    up = gate_up[:, columns:].astype(xp.float32, copy=False)  # [T, F_r]
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)  # [T, F_r]
    return (gate / 2 * (1 + xp.tanh(inner)) * up).astype(gate_up.dtype, copy=False)  # [T, F_r]
