"""Every operation of the transformer, written out: pure functions of arrays.

`xp` is the array module, `numpy` or `cupy`; nothing here knows which. Shape letters, here and everywhere:

    T tokens of this pass    D hidden              d head_dim            V vocabulary
    H query heads            K key/value heads     G query heads that share a KV head
    S keys that attention reads: all so far, or those within the sliding window
    F FFN columns            E experts             X experts that a token goes through
    B sequences of a decoding step on a GPU        n any number of rows or heads
    H_r, K_r, F_r, V_r: the part of them that this rank holds

Weights lie `[in, out]`, so a projection reads `x @ w`. Norms, RoPE and softmax compute in float32 whatever
the dtype of `x`, and matrix products sum in float32: that is what a GPU does with 16-bit inputs.
"""

import math

# --- embedding ------------------------------------------------------------------------------------------


def embed_partial(xp, token_ids, table, first_row):
    """Vocab-parallel gather: the rows that this rank holds, zero for tokens that live on another rank.

    The sum over all ranks is the embedding, for just one rank adds something. (Megatron-LM, section 3.)

    Parameters
    ----------
    token_ids : int [T]
    table : [V_r, D]
        This rank's rows of the embedding.
    first_row : int
        The token id of its first row.

    Returns
    -------
    [T, D] in the dtype of `table`
    """
    local = token_ids - first_row  # [T]
    here = (local >= 0) & (local < table.shape[0])  # [T]
    rows = table[xp.where(here, local, 0)]  # [T, D]
    rows = xp.where(here[:, None], rows, xp.zeros_like(rows))  # [T, D]
    return rows.astype(table.dtype, copy=False)  # [T, D]: CuPy's `where` gives float32 for bfloat16


def scaled(xp, x, multiplier):
    """`x` [T, D] times a number, in float32 and rounded once to the dtype of `x`; for 1 `x` itself.

    Of embeddings (Gemma Team, Gemma 2, 2024) and of what a block adds to the stream (Granite Team, Granite
    3.0, 2024).
    """
    if multiplier == 1:
        return x
    return (x.astype(xp.float32, copy=False) * multiplier).astype(x.dtype, copy=False)  # [T, D]


# --- normalisation --------------------------------------------------------------------------------------


