"""Products on tensor cores, as tests look at them: the CPU's and a GPU's."""

from pathlib import Path

import numpy as np

ROWS, COLUMNS = 16, 8  # of a product that one warp makes


def mma_chain(compiler, a, b, out):
    """out = a @ b.T by one chain of `mma`: 16-bit a [16 n, width] and b [8, width], float32 out [16 n, 8].

    The width is a multiple of 16.
    """
    kernel = compiler.kernel(Path(__file__).with_name("mma_chain.cu"), "mma_chain")
    kernel((len(a) // ROWS,), (32,), (a, b, np.int32(a.shape[1]), out))


def numbers(dtype, width, spread=0, blocks=1, seed=0):
    """Random a and b for it, normally distributed: a of variance 1, b of variance 1 / width.

    With a `spread` each is multiplied with a power of two from 2^-spread to 2^spread.
    """
    rng = np.random.default_rng([seed, width, spread])

    def drawn(rows, scale):
        powers = np.exp2(rng.integers(-spread, spread + 1, (rows, width)))
        return (rng.standard_normal((rows, width)) * scale * powers).astype(dtype)

    return drawn(ROWS * blocks, 1.0), drawn(COLUMNS, width**-0.5)


def relative_error(found, exact):
    """||found - exact|| / ||exact||"""
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))
