"""The common mistakes in a product with a weight of the checkpoint.

Each function yields (description, array) for the mistakes in some steps, computed in float64 from the inputs
that the engine really had. Shape letters are those of `trace.names`.
"""

import numpy as np

from minitp.compare.heads import half_split, interleaved
from minitp.judge.mistakes.experts import expert_mistakes
from minitp.judge.mistakes.joined import joined_rows
from minitp.judge.mistakes.orders import in_another_order
from minitp.judge.mistakes.ranks import part_mistakes, partial_sum_mistakes, sum_mistakes
from minitp.oracle import ops

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
}
OUTPUTS = {"attn": ("context", "self_attn.o_proj"), "mlp": ("act", "mlp.down_proj")}


OUTPUT_STEPS = ("out", "out_partial")


def projection_name(wrong):
    """Return the name of the module whose weight a step is multiplied with, without its layer."""
    if wrong.step in OUTPUT_STEPS:
        return OUTPUTS[wrong.block][1]
    return (PROJECTIONS | {"router": f"{wrong.reference.expert_block}.gate"})[wrong.step]


def projection_inputs(wrong):
    """Return the input [T, in], the weight [out, in] and the bias [out] of a projection, and its shape.

    The shape is that of the recorded step, [n, T, d] or [T, out]. A partial sum has no bias.
    """
    name = projection_name(wrong)
    x = wrong.s(OUTPUTS[wrong.block][0] if wrong.step in OUTPUT_STEPS else "norm")  # [T, in]
    bias = None if wrong.step == "out_partial" else wrong.w(f"{name}.bias")  # [out]
    return x, wrong.w(f"{name}.weight"), bias, wrong.s(wrong.step).shape


def projection_mistakes(wrong):
    """Try mistakes in a product with a weight of the checkpoint."""
    is_output = wrong.step in OUTPUT_STEPS
    if is_output and wrong.reference.experts and wrong.block == "mlp":
        yield from expert_mistakes(wrong)
        return
    name, (x, weight, bias, shape) = projection_name(wrong), projection_inputs(wrong)
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
    else:
        yield from part_mistakes(wrong, x, name, len(shape) == 3, result)
    if bias is not None:
        yield "the bias is left out", result(x, weight, None)
        yield "the bias is added twice", result(x, weight, 2 * bias)
        for text, other in other_biases(wrong, name):
            yield text, result(x, weight, other)
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
    if wrong.step in PROJECTIONS:
        for text, *rows in joined_rows(wrong, wrong.step):
            yield text, result(x, *rows)
    if is_output and wrong.block == "attn":
        heads = x.reshape(len(x), -1, wrong.reference.head_dim)  # [T, H_r, d]
        yield (
            "the heads of the input are in the reverse order",
            result(heads[:, ::-1].reshape(x.shape), weight, bias),
        )
        by_dimension = heads.swapaxes(1, 2).reshape(x.shape)  # [T, d H_r]
        yield "the columns are those of [d, heads], not of [heads, d]", result(by_dimension, weight, bias)
    if len(shape) == 3:
        right_heads, pairs = result(x, weight, bias), 2 * len(wrong.reference.rotations[0][0])
        text = "the rows of each head are in the other RoPE layout: {}"
        yield text.format("interleaved, not half-split"), interleaved(right_heads, pairs)
        yield text.format("half-split, not interleaved"), half_split(right_heads, pairs)
        yield "the heads are in the reverse order", right_heads[::-1]
        flat = np.concatenate(right_heads, axis=-1)  # [T, n d]
        by_dimension = flat.reshape(len(flat), shape[2], shape[0])  # [T, d, n]
        yield "the rows are read as [d, heads], not [heads, d]", by_dimension.transpose(2, 0, 1)
        yield from in_another_order(wrong.s(wrong.step), right_heads, 0, "head")
        if wrong.step == "v":
            rotation = wrong.reference.rotations[wrong.layer]
            yield "the values are rotated, too", ops.rope(right_heads, wrong.positions, *rotation)
    yield from nan_rows(wrong.s(wrong.step), wrong.right())


def output_mistakes(wrong):
    """Try mistakes in the sum over the ranks, and if there is one rank, in the product."""
    yield from sum_mistakes(wrong)
    if not wrong.other_ranks:
        yield from projection_mistakes(wrong)


def other_biases(wrong, name):
    """Yield (description, bias [out]) of the other projections of this layer, and of other layers."""
    for other, tensor in PROJECTIONS.items():
        bias = wrong.w(f"{tensor}.bias")
        if tensor != name and bias is not None:
            yield f"the bias is that of {other}: {tensor}", bias
    for i in wrong.other_layers:
        yield f"the bias is that of layer {i}", wrong.w(f"{name}.bias", i)


def nan_rows(found, right):
    """Try rows of the weight or bias that are not numbers: found and right [T, out] or [n, T, d]."""
    if found.shape != right.shape or not np.isfinite(right).all():
        return
    token_axis = right.ndim - 2
    broken = ~np.isfinite(found).any(axis=token_axis, keepdims=True)  # [1, out] or [n, 1, d]
    rows = np.flatnonzero(broken)
    if 0 < len(rows) < broken.size:
        listed = (
            f"row {rows[0]} of the weight has"
            if len(rows) == 1
            else (f"{len(rows)} rows of the weight have, of which the first is row {rows[0]},")
        )
        yield f"{listed} a NaN or an infinity", np.where(broken, found, right)
