"""The common mistakes in each operation. A mistake is named if it explains the recorded array up to rounding.

Each function below yields (description, array) for the mistakes in some steps, computed in float64 from the
inputs that the engine really had. Shape letters are those of `trace.names`.
"""

import numpy as np

from minitp.check.difference import difference_of
from minitp.check.result import ratio_of
from minitp.compare.heads import half_split, interleaved
from minitp.oracle import ops
from minitp.trace.names import full_name

ROOM = 4  # how much a mistake's own rounding may exceed the bound of the right operation


def explain(case, finding):
    """Return what the operation of a wrong Finding seems to compute instead; "" if nothing fits."""
    if finding.local is None:
        return ""
    array = case.recorded(finding.pass_name, finding.layer, finding.step).astype(np.float64)
    for text, value in mistakes(case, finding):
        if value is None or value.shape != array.shape:
            continue
        found = difference_of(array, np.asarray(value, np.float64))
        pairs = zip((found.relative, found.absolute), finding.bounds, strict=True)
        if max(ratio_of(error, ROOM * bound) for error, bound in pairs) <= 1:
            return text
    return ""


def mistakes(case, finding):
    """Yield (description, array) for all mistakes that are known in a step."""
    pass_ = next(one for one in case.recording.passes if one.name == finding.pass_name)
    wrong = WrongStep(case, pass_, finding.layer, finding.step)
    kind = finding.step.rpartition(".")[2]
    yield from OPERATIONS.get(kind, lambda _: ())(wrong)
    yield from scaled(wrong)


class WrongStep:
    """A wrong step, with access to its inputs and weights.

    Attributes
    ----------
    reference : Oracle
    block : str
        "attn", "mlp" or "" outside the layers.
    step : str
        The step's name within its block.
    """

    def __init__(self, case, pass_, layer, step):
        self.case, self.pass_, self.layer = case, pass_, layer
        self.reference = case.reference
        self.block, _, self.step = step.rpartition(".")

    def s(self, step, block=None):
        """Return a recorded step of this layer in float64, or the value that follows from its inputs."""
        prefix = self.block if block is None else block
        array = self.case.recorded(self.pass_.name, self.layer, f"{prefix}.{step}" if prefix else step)
        return np.asarray(getattr(array, "value", array), np.float64)

    def outside(self, step):
        """Return a recorded step outside the layers."""
        array = self.case.recorded(self.pass_.name, None, step)
        return np.asarray(getattr(array, "value", array), np.float64)

    def w(self, name, layer=None):
        """Return a tensor of this layer, or of another one, in float64; None if the model has none."""
        layer = self.layer if layer is None else layer
        tensor = self.case.weights.get(name if layer is None else f"model.layers.{layer}.{name}")
        return None if tensor is None else tensor.astype(np.float64)

    def stream(self):
        """Return the residual stream before this block."""
        if self.block == "mlp":
            return self.s("residual", "attn")  # [T, D]
        if self.layer == 0:
            return self.outside("embed")  # [T, D]
        name = full_name(self.pass_.name, self.layer - 1, "mlp.residual")
        array = self.case.recording.read(name) if name in self.case.recording else self.outside("embed")
        return array.astype(np.float64)  # [T, D]

    @property
    def positions(self):
        return self.outside("positions").astype(int)  # [T]

    @property
    def other_layers(self):
        return [i for i in range(self.case.plan.layers) if i != self.layer]


def scaled(wrong):
    """Try a factor, the last resort."""
    found, expected = wrong.s(wrong.step), right(wrong)
    if expected is None or expected.shape != found.shape or expected.size < 2:
        return
    finite = np.isfinite(expected) & np.isfinite(found)
    factor = np.vdot(expected[finite], found[finite]) / max(
        np.vdot(expected[finite], expected[finite]), 1e-300
    )
    yield f"the right result times {factor:.6g}", np.where(finite, factor * expected, expected)


