"""A statistic that shows which steps of a 16-bit run round more than once.

The bounds of the local errors allow twice the unavoidable error. So they cannot show that an operation also
rounds an intermediate result, for example silu(gate) before it is multiplied by up. The variance of the
errors shows it, because the variances of independent errors add up. With x, y and r as in `tolerance`,

    variance of (x - y) / variance of (r - y)

is 1 if x is rounded once, like r, and about 2 if it is rounded twice. It is measured over all passes, layers
and ranks of a step, relative to the size of each array. Rounding more often is not wrong, and many engines
do it, transformers among them. So there is only a warning, and no step is blamed.
"""

import numpy as np

from minitp.check.result import COLLECTIVE

# Norms round twice, before and after the weight, in transformers and so in minitp. Their variance is 2 to 5
# times that of one rounding if a few channels dominate.
NORMS = (
    "attn.norm",
    "mlp.norm",
    "attn.q_norm",
    "attn.k_norm",
    "attn.post_norm",
    "mlp.post_norm",
    "final_norm",
)
MOST = 1.4  # a ratio of the variances above this causes a warning
FEWEST = 400  # with fewer samples, the ratio may be large by chance


class RoundingStatistic:
    """The variances of the errors of each step on this rank.

    Attributes
    ----------
    sums : dict of str to float64 [3]
        For each step: the sums over its arrays of n ||x - y||^2 / ||y||^2, n ||r - y||^2 / ||y||^2 and n, the
        number of samples of an array.
    """

    def __init__(self):
        self.sums = {}

    def add(self, step, array, expected, dtype, repeats):
        """Add an array x of a step with its Expected; exact steps, norms and sums over ranks are left out.

        `repeats` is the average number of times that a token occurs.
        """
        if dtype.itemsize != 2 or expected.low_precision_reference is None or step in NORMS + COLLECTIVE:
            return
        y, r = expected.value, expected.rounded_reference(dtype)
        x = array.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(r) & np.isfinite(y)
        size = np.sum(np.square(y[finite]))
        if size == 0:
            return
        samples = expected.effective_elements() / repeats
        squares = [np.sum(np.square(other[finite] - y[finite])) / size for other in (x, r)]
        self.sums[step] = self.sums.get(step, 0) + samples * np.array([*squares, 1])

    def warnings(self, comm):
        """Return a warning for each step that rounds too often, over all ranks; all ranks call this."""
        total = {}  # as `sums`, of all ranks
        for sums in comm.allgather_object(self.sums):
            for step, numbers in sums.items():
                total[step] = total.get(step, 0) + numbers
        return [
            f"{step} rounds more than once: it is within its bounds, but the variance of its errors is "
            f"{variance / of_one_rounding:.1f} times that of one rounding"
            for step, (variance, of_one_rounding, samples) in total.items()
            if samples >= FEWEST and variance > MOST * of_one_rounding
        ]
