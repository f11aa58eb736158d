"""A chain of tensor-core products, which shows how a CPU or GPU adds."""

from pathlib import Path

import numpy as np

ROWS, COLUMNS = 16, 8  # shape of the product that a warp computes


def mma_chain(compiler, a, b, out):
    """Compute out = a @ b.T by one chain of `mma`.

    16-bit `a` [16 n, width] and `b` [8, width], where the width is a multiple of 16; float32 `out` [16 n, 8].
    """
    kernel = compiler.kernel(Path(__file__).with_name("mma_chain.cu"), "mma_chain")
    kernel((len(a) // ROWS,), (32,), (a, b, np.int32(a.shape[1]), out))


def numbers(dtype, width, spread=0, blocks=1, seed=0):
    """Return random a and b for `mma_chain`, normally distributed with variances 1 and 1 / width.

    With a `spread`, each number is multiplied by a random power of two from 2^-spread to 2^spread.
    """
    rng = np.random.default_rng([seed, width, spread])

    def drawn(rows, scale):
        powers = np.exp2(rng.integers(-spread, spread + 1, (rows, width)))
        return (rng.standard_normal((rows, width)) * scale * powers).astype(dtype)

    return drawn(ROWS * blocks, 1.0), drawn(COLUMNS, width**-0.5)


def relative_error(found, exact):
    """Return ||found - exact|| / ||exact||."""
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))
