"""Roundings to a smaller dtype than the engine's, of the inputs, weights or intermediate results of a step.

Each operation is repeated in float64 with a function `low(name, array)` for what an engine may round.
"""

import ml_dtypes
import numpy as np

from minitp.judge.mistakes.norms import norm_inputs
from minitp.judge.mistakes.projections import projection_inputs
from minitp.judge.mistakes.rope import rope_input
from minitp.judge.mistakes.scores import Scores, heads_of
from minitp.oracle import ops


def to(dtype):
    """Return a function that rounds an array to a dtype and returns it in float64."""
    return lambda x: x.astype(np.float32).astype(dtype).astype(np.float64)


def to_8_bits(x):
    """Round each row of an array to 255 equally spaced numbers from -max to max."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127  # [.., 1]
    return np.round(x / np.where(scale == 0, 1, scale)) * scale  # like x


LARGEST = 1 << 26  # elements of a weight; the rounding of larger ones, such as output matrices, takes minutes
IN_16_BITS = {"bfloat16": to(ml_dtypes.bfloat16), "float16": to(np.float16)}
IN_8_BITS = {
    "float8_e4m3fn": to(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": to(ml_dtypes.float8_e5m2),
    "8 bits with a scale for each row": to_8_bits,
}


def rounding_mistakes(wrong):
    """Try roundings in an operation; to 16 bits only if the engine computes in more."""
    operation = OPERATIONS.get(wrong.step)
    if operation is None or is_mixture(wrong):
        return
    dtype = wrong.case.recording.dtype
    in_16_bits, stored = (IN_16_BITS, lambda x: x) if dtype.itemsize > 2 else ({}, to(dtype))
    names = []

    def note(name, array):
        if name not in names:
            names.append(name)
        return array

    note("the result", operation(wrong, note))
    ends = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names) + 1)]
    for choice in (names[i:j] for i, j in sorted(ends, key=lambda ends: ends[1] - ends[0])):
        roundings = in_16_bits | (IN_8_BITS if len(choice) == 1 else {})
        for name_of_dtype, rounded in roundings.items():

            def low(name, array, choice=choice, rounded=rounded):
                return stored(rounded(array)) if name in choice else array

            text = f"rounded to {name_of_dtype}: {' and '.join(choice)}"
            yield text, low("the result", operation(wrong, low))


def is_mixture(wrong):
    """Return whether a step is the output of experts, whose roundings are not tried."""
    return bool(wrong.reference.experts) and wrong.block == "mlp" and wrong.step in ("out", "out_partial")


def norm(wrong, low):
    x, name = norm_inputs(wrong)  # [T, D] or [n, T, d]
    weight = low("the weight", wrong.w(name) + wrong.reference.norm_offset)  # [D] or [d]
    x = low("the input", x)
    normalized = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + wrong.reference.eps)
    return low("the normalized numbers", normalized) * weight


def projection(wrong, low):
    x, weight, bias, shape = projection_inputs(wrong)
    y = ops.linear(low("the input", x), low_weight(low, weight), bias)  # [T, out]
    return np.stack(np.split(y, shape[0], axis=-1)) if len(shape) == 3 else y


def low_weight(low, weight):
    """Return a weight [out, in] with `low`, if it is not too large."""
    return low("the weight", weight) if weight.size <= LARGEST else weight


def output(wrong, low):
    if not wrong.other_ranks:
        return projection(wrong, low)
    bias = wrong.w({"attn": "self_attn.o_proj.bias", "mlp": "mlp.down_proj.bias"}[wrong.block])
    parts = [low("the partial sums", part) for part in wrong.of_ranks("out_partial")]  # [T, D] each
    return sum(parts) + (0 if bias is None else bias)  # [T, D]


def rope(wrong, low):
    frequencies, factor = wrong.reference.rotations[wrong.layer]
    x, pairs = low("the input", rope_input(wrong)), len(frequencies)  # [n, T, d]
    # Engines compute the angles in float32. With other ones, some roundings would go the other way.
    frequencies = low("the frequencies", frequencies.astype(np.float32).astype(np.float64))  # [R/2]
    angles = np.multiply.outer(wrong.positions.astype(np.float32), frequencies.astype(np.float32))  # [T, R/2]
    angles = low("the angles", angles.astype(np.float64))  # [T, R/2]
    cos, sin = (low("cosine and sine", factor * f(angles)) for f in (np.cos, np.sin))  # [T, R/2] each
    first, second, rest = np.split(x, [pairs, 2 * pairs], axis=-1)  # [n, T, R/2] twice, [n, T, d - R]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)


def probabilities(wrong, low):
    scores = Scores(wrong)
    q, k = (
        low("the queries and keys", wrong.s("q_rope")),
        low("the queries and keys", heads_of(wrong, "k_cache")),
    )
    raw = low("the scores", scores.raw(q=q, k=k))  # [H, T, S]
    masked = np.where(scores.mask, raw, -np.inf)  # [H, T, S]
    return masked if wrong.step == "scores" else ops.softmax(masked)


def context(wrong, low):
    probs, values = low("the probabilities", wrong.s("probs")), low("the values", heads_of(wrong, "v_cache"))
    return ops.context(probs, values)  # [T, H d]


def activation(wrong, low):
    activate = ops.swiglu if wrong.reference.activation == "silu" else ops.geglu
    gate, up = low("gate", wrong.s("gate")), wrong.s("up")  # [T, F] each
    active = low("the activation", activate(gate, np.ones_like(up)))  # [T, F]
    return active * low("up", up)


def residual(wrong, low):
    added = wrong.s("post_norm" if wrong.reference.post_norms else "out")  # [T, D]
    stream = low("the stream", wrong.stream())  # [T, D]
    return stream + low("the block's output", added) * wrong.reference.residual_scale


def embedding(wrong, low):
    table, ids = wrong.whole("model.embed_tokens.weight"), wrong.outside("tokens").astype(int)  # [V, D], [T]
    return low("the table", table[ids]) * low("its scale", np.float64(wrong.reference.embedding_scale))


def logits(wrong, low):
    head = wrong.whole("lm_head.weight")  # [V, D], or None
    head = wrong.whole("model.embed_tokens.weight") if head is None else head
    x, reference = low("the input", wrong.outside("final_norm")), wrong.reference  # [n, D]
    y = ops.linear(x, low_weight(low, head)) / reference.logits_divisor  # [n, V]
    return y if reference.logits_cap is None else ops.soft_cap(y, reference.logits_cap)


def cached(wrong, low):
    return wrong.right()  # [K, S, d]


OPERATIONS = {
    **dict.fromkeys(("norm", "q_norm", "k_norm", "post_norm", "final_norm"), norm),
    **dict.fromkeys(("q", "k", "v", "gate", "up", "router", "out_partial"), projection),
    "out": output,
    **dict.fromkeys(("q_rope", "k_rope"), rope),
    **dict.fromkeys(("scores", "probs"), probabilities),
    **dict.fromkeys(("k_cache", "v_cache"), cached),
    "context": context,
    "act": activation,
    "residual": residual,
    "embed": embedding,
    "logits": logits,
}