def rms_norm(xp, x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis. (Zhang and Sennrich, RMSNorm, 2019.)

    `x` is [T, D] and `weight` [D]; returns [T, D] in the dtype of `x`. Or [n, T, d] and [d], for a norm of
    each head. As in Hugging Face's Llama the normalised value is rounded to that dtype before the weight is
    applied.
    """
    x32 = x.astype(xp.float32, copy=False)  # [T, D]
    mean_square = (x32 * x32).sum(axis=-1, keepdims=True) / x.shape[-1]  # [T, 1]
    normed = x32 / xp.sqrt(mean_square + eps)  # [T, D]
    return normed.astype(x.dtype, copy=False) * weight  # [T, D]


def rms_norm_plus_one(xp, x, weight, eps):
    """The same times 1 + weight, in float32 and rounded once: Gemma's. (Gemma Team, Gemma 2, 2024.)

    `x` is [T, D] and `weight` [D]; returns [T, D] in the dtype of `x`.
    """
    x32 = x.astype(xp.float32, copy=False)  # [T, D]
    mean_square = (x32 * x32).sum(axis=-1, keepdims=True) / x.shape[-1]  # [T, 1]
    gain = 1 + weight.astype(xp.float32, copy=False)  # [D]
    return (x32 / xp.sqrt(mean_square + eps) * gain).astype(x.dtype, copy=False)  # [T, D]


# --- projections ----------------------------------------------------------------------------------------


def matmul(xp, a, b):
    """a @ b with the sums in float32, rounded once to the dtype of `a`. [n, m] @ [m, k] -> [n, k]."""
    return xp.matmul(a, b, dtype=xp.float32).astype(a.dtype, copy=False)


def column_parallel(xp, x, w_r, bias_r=None):
    """This rank's columns of x @ w + bias, summed in float32 and rounded once: no communication.

    w = [ w_0 | w_1 | .. ], `x` [T, D] is the same on all ranks, `w_r` [D, n_r], `bias_r` [n_r].
    Returns [T, n_r].
    """
    y_r = xp.matmul(x, w_r, dtype=xp.float32)  # [T, n_r]
    y_r = y_r if bias_r is None else y_r + bias_r  # [T, n_r]
    return y_r.astype(x.dtype, copy=False)  # [T, n_r]


def row_parallel(xp, x_r, w_r):
    """This rank's term of the sum  x @ w = x_0 @ w_0 + x_1 @ w_1 + ..: an all-reduce must follow.

    `x_r` [T, n_r] are this rank's columns of x, `w_r` [n_r, D] the rows of w that go with them. A bias is
    not added here: added on each rank it would count once a rank. Returns [T, D].
    """
    return matmul(xp, x_r, w_r)  # [T, D]


def logits_partial(xp, x, w_r, softcap=None, scaling=1.0):
    """This rank's vocabulary columns of the logits, kept in float32: rounding would make ties.

    Not a term of a sum, in spite of the name: the ranks' columns are put side by side, by an all-gather.
    `x` is [n, D] and `w_r` [D, V_r]; returns float32 [n, V_r], divided by `scaling` (Granite Team, Granite
    3.0, 2024) and within `softcap` if there is one.
    """
    logits_r = xp.matmul(x, w_r, dtype=xp.float32)  # [n, V_r]
    logits_r = logits_r if scaling == 1 else logits_r / scaling  # [n, V_r]
    return logits_r if softcap is None else soft_cap(xp, logits_r, softcap)  # [n, V_r]


def soft_cap(xp, x, cap):
    """cap * tanh(x / cap): nearly x where that is small, and never beyond -cap and cap.

    Any shape. (Bello et al., 2016; Gemma Team, Gemma 2, 2024, section 2.)
    """
    return xp.tanh(x / cap) * cap


# --- rotary position embedding --------------------------------------------------------------------------


def rope_cos_sin(xp, positions, inverse_frequencies, attention_factor=1.0):
    """Cosine and sine of each position's angles, for both halves of a head as `apply_rope` wants them.

    `positions` int [T] and `inverse_frequencies` float32 [d/2]; returns float32 [T, d] twice: cosines of the
    d/2 angles and again, sines of them negated and as they are. Both are multiplied by `attention_factor`,
    so scores grow by its square. (YaRN, section 3.4.)
    """
    angles = positions.astype(xp.float32)[:, None] * inverse_frequencies[None, :]  # [T, d/2]
    cos, sin = xp.cos(angles) * attention_factor, xp.sin(angles) * attention_factor  # [T, d/2], [T, d/2]
    return xp.concatenate((cos, cos), axis=-1), xp.concatenate((-sin, sin), axis=-1)  # [T, d], [T, d]


def apply_rope(xp, x, cos, sin):
    """Turn the pairs (x[i], x[i + d/2]) of each head by its position's angles.

        turned[i]       = x[i] * cos[i]       - x[i + d/2] * sin[i]
        turned[i + d/2] = x[i + d/2] * cos[i] + x[i] * sin[i]

    This is the half-split ("rotate_half") layout of Hugging Face checkpoints. Meta's original files pair
    (x[2i], x[2i + 1]) instead: weights for the one with code for the other give fluent-looking garbage.

    `x` is [n, T, d] for n heads, `cos` and `sin` [T, d] from `rope_cos_sin`, which have the signs; returns
    [n, T, d] in the dtype of `x`.
    """
    x32 = x.astype(xp.float32, copy=False)  # [n, T, d]
    half = x.shape[-1] // 2
    partner = xp.concatenate((x32[..., half:], x32[..., :half]), axis=-1)  # [n, T, d]
    turned = x32 * cos + partner * sin  # [n, T, d]
    return turned.astype(x.dtype, copy=False)  # [n, T, d]


# --- attention ------------------------------------------------------------------------------------------


def split_heads(xp, qkv, heads, kv_heads):
    """Views of the joined projection as heads: q and k together [H_r + K_r, T, d], and v [K_r, T, d].

    `qkv` is [T, (H_r + 2 K_r) * d], with the columns of all q heads first, then k, then v. Queries and keys
    stay together because RoPE turns both alike.
    """
    per_head = qkv.reshape(qkv.shape[0], heads + 2 * kv_heads, -1)  # [T, H_r + 2 K_r, d]
    by_head = per_head.transpose(1, 0, 2)  # [H_r + 2 K_r, T, d]
    return by_head[: heads + kv_heads], by_head[heads + kv_heads :]  # [H_r + K_r, T, d], [K_r, T, d]


def causal_mask(xp, query_positions, first_key, stop_key, window=None):
    """Which keys each query may see: bool [T, S] for the keys at positions first_key .. stop_key - 1.

    A query at position i sees the keys j <= i, and with a sliding window only the last `window` of these,
    itself included: i - window < j. (Jiang et al., Mistral 7B, 2023, section 2.)
    """
    query = query_positions[:, None]  # [T, 1]
    key = xp.arange(first_key, stop_key)[None, :]  # [1, S]
    visible = key <= query  # [T, S]
    return visible if window is None else visible & (key > query - window)  # [T, S]


def attention_scores(xp, q, k, query_groups, mask=None, scale=None, softcap=None):
    """q . k / sqrt(d), and -inf where the mask says no.

    (Vaswani et al., Attention Is All You Need, 2017, section 3.2.1; Ainslie et al., GQA, 2023.)

    Parameters
    ----------
    q : [H_r, T, d]
    k : [K_r, S, d]
    query_groups : list of (start, stop)
        For each KV head the query heads that read it. The groups may be ragged, so nothing is reshaped to
        [K_r, G]: the loop goes over KV heads.
    mask : bool [T, S] or None if everything may be seen
    scale : float or None
        What else the products are multiplied with than 1 / sqrt(d).
    softcap : float or None
        See `soft_cap`.

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
        scores[start:stop] = products.reshape(stop - start, tokens, keys)
    scores *= 1 / math.sqrt(d) if scale is None else scale
    if softcap is not None:
        scores = soft_cap(xp, scores, softcap)  # [H_r, T, S]
    if mask is not None:
        # Not by adding -inf: a key that is no number must not reach the queries that do not see it.
        xp.copyto(scores, -xp.inf, where=~mask)
    return scores  # [H_r, T, S]


def softmax(xp, scores):
    """exp(s - max) / sum, over the last axis. Subtracting the maximum keeps exp from overflowing.

    `scores` is float32 [..., S] with at least one finite entry in each row; returns the same shape.
    """
    weights = scores - scores.max(axis=-1, keepdims=True)  # [..., S]
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights  # [..., S]


def attention_context(xp, probs, v, query_groups):
    """The mean of the values, weighted by the probabilities.

    `probs` float32 [H_r, T, S] is rounded to the dtype of `v` [K_r, S, d] first; `query_groups` as above.
    Returns the context of all heads side by side, as the output projection wants it: [T, H_r * d].
    """
    heads, tokens, keys = probs.shape
    d = v.shape[2]
    probs = probs.astype(v.dtype, copy=False)  # [H_r, T, S]
    context = xp.empty((heads, tokens, d), dtype=v.dtype)  # [H_r, T, d]
    for kv_head, (start, stop) in enumerate(query_groups):
        rows = probs[start:stop].reshape(-1, keys)  # [G * T, S]
        means = matmul(xp, rows, v[kv_head])  # [G * T, d]
        context[start:stop] = means.reshape(stop - start, tokens, d)
    return context.transpose(1, 0, 2).reshape(tokens, heads * d)  # [T, H_r * d]


# --- feed-forward ---------------------------------------------------------------------------------------


def swiglu(xp, gate_up):
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)). (Shazeer, GLU Variants, 2020.)

    `gate_up` is [T, 2 F_r], the gate columns first; returns [T, F_r] in the same dtype.
    """
    columns = gate_up.shape[-1] // 2
    gate = gate_up[:, :columns].astype(xp.float32, copy=False)  # [T, F_r]
    up = gate_up[:, columns:].astype(xp.float32, copy=False)  # [T, F_r]
    # Below -80 silu is 0 to any float32 sum it enters, and exp(-x) would overflow.
    silu = gate / (1 + xp.exp(-xp.maximum(gate, -80)))  # [T, F_r]
    return (silu * up).astype(gate_up.dtype, copy=False)  # [T, F_r]


def geglu(xp, gate_up):
    """gelu(gate) * up, with gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    (Hendrycks and Gimpel, GELU, 2016, section 2; Shazeer, GLU Variants, 2020.) `gate_up` is [T, 2 F_r], the
    gate columns first; returns [T, F_r] in the same dtype.
    """
    columns = gate_up.shape[-1] // 2
    gate = gate_up[:, :columns].astype(xp.float32, copy=False)  # [T, F_r]
    up = gate_up[:, columns:].astype(xp.float32, copy=False)  # [T, F_r]
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)  # [T, F_r]
    return (gate / 2 * (1 + xp.tanh(inner)) * up).astype(gate_up.dtype, copy=False)  # [T, F_r]
