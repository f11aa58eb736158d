"""The oracle's operations in float64, written from the papers' formulas and without the package's code.

In places they compute the same numbers in another way than the package's `ops`: RoPE rotates complex numbers,
and attention is computed head by head.

    T tokens    S keys    D hidden    H query heads    K key/value heads    d head_dim    F FFN columns
"""

import numpy as np

ROPE_THETA = 10000.0


def float64(array):
    """Return `array`, of any dtype and shape, in float64."""
    return np.asarray(array, dtype=np.float64)


def embed(token_ids, table):
    """Return row `token_ids[t]` of `table` for each t: int [T], [V, D] -> [T, D]."""
    rows = []
    for token in token_ids:
        if not 0 <= token < len(table):
            raise ValueError(f"token id {token} is outside the vocabulary of {len(table)}")
        rows.append(float64(table[token]))  # [D]
    return np.stack(rows)  # [T, D]


def rms_norm(x, weight, eps):
    """Compute x_i g_i / sqrt(1/D sum_j x_j^2 + eps): [.., D], [D] -> [.., D] (Zhang and Sennrich, 2019)."""
    x = float64(x)  # [T, D]
    squares = np.einsum("...i,...i->...", x, x) / x.shape[-1]  # [T]
    return x * np.power(squares + eps, -0.5)[..., None] * float64(weight)  # [T, D]


def linear(x, weight, bias=None):
    """Compute y = x W^T + b: [T, in], [out, in], [out] -> [T, out]."""
    y = np.inner(float64(x), float64(weight))  # [T, out]
    return y if bias is None else y + float64(bias)  # [T, out]


def rope_inverse_frequencies(config):
    """Return theta_i, the RoPE angle per position of pair i, for the dict in config.json: [R/2].

    theta_i = base^(-2i/R) (Su et al., RoFormer, 2021, section 3.2.2), where R is the head size d times
    `partial_rotary_factor`, rounded down. `linear` divides all of them by
    `factor` (Chen et al., Position Interpolation, 2023, section 2.3). `llama3` divides those with wavelengths
    above L / low_freq_factor, keeps those with wavelengths below L / high_freq_factor, and interpolates in
    between; L is original_max_position_embeddings (apply_scaling in Meta's llama-models). `yarn` does so with
    a ramp from the pair that rotates beta_fast times within L to the pair that rotates beta_slow times (Peng
    et al., YaRN, 2023, section 3.2). `longrope` divides each theta_i by its own factor, the one for contexts
    up to L (Ding et al., LongRoPE, 2024).

    Raises
    ------
    ValueError
        for any other rope_type.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or ROPE_THETA
    kind = rope.get("rope_type") or rope.get("type") or "default"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = int(head_dim * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1))
    plain = np.power(float(theta), -np.arange(0, rotated, 2) / rotated)  # [R/2]
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / rope["factor"]  # [R/2]
    if kind in longrope_names(config):
        return plain / np.array(rope["short_factor"])  # [R/2]
    if kind == "yarn":
        share = yarn_share(rope, plain, original_length(config, rope), float(theta))  # [R/2]
        return plain * (1 - share + share / rope["factor"])  # [R/2]
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r}: expected default, linear, llama3, yarn or longrope")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = original_length(config, rope)
    wavelength = 2 * np.pi / plain  # [R/2]
    shrunk = plain / rope["factor"]  # [R/2]
    smooth = (length / wavelength - low) / (high - low)  # [R/2]
    mixed = (1 - smooth) * shrunk + smooth * plain  # [R/2]
    return np.select([wavelength > length / low, wavelength < length / high], [shrunk, plain], mixed)  # [R/2]


def original_length(config, rope):
    """Return L, the context length that the model had before its RoPE was extended."""
    return config.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]


def longrope_names(config):
    """Return the `rope_type` values that mean longrope in this config; old Phi-3 files use su or yarn."""
    return ("longrope", "su", "yarn") if config.get("model_type") == "phi3" else ("longrope",)


def yarn_share(rope, plain, length, theta):
    """Return the fraction of each frequency, from 0 to 1, that is divided by `factor`: [R/2] -> [R/2]."""
    turns = np.array([rope.get("beta_fast") or 32, rope.get("beta_slow") or 1])
    # solve theta^(-i / n) L = 2 pi turns for i, the index of a pair; n = R/2
    ends = len(plain) * np.log(length / (2 * np.pi * turns)) / np.log(theta)  # [2]
    if rope.get("truncate", True):
        ends = np.array([np.floor(ends[0]), np.ceil(ends[1])])
    ends = np.clip(ends, [0, -np.inf], [np.inf, 2 * len(plain) - 1])
    ends += [0, 0.001 * (ends[0] == ends[1])]
    return np.clip((np.arange(len(plain)) - ends[0]) / np.diff(ends), 0, 1)  # [R/2]


def attention_factor(config):
    """Return the factor by which RoPE multiplies q and k, for the dict in config.json.

    It is 1 except for yarn and longrope. If config.json does not give it, it is 0.1 ln(factor) + 1 for yarn
    (YaRN, section 3.4), or, with mscale and mscale_all_dim, the ratio of two such numbers with these in front
    of the logarithm. For longrope it is sqrt(1 + ln(s) / ln(L)), where s is the extended context length
    divided by L.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("yarn", *longrope_names(config)):
        return 1.0
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    length = original_length(config, rope)
    if kind in longrope_names(config):
        stretch = rope.get("factor") or config["max_position_embeddings"] / length
        return np.sqrt(1 + max(0, np.log(stretch)) / np.log(length))
    stretch = 0.1 * max(0, np.log(rope["factor"]))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (1 + rope["mscale"] * stretch) / (1 + rope["mscale_all_dim"] * stretch)
    return 1 + stretch