def right(wrong):
    """Return the expected value of the wrong step, computed again."""
    replay, pass_, layer = wrong.case.replay, wrong.pass_, wrong.layer
    parts = {"attn": replay.attention, "mlp": replay.mlp}
    steps = parts[wrong.block](layer, pass_) if wrong.block else [*replay.before(pass_), *replay.after(pass_)]
    name = f"{wrong.block}.{wrong.step}" if wrong.block else wrong.step
    return next((expected.value for step, expected, _ in steps if step == name), None)


# --- norms ----------------------------------------------------------------------------------------------

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
        wrong.layer = wrong.case.plan.layers - 1
        x, name = wrong.s("residual", "mlp")[-rows:], "model.norm.weight"  # [n, D]
        wrong.layer = None
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
    other = "weight" if reference.norm_offset else "1 + weight"
    yield f"the norm with {other} as its weight", ops.rms_norm(x, tensor + (1 - reference.norm_offset), eps)
    yield f"eps ({eps:g}) outside the root: x / (sqrt(mean(x^2)) + eps)", x / (np.sqrt(mean) + eps) * weight
    for other_eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-3):
        if other_eps != eps:
            yield f"eps is {other_eps:g}, not {eps:g}", ops.rms_norm(x, weight, other_eps)
    centered = x - np.mean(x, axis=-1, keepdims=True)
    yield "the mean is subtracted first, as in LayerNorm", ops.rms_norm(centered, weight, eps)
    sums = np.sum(x * x, axis=-1, keepdims=True)
    yield "divided by the root of the sum of squares, not of their mean", x / np.sqrt(sums + eps) * weight
    if wrong.block and wrong.layer is not None:
        for i in wrong.other_layers:
            yield (
                f"the weight is that of layer {i}",
                ops.rms_norm(x, wrong.w(name, i) + reference.norm_offset, eps),
            )


# --- projections ----------------------------------------------------------------------------------------

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
    if wrong.step == "out":
        source, name = OUTPUTS[wrong.block]
        if wrong.reference.experts and wrong.block == "mlp":
            return
    else:
        source, name = "norm", PROJECTIONS[wrong.step]
    x, weight, bias = wrong.s(source), wrong.w(f"{name}.weight"), wrong.w(f"{name}.bias")
    shape = wrong.s(wrong.step).shape  # [n, T, d] or [T, out]
    size = shape[0] * shape[2] if len(shape) == 3 else shape[1]

    def result(x, weight, bias):
        if weight is None or (x.shape[-1], size) != weight.shape[::-1]:
            return None
        y = ops.linear(x, weight, bias)  # [T, out]
        return np.stack(np.split(y, shape[0], axis=-1)) if len(shape) == 3 else y

    if bias is not None:
        yield "the bias is left out", result(x, weight, None)
        yield "the bias is added twice", result(x, weight, 2 * bias)
    if weight.shape[0] == weight.shape[1]:
        yield "the weight is transposed", result(x, weight.T, bias)
    siblings = [other for other in PROJECTIONS if other != wrong.step and wrong.step != "out"]
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
        right_heads, pairs = result(x, weight, bias), 2 * len(wrong.reference.inverse_frequencies)
        text = "the rows of each head are in the other RoPE layout: {}"
        yield text.format("interleaved, not half-split"), interleaved(right_heads, pairs)
        yield text.format("half-split, not interleaved"), half_split(right_heads, pairs)
        yield "the heads are in the reverse order", right_heads[::-1]
        flat = np.concatenate(right_heads, axis=-1)  # [T, n d]
        by_dimension = flat.reshape(len(flat), shape[2], shape[0])  # [T, d, n]
        yield "the rows are read as [d, heads], not [heads, d]", by_dimension.transpose(2, 0, 1)


# --- attention ------------------------------------------------------------------------------------------


