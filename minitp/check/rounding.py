"""A statistic of a 16-bit run: how often its steps round, over all of their elements.

A bound for the largest error and for the norm allows twice the unavoidable error, so it cannot see that an
operation rounds an intermediate result, too: silu(gate) before it is multiplied by up, for example. The
variance of the errors shows it, because independent errors add up:

    variance of (x - y) / variance of (r - y)

is 1 if x rounds once, as r does, and about 2 if it rounds twice. It is measured over all passes, layers and
ranks of a step, relative to the size of each array. An engine that rounds more often is not wrong, as many
do so, transformers among them. So this is a warning, and no step is blamed.
"""

import numpy as np

from minitp.check.result import COLLECTIVE

# A norm is rounded before it is multiplied by the weight, in transformers and so in minitp. The variance of
# two roundings is 2 to 5 times that of one, if few channels dominate.
NORMS = (
    "attn.norm",
    "mlp.norm",
    "attn.q_norm",
    "attn.k_norm",
    "attn.post_norm",
    "mlp.post_norm",
    "final_norm",
)
MOST = 1.4  # variances above this ratio are reported
FEWEST = 400  # number of samples below which the ratio is left to chance


class RoundingStatistic:
    """The variances of the errors of each step on this rank.

    Attributes
    ----------
    sums : dict of str to float64 [3]
        For each step: the sums of (x - y)^2 and (r - y)^2, relative to y^2, and the number of samples.
    """

    def __init__(self):
        self.sums = {}

    def add(self, step, array, expected, dtype, repeats):
        """Count an array and its Expected."""
        if dtype.itemsize != 2 or expected.low_precision_reference is None or step in NORMS + COLLECTIVE:
            return
        y, r = expected.value, expected.rounded_reference(dtype)
        x = array.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(r) & np.isfinite(y)
        size = np.sum(np.square(y[finite]))
        samples = expected.roundings_to_sample() / repeats
        if size == 0:
            return
        squares = [np.sum(np.square(other[finite] - y[finite])) / size for other in (x, r)]
        self.sums[step] = self.sums.get(step, 0) + samples * np.array([*squares, 1])

    def warnings(self, comm):
        """Return a warning for each step that rounds too often on any rank; all ranks call this."""
        total = {}
        for sums in comm.allgather_object(self.sums):
            for step, numbers in sums.items():
                total[step] = total.get(step, 0) + numbers
        return [
            f"{step} rounds more than once: it is within its bounds, but the variance of its errors is "
            f"{errors / once:.1f} times that of one rounding"
            for step, (errors, once, samples) in total.items()
            if samples >= FEWEST and errors > MOST * once
        ]
