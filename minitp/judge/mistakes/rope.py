"""The common mistakes in RoPE: positions, layouts, the dimensions that are rotated, and the frequencies.

They are (description, array), computed in float64 from the inputs that the engine really had. Shape letters
are those of `trace.names`.
"""

from dataclasses import replace

import numpy as np

from minitp.compare.heads import half_split, interleaved
from minitp.oracle import ops
from minitp.rope import rope_inverse_frequencies
from minitp.util.format import counted

CONTEXTS = (2048, 4096, 8192, 32768, 131072)  # original_max_position_embeddings of published models


def rope_mistakes(wrong):
    """Try mistakes in RoPE."""
    reference, x = wrong.reference, rope_input(wrong)  # [n, T, d]
    at, (frequencies, factor) = wrong.positions, reference.rotations[wrong.layer]
    pairs = 2 * len(frequencies)

    def turned(by, frequencies=frequencies, factor=factor):
        return ops.rope(x, by, frequencies, factor)  # [n, T, d]

    restart = "the positions begin at 0 in this pass"
    if at[0] > 0:
        yield restart if len(at) > 1 else f"not rotated, or {restart}", turned(at - at[0])
    yield "not rotated", x
    in_pairs = interleaved(ops.rope(half_split(x, pairs), at, frequencies, factor), pairs)  # [n, T, d]
    yield "rotated in pairs (x[2i], x[2i+1]), not (x[i], x[i+d/2]): the other RoPE layout", in_pairs
    stored = interleaved(turned(at), pairs)  # [n, T, d]
    yield "rotated as they should be, but stored interleaved, not half-split", stored
    yield "rotated in the opposite direction", turned(-at)
    yield "the positions are one too large", turned(at + 1)
    yield "the positions are one too small", turned(at - 1)
    yield "all tokens have the first position", turned(np.full_like(at, at[0]))
    if len(at) > 1:
        yield (
            "each token has the position of the one before it, the first that of the last",
            turned(np.roll(at, 1)),
        )
        yield (
            "each token has the position of the next one, the last that of the first",
            turned(np.roll(at, -1)),
        )
    yield "rotated twice", ops.rope(turned(at), at, frequencies, factor)
    first, second, rest = np.split(x, [pairs // 2, pairs], axis=-1)  # [n, T, R/2] twice, [n, T, d - R]
    exchanged = np.concatenate((second, first, rest), axis=-1)  # [n, T, d]
    # With sine and cosine exchanged, (a, b) is rotated as (-b, a) would be in the opposite direction.
    mirrored = np.concatenate((-second, first, rest), axis=-1)  # [n, T, d]
    yield "sine and cosine are exchanged", ops.rope(mirrored, -at, frequencies, factor)
    yield "the halves of each head are exchanged", ops.rope(exchanged, at, frequencies, factor)
    if wrong.step == "k_rope":
        yield (
            "the values are rotated, too, or in place of the keys",
            ops.rope(wrong.s("v"), at, frequencies, factor),
        )
    if factor != 1:
        yield "without the attention factor", turned(at, factor=1.0)
    for layer, rotation in enumerate(reference.rotations):
        if (rotation[0] != frequencies).any():
            yield f"rotated with the RoPE of layer {layer}, not of layer {wrong.layer}", turned(at, *rotation)
            break
    for text, other in other_frequencies(wrong, frequencies, x.shape[-1]):
        yield text, turned(at, other, 1.0)
        if factor != 1:
            yield text, turned(at, other)


def rope_input(wrong):
    """Return the queries or keys before RoPE, [n, T, d]."""
    part = wrong.step[0]
    return wrong.s(f"{part}_norm" if wrong.reference.norms_heads else part)  # [n, T, d]


def other_frequencies(wrong, frequencies, d):
    """Yield (description, frequencies [n]) of the mistakes in the frequencies [R/2]."""
    rope, rotary_dim = wrong.case.recording.config.ropes[wrong.layer], 2 * len(frequencies)
    if rope is None:  # a layer without RoPE
        rope = wrong.case.recording.config.rope
    for theta in sorted({float(rope.rope_theta), 1e4, 1e5, 5e5, 1e6}):
        other = theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)  # [R/2]
        if not np.allclose(other, frequencies, rtol=1e-9):
            yield f"rope_theta {theta:g} without scaling", other
    for size in (d, *(d >> shift for shift in (1, 2) if not (d >> shift) % 2)):
        if size != rotary_dim:
            what, right = ("all" if n == d else f"only the first {n}" for n in (size, rotary_dim))
            text = f"{what} of {counted(d, 'dimension')} are rotated, not {right}"
            yield text, rope_inverse_frequencies(rope, size) if not rope.short_factor else frequencies
            yield text, frequencies[: size // 2]
    exponents = {
        f"2i / {rotary_dim - 2}": np.arange(0, rotary_dim, 2) / max(1, rotary_dim - 2),
        f"i / {rotary_dim}": np.arange(rotary_dim // 2) / rotary_dim,
        f"4i / {rotary_dim}": np.arange(0, rotary_dim, 2) * 2 / rotary_dim,
    }  # [R/2] each
    for formula, exponent in exponents.items():
        yield f"the exponents of theta are {formula}, not 2i / {rotary_dim}", rope.rope_theta**-exponent
    for factor in (2, 4, 8, 16, 32):
        yield f"the frequencies are divided by {factor}", frequencies / factor
        yield f"the frequencies are multiplied by {factor}", frequencies * factor
    if rope.rope_type == "llama3":
        yield from llama3_frequencies(rope, frequencies)


def llama3_frequencies(rope, frequencies):
    """Yield (description, frequencies [R/2]) of mistakes in the scaling of Llama 3.1."""
    size = 2 * len(frequencies)
    plain = np.array(rope_inverse_frequencies(replace(rope, rope_type="default"), size))  # [R/2]
    shrunk = plain / rope.factor  # [R/2]
    between = ~np.isclose(frequencies, plain) & ~np.isclose(frequencies, shrunk)  # [R/2]
    yield (
        "the smooth part of llama3's scaling is inverted",
        np.where(between, plain + shrunk - frequencies, frequencies),
    )
    yield (
        "llama3's scaling has no smooth part: these frequencies are kept",
        np.where(between, plain, frequencies),
    )
    yield (
        "llama3's scaling has no smooth part: these frequencies are divided",
        np.where(between, shrunk, frequencies),
    )
    for field, values in (
        ("original_max_position_embeddings", CONTEXTS),
        ("factor", (2.0, 4.0, 8.0, 16.0, 32.0)),
        ("low_freq_factor", (0.5, 1.0, 2.0, 4.0)),
        ("high_freq_factor", (1.0, 2.0, 4.0, 8.0)),
    ):
        for value in values:
            other, right = replace(rope, **{field: value}), getattr(rope, field)
            if value != right and other.low_freq_factor != other.high_freq_factor:
                text = f"{field} of llama3's scaling is {value:g}, not {right:g}"
                yield text, np.array(rope_inverse_frequencies(other, size))


def fitted_rope(wrong):
    """Try one factor for all frequencies, and then any other frequencies, both read from the array itself.

    The phase of conj(z[t]) z[t + 1], where z is the result divided by the input, is a pair's frequency.
    """
    x, found, at = rope_input(wrong), wrong.s(wrong.step), wrong.positions  # [n, T, d] twice, [T]
    frequencies, factor = wrong.reference.rotations[wrong.layer]
    pairs = len(frequencies)
    if x.shape != found.shape or len(at) < 4 or (np.diff(at) != 1).any():
        return
    z, right = (a[..., :pairs] + 1j * a[..., pairs : 2 * pairs] for a in (found, x))  # [n, T, R/2] each
    turns = z * right.conj()  # [n, T, R/2]
    steps = (turns[:, 1:] * turns[:, :-1].conj()).sum(axis=(0, 1))  # [R/2]
    fitted = np.angle(steps)  # [R/2]
    for _ in range(3):  # the rest of the phase, as seen from the first position, makes it more exact
        rest = np.angle((turns * np.exp(-1j * np.multiply.outer(at - at[0], fitted))).sum(axis=0))  # [T, R/2]
        fitted = fitted + ((at - at[0]) @ (rest - rest[0])) / np.sum((at - at[0]) ** 2)  # [R/2]
    ratio = np.vdot(frequencies, fitted) / np.vdot(frequencies, frequencies)
    yield (
        f"the frequencies are {ratio:.6g} times the right ones",
        ops.rope(x, at, ratio * frequencies, factor),
    )
    i = int(np.argmax(np.abs(fitted / frequencies - 1)))
    text = f"the frequencies are other ones: that of pair {i} is {fitted[i]:.4g}, not {frequencies[i]:.4g}"
    yield text, ops.rope(x, at, fitted, factor)