def rope(x, positions, inverse_frequencies, factor=1.0):
    """Multiply the complex numbers x[i] + j x[i + R/2] by factor e^(j m theta_i) at position m.

    x [n, T, d], positions int [T], inverse_frequencies [R/2] -> [n, T, d]. (RoFormer, section 3.2.2, with the
    pairs of Hugging Face's checkpoints: each element of the first half of the R dimensions that are rotated
    with one of their second half.) The d - R dimensions after them are copied.
    """
    pairs = len(inverse_frequencies)
    first, second, rest = np.split(float64(x), [pairs, 2 * pairs], axis=-1)  # [n, T, R/2] twice, [n, T, d-R]
    rotation = factor * np.exp(1j * np.multiply.outer(positions, inverse_frequencies))  # complex [T, R/2]
    turned = (first + 1j * second) * rotation  # complex [n, T, R/2]
    return np.concatenate((turned.real, turned.imag, rest), axis=-1)  # [n, T, d]


def causal_mask(query_positions, key_positions, window=None):
    """Return True where query i sees key j: int [T], int [S] -> bool [T, S].

    A query sees a key if 0 <= i - j and, with a window W, i - j < W (Jiang et al., Mistral 7B, 2023,
    section 2).
    """
    distance = np.subtract.outer(query_positions, key_positions)  # [T, S]
    return (distance >= 0) & (distance < (np.inf if window is None else window))  # [T, S]


def soft_cap(x, cap):
    """Compute cap tanh(x / cap), any shape, as cap (1 - 2 / (e^(2 x / cap) + 1)) (Gemma 2, 2024)."""
    return cap - 2 * cap / (np.exp(2 * np.clip(float64(x) / cap, -350, 350)) + 1)  # like x


def scores(q, k, mask, root=None, cap=None):
    """Compute q_h . k_(h // (H / K)) / root, soft-capped with `cap`, and -inf where query t cannot see key s.

    The default root is sqrt(d), and by default there is no cap. q [H, T, d], k [K, S, d], mask bool [T, S] ->
    [H, T, S]. (Vaswani et al., 2017, equation 1; query heads share
    keys and values as in Ainslie et al., GQA, 2023, section 2.2.)
    """
    group = len(q) // len(k)
    per_head = []
    for h, query in enumerate(float64(q)):
        dots = np.inner(query, float64(k[h // group]))  # [T, S]
        dots = dots / (root or np.sqrt(q.shape[-1]))  # [T, S]
        per_head.append(np.where(mask, dots if cap is None else soft_cap(dots, cap), -np.inf))  # [T, S]
    return np.stack(per_head)  # [H, T, S]


def softmax(x):
    """Compute e^(x_i) / sum_j e^(x_j) over the last axis, any shape, with max(x) subtracted from all x."""
    terms = np.exp(float64(x) - np.amax(float64(x), axis=-1, keepdims=True))  # like x
    return terms / terms.sum(axis=-1, keepdims=True)  # like x


def context(probs, v):
    """Compute sum_j p_hij v_(h // (H / K))j and concatenate the heads: [H, T, S], [K, S, d] -> [T, H * d].

    (Vaswani et al., 2017, equation 1 and section 3.2.2.)
    """
    group = len(probs) // len(v)
    return np.hstack([float64(p) @ float64(v[h // group]) for h, p in enumerate(probs)])  # [T, H * d]


def attention(q, k, v, mask):
    """Compute softmax(scores) v: q [H, T, d], k and v [K, S, d], mask bool [T, S] -> [T, H * d]."""
    return context(softmax(scores(q, k, mask)), v)  # [T, H * d]


def swiglu(gate, up):
    """Compute gate * sigma(gate) * up, all [T, F] (Shazeer, GLU Variants, 2020, equation 6).

    sigma(x) is computed as e^(-ln(e^0 + e^-x)), so that no exponential overflows.
    """
    gate = float64(gate)  # [T, F]
    return gate * np.exp(-np.logaddexp(0, -gate)) * float64(up)  # [T, F]


def geglu(gate, up):
    """Compute gelu(gate) * up, all [T, F].

    gelu(x) is approximated by x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), where 1/2 (1 + tanh(y)) =
    sigma(2 y). (Hendrycks and Gimpel, 2016, section 2.)
    """
    gate = float64(gate)  # [T, F]
    y = np.sqrt(8 / np.pi) * (gate + 0.044715 * np.power(gate, 3))  # [T, F]
    return gate * np.exp(-np.logaddexp(0, -y)) * float64(up)  # [T, F]


def choose_experts(logits, per_token):
    """Return True for the experts with the largest logits: [T, E] -> bool [T, E].

    Of equal ones, those with the lower number are chosen.
    """
    chosen = np.zeros(logits.shape, bool)  # [T, E]
    for t, row in enumerate(logits):  # [E]
        chosen[t, sorted(range(len(row)), key=lambda e: (-float(row[e]), e))[:per_token]] = True
    return chosen


def route(logits, per_token, normalized=True):
    """Return the weight of each expert for each token, 0 for most: [T, E] -> [T, E].

    The weights of the chosen experts are the softmax over all experts, and in most models that is divided by
    its sum over the chosen ones. (Jiang et al., Mixtral of Experts, 2024, section 2.1.) Some Qwen3 models do
    not divide it (`norm_topk_prob` is false).
    """
    shares = np.where(choose_experts(logits, per_token), softmax(logits), 0)  # [T, E]
    return shares / shares.sum(axis=-1, keepdims=True) if normalized else shares  # [T, E]
