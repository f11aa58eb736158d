"""One rank: there is nobody to exchange anything with."""

import numpy as np

from minitp.comm.base import Comm


class Alone(Comm):
    """One rank: every collective is the identity."""

    def __init__(self):
        super().__init__(rank=0, size=1)

    def broadcast(self, value):
        return value

    def abort(self, exit_code):
        """Nobody waits: the error that led here goes on."""

    def _exchange_arrays(self, x, sizes, combine):
        return combine([x.reshape(-1)])

    def exchange(self, value):
        return [value]


class OneOfMany(Alone):
    """The only rank, which computes the share of one of `size` ranks: for benchmarks.

    Nobody else is there, so every sum is its own term and every gathering its own part repeated. What comes
    of it is wrong, and takes as long as that rank needs between the collectives.
    """

    def __init__(self, share, size):
        super().__init__()
        self.share, self.size = share, size

    def _exchange_arrays(self, x, sizes, combine):
        return combine([np.resize(x, size) for size in sizes])
