"""The frequencies of rotary position embedding, which `ops.rope_cos_sin` turns into angles."""

import math


def rotations(config):
    """Return each RoPE of a model's layers with its (rotations per position, factor of q and k).

    A layer without RoPE, whose key is None, rotates by an angle of zero.
    """
    zero = [0.0] * (config.rotary_dim // 2), 1.0
    return {
        rope: (rope_inverse_frequencies(rope, config.rotary_dim), rope.attention_factor) if rope else zero
        for rope in config.ropes
    }


def rope_inverse_frequencies(rope, rotary_dim):
    """Return the rotation per position of each pair of dimensions, in radians: R / 2 floats.

    R is `rotary_dim`, the number of dimensions of each head that RoPE rotates.

    default   theta^(-2i / R)                                   (Su et al., RoFormer, 2021, section 3.2.2)
    linear    all frequencies divided by `factor`               (Chen et al., Position Interpolation, 2023)
    llama3    frequencies with few rotations over the original context divided by `factor`, those with many
              kept, and a smooth transition in between          (Llama 3.1's reference code)
    yarn      the same idea, with a linear ramp over the pairs  (Peng et al., YaRN, 2023, section 3.2)
    longrope  each frequency divided by its own factor          (Ding et al., LongRoPE, 2024, section 3)
    """
    plain = [rope.rope_theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    if rope.rope_type == "default":
        return plain
    if rope.rope_type == "linear":
        return [f / rope.factor for f in plain]
    if rope.rope_type == "longrope":
        return [f / divisor for f, divisor in zip(plain, rope.short_factor, strict=True)]
    if rope.rope_type == "yarn":
        return yarn_inverse_frequencies(rope, plain)
    scaled = []
    for f in plain:
        rotations = rope.original_max_position_embeddings * f / (2 * math.pi)  # over the original context
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        scaled.append(kept * f + (1 - kept) * f / rope.factor)
    return scaled


def yarn_inverse_frequencies(rope, plain):
    """Scale the R/2 frequencies `plain` as YaRN does.

    Pairs with more than `beta_fast` rotations over the original context keep their frequency, those with
    fewer than `beta_slow` have it divided by `factor`, and a linear ramp over the pairs joins the two. (Peng
    et al., YaRN, 2023, section 3.2.)
    """
    length, count = rope.original_max_position_embeddings, len(plain)

    def pair(rotations):
        """Return the index of the pair that makes this many rotations, as a real number."""
        return count * math.log(length / (rotations * 2 * math.pi)) / math.log(rope.rope_theta)

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    last = last + 0.001 if first == last else last  # a jump instead of a ramp; avoids a division by zero
    ramp = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(count)]
    return [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
