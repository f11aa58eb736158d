"""The order of the dimensions in a query or key head: half-split or interleaved.

RoPE rotates pairs of dimensions. In the half-split layout, which minitp and Hugging Face use, the pairs are
(x[i], x[i + d/2]); in the interleaved layout of Meta's code and of GGUF files they are (x[2i], x[2i + 1]).
The rows of the q and k projections have the same order as the dimensions.
"""

import numpy as np

from minitp.trace.names import ATTENTION, split_name

HEADS = [f"attn.{part}{step}" for part in "qk" for step in ("", "_norm", "_rope", "_cache")]
HEADS = {step for step in HEADS if step in ATTENTION}  # [n, T, d], or [K, S, d]
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")  # [n * d, D], [n * d]
HEAD_NORMS = ("q_norm.weight", "k_norm.weight")  # [d]


def has_pairs(name):
    """Return whether the array of a step or weight depends on the order of the dimensions in a head."""
    return split_name(name)[2] in HEADS or name.endswith((*PROJECTIONS, *HEAD_NORMS))


def to_half_split(name, array, head_dim):
    """Convert an array for which `has_pairs` is true, in A's shape, from interleaved to half-split heads.

    `head_dim` is needed for the weights and biases of projections only.
    """
    if not name.endswith(PROJECTIONS):
        return half_split(array)
    heads = half_split(by_head(array, head_dim))  # [n, .., d]
    return np.moveaxis(heads, -1, 1).reshape(array.shape)


def by_head(weight, head_dim):
    """Give the dimensions in a head the last axis: [n * d, D] -> [n, D, d], [n * d] -> [n, d]."""
    return np.moveaxis(weight.reshape(-1, head_dim, *weight.shape[1:]), 1, -1)


def interleaved(x):
    """Move the pairs (x[i], x[i + d/2]) of the last axis next to each other: [.., d] -> [.., d].

    >>> interleaved(np.arange(6)).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def half_split(x):
    """Move the pairs (x[2i], x[2i + 1]) of the last axis d/2 apart: [.., d] -> [.., d].

    >>> half_split(np.arange(6)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return np.concatenate((x[..., ::2], x[..., 1::2]), axis=-1)
