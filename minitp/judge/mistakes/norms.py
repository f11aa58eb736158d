"""The common mistakes in an RMSNorm: its weight, its eps, its input, and the mean of the squares.

They are (description, array), computed in float64 from the inputs that the engine really had. Shape letters
are those of `trace.names`.
"""

import numpy as np

from minitp.judge.mistakes.ranks import norm_over_part
from minitp.oracle import ops

NORM_TENSORS = {
    ("attn", "norm"): "input_layernorm.weight",
    ("attn", "q_norm"): "self_attn.q_norm.weight",
    ("attn", "k_norm"): "self_attn.k_norm.weight",
}
# The names of a layer's norms over the hidden size, and over a head.
STREAM_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
INPUTS = {"q_norm": "q", "k_norm": "k", "post_norm": "out"}
EPS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def norm_inputs(wrong):
    """Return the input of a norm, [T, D] or [n, T, d], and the name of its weight."""
    if wrong.step == "final_norm":
        rows = wrong.outside("final_norm").shape[0]
        return wrong.last_stream()[-rows:], "model.norm.weight"  # [n, D]
    x = wrong.s(INPUTS[wrong.step]) if wrong.step in INPUTS else wrong.stream()  # [T, D] or [n, T, d]
    if wrong.step == "post_norm":
        return x, f"{wrong.reference.post_norms[wrong.block]}.weight"
    return x, NORM_TENSORS.get((wrong.block, wrong.step), f"{wrong.reference.mlp_norm}.weight")


def norm_mistakes(wrong):
    """Try mistakes in an RMSNorm."""
    x, name = norm_inputs(wrong)
    reference, tensor = wrong.reference, wrong.w(name)
    eps, weight = reference.eps, tensor + reference.norm_offset  # one number, [D]
    mean = np.mean(x * x, axis=-1, keepdims=True)
    yield "the input, not normalized", x
    yield "the norm without its weight", ops.rms_norm(x, np.ones_like(weight), eps)
    swapped = "the weight is w, not 1 + w" if reference.norm_offset else "the weight is 1 + w, not w"
    yield swapped, ops.rms_norm(x, tensor + (1 - reference.norm_offset), eps)
    yield f"eps ({eps:g}) outside the root: x / (sqrt(mean(x^2)) + eps)", x / (np.sqrt(mean) + eps) * weight
    for other in EPS:
        if other != eps:
            yield f"eps is {other:g}, not {eps:g}", ops.rms_norm(x, weight, other)
            if other:
                text = f"eps is {other:g}, not {eps:g}, and outside the root: x / (sqrt(mean(x^2)) + eps)"
                yield text, x / (np.sqrt(mean) + other) * weight
    solved = fitted_eps(wrong, x * weight, mean)
    if solved > 0:
        yield f"eps is about {solved:.2g}, not {eps:g}", ops.rms_norm(x, weight, solved)
    if x.shape[-1] == reference.hidden_size:
        yield from norm_over_part(wrong, x, weight, eps)
    centered = x - np.mean(x, axis=-1, keepdims=True)
    yield "the mean is subtracted first, as in LayerNorm", ops.rms_norm(centered, weight, eps)
    sums = np.sum(x * x, axis=-1, keepdims=True)
    yield "divided by the root of the sum of squares, not of their mean", x / np.sqrt(sums + eps) * weight
    for text, other in weights_of_other_norms(wrong, name):
        yield text, ops.rms_norm(x, other + reference.norm_offset, eps)
    for text, other in inputs_of_other_norms(wrong):
        yield text, ops.rms_norm(other, weight, eps)
    if wrong.step in ("q_norm", "k_norm"):
        over_heads = np.sqrt(np.mean(mean, axis=0) + eps)  # [T, 1]
        yield "the mean of squares is over all heads, not over each", x / over_heads * weight


def fitted_eps(wrong, direction, mean):
    """Return the eps with which x W / sqrt(mean + eps) is closest to the recorded norm, or NaN.

    `direction` is x W [.., D], and `mean` that of the squares of x [.., 1].
    """
    lengths = np.sum(direction * direction, axis=-1, keepdims=True)  # [.., 1]
    factors = np.sum(wrong.s(wrong.step) * direction, axis=-1, keepdims=True) / lengths  # [.., 1]
    return float(np.median(factors**-2.0 - mean))


def weights_of_other_norms(wrong, name):
    """Yield (description, weight) of other norms with a weight of this size, this layer's norms first."""
    own = name.removesuffix(".weight")
    family = HEAD_NORMS if own in HEAD_NORMS else STREAM_NORMS
    layers = [wrong.layer, *wrong.other_layers] if wrong.block else wrong.other_layers[::-1]
    for layer in layers:
        for other in (own,) if own in family and layer != wrong.layer else family:
            tensor = wrong.w(f"{other}.weight", layer)
            if tensor is None or (other, layer) == (own, wrong.layer):
                continue
            where = other if layer == wrong.layer else f"layer {layer}" if other == own else None
            yield f"the weight is that of {where or f'layers.{layer}.{other}'}", tensor
    if wrong.block and own in STREAM_NORMS:
        yield "the weight is that of model.norm", wrong.outside_w("model.norm.weight")


def inputs_of_other_norms(wrong):
    """Yield (description, array) of other inputs that a norm may have by mistake."""
    if wrong.step == "post_norm":
        text = "the output is added to the stream before the norm, not after it: norm(x + out)"
        yield text, wrong.stream() + wrong.s("out")  # [T, D]
    if wrong.step in ("q_norm", "k_norm"):
        frequencies, factor = wrong.reference.rotations[wrong.layer]
        x = wrong.s(INPUTS[wrong.step])  # [n, T, d]
        rotated = ops.rope(x, wrong.positions, frequencies, factor)  # [n, T, d]
        yield "the norm follows RoPE, and should precede it", rotated
    if (wrong.block, wrong.step) == ("mlp", "norm"):
        yield "the input is the attention's output, without the stream", wrong.s("out", "attn")
        yield "the input is the stream before the attention, as in a parallel block", wrong.layer_input()
    if (wrong.block, wrong.step) == ("attn", "norm") and wrong.layer > 0:
        yield "the input is that of the layer before", wrong.layer_input(wrong.layer - 1)
