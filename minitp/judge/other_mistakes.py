"""The common mistakes in norms, projections, activations, the residual stream, the embedding and the logits.

Each function yields (description, array) for the mistakes in some steps, computed in float64 from the inputs
that the engine really had. Shape letters are those of `trace.names`.
"""

import numpy as np

from minitp.compare.heads import half_split, interleaved
from minitp.judge.expert_mistakes import expert_mistakes
from minitp.judge.rank_mistakes import (
    gathered_mistakes,
    norm_over_part,
    part_mistakes,
    partial_sum_mistakes,
    sum_mistakes,
    vocabulary_mistakes,
)
from minitp.oracle import ops

NORM_TENSORS = {
    ("attn", "norm"): "input_layernorm.weight",
    ("attn", "q_norm"): "self_attn.q_norm.weight",
    ("attn", "k_norm"): "self_attn.k_norm.weight",
}


def norm_mistakes(wrong):
    """Try mistakes in an RMSNorm."""
    reference, inputs = wrong.reference, {"q_norm": "q", "k_norm": "k", "post_norm": "out"}
    if wrong.step == "final_norm":
        rows = wrong.outside("final_norm").shape[0]
        x, name = wrong.last_stream()[-rows:], "model.norm.weight"  # [n, D]
        tensor = wrong.w(name)
    else:
        x = wrong.s(inputs[wrong.step]) if wrong.step in inputs else wrong.stream()  # [T, D] or [n, T, d]
        name = NORM_TENSORS.get((wrong.block, wrong.step), f"{reference.mlp_norm}.weight")
        if wrong.step == "post_norm":
            name = f"{reference.post_norms[wrong.block]}.weight"
        tensor = wrong.w(name)
    eps, weight = reference.eps, tensor + reference.norm_offset  # one number, [D]
    mean = np.mean(x * x, axis=-1, keepdims=True)
    yield "the input, not normalized", x
    yield "the norm without its weight", ops.rms_norm(x, np.ones_like(weight), eps)
    text = "the weight is w, not 1 + w" if reference.norm_offset else "the weight is 1 + w, not w"
    yield text, ops.rms_norm(x, tensor + (1 - reference.norm_offset), eps)
    yield f"eps ({eps:g}) outside the root: x / (sqrt(mean(x^2)) + eps)", x / (np.sqrt(mean) + eps) * weight
    for other_eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-3):
        if other_eps != eps:
            yield f"eps is {other_eps:g}, not {eps:g}", ops.rms_norm(x, weight, other_eps)
    if x.shape[-1] == reference.hidden_size:
        yield from norm_over_part(wrong, x, weight, eps)
    centered = x - np.mean(x, axis=-1, keepdims=True)
    yield "the mean is subtracted first, as in LayerNorm", ops.rms_norm(centered, weight, eps)
    sums = np.sum(x * x, axis=-1, keepdims=True)
    yield "divided by the root of the sum of squares, not of their mean", x / np.sqrt(sums + eps) * weight
    if wrong.block:
        for i in wrong.other_layers:
            yield (
                f"the weight is that of layer {i}",
                ops.rms_norm(x, wrong.w(name, i) + reference.norm_offset, eps),
            )


PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
}
OUTPUTS = {"attn": ("context", "self_attn.o_proj"), "mlp": ("act", "mlp.down_proj")}


def projection_mistakes(wrong):
    """Try mistakes in a product with a weight of the checkpoint."""
    is_output = wrong.step in ("out", "out_partial")
    if is_output and wrong.reference.experts and wrong.block == "mlp":
        yield from expert_mistakes(wrong)
        return
    names = PROJECTIONS | {"router": f"{wrong.reference.expert_block}.gate"}
    source, name = OUTPUTS[wrong.block] if is_output else ("norm", names[wrong.step])
    x, weight, bias = wrong.s(source), wrong.w(f"{name}.weight"), wrong.w(f"{name}.bias")
    shape = wrong.s(wrong.step).shape  # [n, T, d] or [T, out]
    size = shape[0] * shape[2] if len(shape) == 3 else shape[1]

    def result(x, weight, bias):
        if (
            weight is None
            or (x.shape[-1], size) != weight.shape[::-1]
            or (bias is not None and len(bias) != size)
        ):
            return None
        y = ops.linear(x, weight, bias)  # [T, out]
        return np.stack(np.split(y, shape[0], axis=-1)) if len(shape) == 3 else y

    if is_output:
        yield from partial_sum_mistakes(wrong, x, name, result)
        bias = None
    else:
        yield from part_mistakes(wrong, x, name, len(shape) == 3, result)
    if bias is not None:
        yield "the bias is left out", result(x, weight, None)
        yield "the bias is added twice", result(x, weight, 2 * bias)
    if weight.shape[0] == weight.shape[1]:
        yield "the weight is transposed", result(x, weight.T, bias)
    siblings = [other for other in PROJECTIONS if other != wrong.step and not is_output]
    for other in siblings:
        if wrong.w(f"{PROJECTIONS[other]}.weight") is not None:
            yield (
                f"the weight is that of {other}: {PROJECTIONS[other]}",
                result(x, wrong.w(f"{PROJECTIONS[other]}.weight"), wrong.w(f"{PROJECTIONS[other]}.bias")),
            )
    for i in wrong.other_layers:
        yield (
            f"the weight is that of layer {i}",
            result(x, wrong.w(f"{name}.weight", i), wrong.w(f"{name}.bias", i)),
        )
    yield "the input is the residual stream, not its norm", result(wrong.stream(), weight, bias)
    if len(shape) == 3:
        right_heads, pairs = result(x, weight, bias), 2 * len(wrong.reference.rotations[0][0])
        text = "the rows of each head are in the other RoPE layout: {}"
        yield text.format("interleaved, not half-split"), interleaved(right_heads, pairs)
        yield text.format("half-split, not interleaved"), half_split(right_heads, pairs)
        yield "the heads are in the reverse order", right_heads[::-1]
        flat = np.concatenate(right_heads, axis=-1)  # [T, n d]
        by_dimension = flat.reshape(len(flat), shape[2], shape[0])  # [T, d, n]
        yield "the rows are read as [d, heads], not [heads, d]", by_dimension.transpose(2, 0, 1)


