"""The frequencies of rotary position embedding; `ops.apply_rope` turns by them."""

import math


def rope_inverse_frequencies(rope, head_dim):
    """The angle that each pair of dimensions turns by per position, as a list of head_dim / 2 floats.

    default   theta^(-2i / d)                                   (Su et al., RoFormer, 2021, section 3.2.2)
    linear    the same, divided by `factor`                     (Chen et al., Position Interpolation, 2023)
    llama3    waves longer than the original context are stretched by `factor`, short ones are kept, and
              between the two it changes over smoothly          (Llama 3.1's reference code)
    yarn      the same idea with a ramp over the pairs          (Peng et al., YaRN, 2023, section 3.2)
    longrope  each divided by a number of its own               (Ding et al., LongRoPE, 2024, section 3)
    """
    plain = [rope.rope_theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
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
        turns = rope.original_max_position_embeddings * f / (2 * math.pi)  # over the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = min(max(keep, 0.0), 1.0)
        scaled.append(keep * f + (1 - keep) * f / rope.factor)
    return scaled


def yarn_inverse_frequencies(rope, plain):
    """Pairs that turn more than `beta_fast` times over the original context keep their frequency, those that
    turn less than `beta_slow` times are divided by `factor`, and between the two pairs there is a ramp.

    `plain` are the d/2 frequencies without scaling. (Peng et al., YaRN, 2023, section 3.2.)
    """
    length, count = rope.original_max_position_embeddings, len(plain)

    def pair(turns):  # that turns so often, as a real number
        return count * math.log(length / (turns * 2 * math.pi)) / math.log(rope.rope_theta)

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    last = last + 0.001 if first == last else last  # a step
    ramp = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(count)]
    return [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
