"""The order of the dimensions in a query or key head: half-split or interleaved.

RoPE rotates pairs of dimensions. In the half-split layout, which minitp and Hugging Face use, the pairs are
(x[i], x[i + d/2]); in the interleaved layout of Meta's code and of GGUF files they are (x[2i], x[2i + 1]).
The rows of the q and k projections have the same order as the dimensions. If RoPE rotates only the first R
dimensions of a head, the pairs are those of the first R, and the others keep their places.
"""

import numpy as np

from minitp.mapping.convert import half_split
from minitp.trace.names import ATTENTION, split_name

HEADS = [f"attn.{part}{step}" for part in "qk" for step in ("", "_norm", "_rope", "_cache")]
HEADS = {step for step in HEADS if step in ATTENTION}  # [n, T, d], or [K, S, d]
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")  # [n * d, D], [n * d]
HEAD_NORMS = ("q_norm.weight", "k_norm.weight")  # [d]


def has_pairs(name):
    """Return whether the array of a step or weight depends on the order of the dimensions in a head."""
    return split_name(name)[2] in HEADS or name.endswith((*PROJECTIONS, *HEAD_NORMS))


def to_half_split(name, array, head_dim, rotary_dim=None):
    """Convert an array for which `has_pairs` is true, in A's shape, from interleaved to half-split heads.

    `head_dim` is needed for the weights and biases of projections only; `rotary_dim` is R, by default d.
    """
    if not name.endswith(PROJECTIONS):
        return half_split(array, rotary_dim)
    heads = half_split(by_head(array, head_dim), rotary_dim)  # [n, .., d]
    return np.moveaxis(heads, -1, 1).reshape(array.shape)


def by_head(weight, head_dim):
    """Give the dimensions in a head the last axis: [n * d, D] -> [n, D, d], [n * d] -> [n, d]."""
    return np.moveaxis(weight.reshape(-1, head_dim, *weight.shape[1:]), 1, -1)


def interleaved(x, rotary_dim=None):
    """Move the pairs (x[i], x[i + R/2]) of the last axis next to each other: [.., d] -> [.., d].

    R is `rotary_dim`, by default d.

    >>> interleaved(np.arange(6)).tolist(), interleaved(np.arange(6), 4).tolist()
    ([0, 3, 1, 4, 2, 5], [0, 2, 1, 3, 4, 5])
    """
    turned, rest = np.split(x, [rotary_dim or x.shape[-1]], axis=-1)  # [.., R], [.., d - R]
    pairs = np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(turned.shape)  # [.., R]
    return np.concatenate((pairs, rest), axis=-1)