def output_mistakes(wrong):
    """Try mistakes in the sum over the ranks, and if there is one rank, in the product."""
    yield from sum_mistakes(wrong)
    if not wrong.other_ranks:
        yield from projection_mistakes(wrong)


def activation_mistakes(wrong):
    """Try mistakes in the activation."""
    gate, up = wrong.s("gate"), wrong.s("up")  # [T, F] each
    sigmoid = 1 / (1 + np.exp(-gate))  # [T, F]
    erf_like = 1 / (1 + np.exp(-1.702 * gate))  # [T, F]
    tanh_gelu = ops.geglu(gate, np.ones_like(up))  # [T, F]
    yield "gate and up are swapped: act(up) * gate", ops.swiglu(up, gate)
    yield "gelu in place of silu", tanh_gelu * up
    yield "silu in place of gelu", ops.swiglu(gate, up)
    yield "relu in place of the activation", np.maximum(gate, 0) * up
    yield "quick gelu, x sigmoid(1.702 x), in place of the activation", gate * erf_like * up
    yield "sigmoid in place of silu", sigmoid * up
    yield "no activation: gate * up", gate * up
    yield "up is left out: act(gate)", ops.swiglu(gate, np.ones_like(up))
    yield "up is left out: act(gate)", tanh_gelu
    yield "a sum in place of the product: act(gate) + up", ops.swiglu(gate, np.ones_like(up)) + up


def residual_mistakes(wrong):
    """Try mistakes in the addition to the residual stream."""
    x, out = wrong.stream(), wrong.s("out")  # [T, D] each
    added = wrong.s("post_norm") if wrong.reference.post_norms else out  # [T, D]
    scale = wrong.reference.residual_scale
    yield "the stream is left out", scale * added
    yield "the block's output is left out", x
    yield "the stream is added twice", 2 * x + scale * added
    yield "the block's output is added twice", x + 2 * scale * added
    yield "the output is subtracted", x - scale * added
    yield "the norm of the stream is added, not the stream", wrong.s("norm") + scale * added
    if scale != 1:
        yield f"the residual multiplier, {scale:g}, is left out", x + added
    if wrong.reference.post_norms:
        yield "the norm after the block is left out", x + out


def embedding_mistakes(wrong):
    """Try mistakes in the embedding."""
    table = wrong.whole("model.embed_tokens.weight")  # [V, D]
    ids, scale = wrong.outside("tokens").astype(int), wrong.reference.embedding_scale  # [T], one number
    if scale != 1:
        yield f"the scale of the embedding, {scale:g}, is left out", table[ids]
        yield "the embedding is scaled twice", table[ids] * scale * scale
    yield from vocabulary_mistakes(wrong, table, ids, scale)
    yield "the embedding is scaled by the root of the hidden size", table[ids] * table.shape[1] ** 0.5
    yield "the rows are those of the next token id", table[(ids + 1) % len(table)] * scale
    yield "the rows are those of the token id before", table[ids - 1] * scale


def logits_mistakes(wrong):
    """Try mistakes in the logits."""
    reference = wrong.reference
    x = wrong.outside("final_norm")  # [n, D]
    table = wrong.whole("model.embed_tokens.weight")  # [V, D]
    head = wrong.whole("lm_head.weight")  # [V, D], or None
    plain = ops.linear(x, table if head is None else head)  # [n, V]
    if reference.logits_divisor != 1:
        yield f"the division by logits_scaling, {reference.logits_divisor:g}, is left out", plain
        yield "the logits are multiplied by logits_scaling", plain * reference.logits_divisor
    if reference.logits_cap is not None:
        yield "the soft cap of the logits is left out", plain
    if head is not None:
        yield "the output matrix is the embedding table, although they are not tied", ops.linear(x, table)
    yield from gathered_mistakes(wrong, wrong.right())
    stream = wrong.last_stream()[-len(x) :]  # [n, D]
    yield (
        "the input is the residual stream, not its norm",
        ops.linear(stream, table if head is None else head),
    )
