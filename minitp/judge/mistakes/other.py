"""The common mistakes in activations, the residual stream, the embedding and the logits.

Each function yields (description, array) for the mistakes in some steps, computed in float64 from the inputs
that the engine really had. Shape letters are those of `trace.names`.
"""

from math import erf

import numpy as np

from minitp.judge.mistakes.ranks import gathered_mistakes, vocabulary_mistakes
from minitp.judge.mistakes.scores import other_caps
from minitp.oracle import ops


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
    exact = gate / 2 * (1 + np.vectorize(erf)(gate / 2**0.5))  # [T, F]
    is_gelu = wrong.reference.activation != "silu"
    yield (
        "gelu is exact (erf), not the tanh approximation" if is_gelu else "gelu in place of silu",
        exact * up,
    )
    yield from clamped(wrong, gate, up)


def clamped(wrong, gate, up):
    """Try an upper limit of gate [T, F], read from the elements that are wrong: where gate is larger."""
    found, activate = wrong.s("act"), ops.swiglu if wrong.reference.activation == "silu" else ops.geglu
    right = activate(gate, up)  # [T, F]
    if found.shape != right.shape:
        return
    off = np.abs(found - right) > 2e-2 * np.abs(right)  # [T, F]
    if not off.any() or off.all() or not (gate[off] > 0).all():
        return
    target = np.median(found[off] / up[off])
    low, high = 0.0, gate[off].min()
    for _ in range(60):  # activations increase above 0
        middle = (low + high) / 2
        is_below = activate(np.array([middle]), np.ones(1))[0] < target
        low, high = (middle, high) if is_below else (low, middle)
    yield f"gate is at most {low:.4g}: it is clamped", activate(np.minimum(gate, low), up)


def residual_mistakes(wrong):
    """Try mistakes in the addition to the residual stream."""
    x, out = wrong.stream(), wrong.s("out")  # [T, D] each
    added = wrong.s("post_norm") if wrong.reference.post_norms else out  # [T, D]
    scale = wrong.reference.residual_scale
    if wrong.block == "attn" and next_norm_reads_another_array(wrong, x + scale * added):
        yield "the addition is right, but the next norm reads the attention's output alone", scale * added
        yield "the addition is right, but the next norm reads the stream before it: a parallel block", x
    if wrong.block == "attn":
        yield "the addition may be right, but the next norm reads the MLP's output", wrong.s("out", "mlp")
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
    if wrong.block == "mlp":
        text = "the stream is that before the attention, whose output is lost"
        yield text, wrong.layer_input() + scale * added


def next_norm_reads_another_array(wrong, total):
    """Return whether the MLP's norm reads the wrong sum of attention, and its output joins the right one.

    Engines that do not record the sum give the input of the next norm in its place.

    Parameters
    ----------
    wrong : WrongStep
    total : float64 array [T, D]
        The right sum.
    """
    mlp, reference, found = wrong.of_block("mlp"), wrong.reference, wrong.s("residual")  # [T, D]
    if found.shape != total.shape or not mlp.is_recorded("residual") or not mlp.is_recorded("norm"):
        return False
    weight = wrong.w(f"{reference.mlp_norm}.weight") + reference.norm_offset  # [D]
    added = mlp.s("post_norm" if reference.post_norms else "out")  # [T, D]
    pairs = (
        (mlp.s("norm"), ops.rms_norm(found, weight, reference.eps)),
        (mlp.s("residual"), total + reference.residual_scale * added),
    )  # [T, D] each
    return all(x.shape == y.shape and np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y) for x, y in pairs)


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
    for cap, text in other_caps(reference.logits_cap):
        yield f"the logits have {text}", ops.soft_cap(plain / reference.logits_divisor, cap)
    for offset, words in ((1, "one before"), (-1, "next one")):
        yield (
            f"each token has the row of the output matrix of the {words}",
            np.roll(wrong.right(), offset, axis=-1),
        )
    if head is not None:
        yield "the output matrix is the embedding table, although they are not tied", ops.linear(x, table)
    yield from gathered_mistakes(wrong, wrong.right())
    stream = wrong.last_stream()[-len(x) :]  # [n, D]
    yield (
        "the input is the residual stream, not its norm",
        ops.linear(stream, table if head is None else head),
    )