def rope_mistakes(wrong):
    """Try mistakes in RoPE."""
    reference, part = wrong.reference, wrong.step[0]
    x = wrong.s(f"{part}_norm" if reference.norms_heads else part)  # [n, T, d]
    at, frequencies, factor = wrong.positions, reference.inverse_frequencies, reference.attention_factor
    pairs = 2 * len(frequencies)

    def turned(by, frequencies=frequencies, factor=factor):
        return ops.rope(x, by, frequencies, factor)  # [n, T, d]

    if at[0] > 0:
        yield "the positions begin at 0 in this pass", turned(at - at[0])
    yield "not rotated", x
    in_pairs = interleaved(ops.rope(half_split(x, pairs), at, frequencies, factor), pairs)  # [n, T, d]
    yield "rotated in pairs (x[2i], x[2i+1]), not (x[i], x[i+d/2]): the other RoPE layout", in_pairs
    yield "rotated in the opposite direction", turned(-at)
    yield "the positions are one too large", turned(at + 1)
    yield "the positions are one too small", turned(at - 1)
    yield "all tokens have the first position", turned(np.full_like(at, at[0]))
    yield "rotated twice", ops.rope(turned(at), at, frequencies, factor)
    if factor != 1:
        yield "without the attention factor", turned(at, factor=1.0)
    plain = [2 * i / pairs for i in range(pairs // 2)]
    thetas = {float(wrong.case.recording.metadata.config.rope.rope_theta), 1e4, 1e5, 5e5, 1e6}
    for theta in sorted(thetas):
        other = np.array([theta**-exponent for exponent in plain])  # [R/2]
        if not np.allclose(other, frequencies, rtol=1e-9):
            yield f"rope_theta {theta:g} without scaling", turned(at, other, 1.0)


def visible(wrong, shift=0, window=None):
    """Return the causal mask of the pass, bool [T, S], with the queries moved by `shift` positions."""
    keys = np.arange(wrong.pass_.stop - wrong.s("k_cache").shape[1], wrong.pass_.stop)  # [S]
    return ops.causal_mask(wrong.positions + shift, keys, window)  # [T, S]


def heads_of(wrong, step, tiled=False):
    """Return the keys or values of each query head, [H, S, d]: repeated, or by mistake tiled."""
    x, heads = wrong.s(step), wrong.reference.heads  # [K, S, d]
    group = heads // len(x)
    order = [h % len(x) if tiled else h // group for h in range(heads)]
    return x[order]  # [H, S, d]


def probability_mistakes(wrong):
    """Try mistakes in the scores and their softmax."""
    reference = wrong.reference
    window, root, cap = reference.windows[wrong.layer], reference.score_root, reference.score_cap
    q, k, d = wrong.s("q_rope"), heads_of(wrong, "k_cache"), reference.head_dim  # [H, T, d], [H, S, d]
    mask = visible(wrong, window=window)  # [T, S]

    def probs(mask=mask, root=root, cap=cap, k=k, q=q):
        found = ops.scores(q, k, mask, root, cap)  # [H, T, S]
        return found if wrong.step == "scores" else ops.softmax(found)  # [H, T, S]

    yield "the scores are not scaled", probs(root=1.0)
    yield f"the scores are divided by d = {d}, not by its root", probs(root=float(d))
    yield "the scores are divided by the root of the hidden size", probs(root=reference.hidden_size**0.5)
    yield "the scores are scaled twice", probs(root=root * root)
    if len(mask) > 1 or (~mask).any():
        yield "there is no mask: queries see later keys", probs(mask=np.ones_like(mask))
    yield "the mask is off by one: a query sees the key after its own", probs(mask=visible(wrong, 1, window))
    before = visible(wrong, -1, window)  # [T, S]
    if before.any(axis=-1).all():
        yield "the mask is off by one: a query does not see its own key", probs(mask=before)
    if window is not None:
        yield "the sliding window is ignored", probs(mask=visible(wrong))
        yield "the sliding window is one too long", probs(mask=visible(wrong, 0, window + 1))
        yield "the sliding window is one too short", probs(mask=visible(wrong, 0, max(1, window - 1)))
    if cap is not None:
        yield "the soft cap of the scores is left out", probs(cap=None)
    tiled = heads_of(wrong, "k_cache", tiled=True)
    yield "the KV heads are tiled (h mod K), not repeated (h div H/K)", probs(k=tiled)
    unrotated = wrong.s("q_norm" if reference.norms_heads else "q")
    yield "the queries are not rotated", probs(q=unrotated)


def context_mistakes(wrong):
    """Try mistakes in the weighted sum of the values."""
    probs = wrong.s("probs")  # [H, T, S]
    tiled = heads_of(wrong, "v_cache", tiled=True)
    yield "the KV heads are tiled (h mod K), not repeated (h div H/K)", ops.context(probs, tiled)
    yield "the values are the keys", ops.context(probs, heads_of(wrong, "k_cache"))
    right_context = ops.context(probs, heads_of(wrong, "v_cache"))  # [T, H d]
    by_head = right_context.reshape(len(right_context), len(probs), -1)  # [T, H, d]
    yield (
        "the heads are joined as [d, H], not [H, d]",
        by_head.transpose(0, 2, 1).reshape(right_context.shape),
    )
    yield "head by head, not token by token", by_head.transpose(1, 0, 2).reshape(right_context.shape)


def cache_mistakes(wrong):
    """Try mistakes in the keys and values that attention reads."""
    source = {"k_cache": "k_rope", "v_cache": "v"}[wrong.step]
    new, found = wrong.s(source), wrong.s(wrong.step)  # [K, T, d], [K, S, d]
    if wrong.step == "k_cache":
        unrotated = wrong.s("k_norm" if wrong.reference.norms_heads else "k")  # [K, T, d]
        yield "the keys are not rotated", unrotated
        yield "the keys are the values", wrong.s("v")
    else:
        yield "the values are the keys", wrong.s("k_rope")
    yield (
        "the newest position holds the one before it",
        np.concatenate((found[:, :-1], found[:, -2:-1]), axis=1),
    )
    yield "the heads are in the reverse order", new[::-1]


# --- the feed-forward block, the residual stream and the ends -------------------------------------------


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
    table = wrong.w("model.embed_tokens.weight")  # [V, D]
    ids, scale = wrong.outside("tokens").astype(int), wrong.reference.embedding_scale  # [T], one number
    if scale != 1:
        yield f"the scale of the embedding, {scale:g}, is left out", table[ids]
        yield "the embedding is scaled twice", table[ids] * scale * scale
    yield "the embedding is scaled by the root of the hidden size", table[ids] * table.shape[1] ** 0.5
    yield "the rows are those of the next token id", table[(ids + 1) % len(table)] * scale
    yield "the rows are those of the token id before", table[ids - 1] * scale


def logits_mistakes(wrong):
    """Try mistakes in the logits."""
    reference = wrong.reference
    x = wrong.outside("final_norm")  # [n, D]
    table = wrong.w("model.embed_tokens.weight")  # [V, D]
    head = wrong.w("lm_head.weight")  # [V, D], or None
    plain = ops.linear(x, table if head is None else head)  # [n, V]
    if reference.logits_divisor != 1:
        yield f"the division by logits_scaling, {reference.logits_divisor:g}, is left out", plain
        yield "the logits are multiplied by logits_scaling", plain * reference.logits_divisor
    if reference.logits_cap is not None:
        yield "the soft cap of the logits is left out", plain
    if head is not None:
        yield "the output matrix is the embedding table, although they are not tied", ops.linear(x, table)
    wrong.layer = wrong.case.plan.layers - 1
    stream = wrong.s("residual", "mlp")[-len(x) :]  # [n, D]
    wrong.layer = None
    yield (
        "the input is the residual stream, not its norm",
        ops.linear(stream, table if head is None else head),
    )


OPERATIONS = {
    **dict.fromkeys(("norm", "q_norm", "k_norm", "post_norm", "final_norm"), norm_mistakes),
    **dict.fromkeys((*PROJECTIONS, "out"), projection_mistakes),
    **dict.fromkeys(("q_rope", "k_rope"), rope_mistakes),
    **dict.fromkeys(("scores", "probs"), probability_mistakes),
    **dict.fromkeys(("k_cache", "v_cache"), cache_mistakes),
    "context": context_mistakes,
    "act": activation_mistakes,
    "residual": residual_mistakes,
    "embed": embedding_mistakes,
    "logits": logits_mistakes,
}
