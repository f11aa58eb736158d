"""The weights with which the operations of a rank are repeated."""

import numpy as np


class RankWeights:
    """A rank's parts of the checkpoint's tensors by name, [out, in], rounded to the engine's dtype.

    Parameters
    ----------
    reference : Oracle
    plan : Plan
    rank : int
    dtype : numpy dtype
    """

    def __init__(self, reference, plan, rank, dtype):
        self._reference, self.plan, self._rank, self._dtype = reference, plan, rank, dtype

    def __getitem__(self, name):
        return self.of_rank(name, self._rank)

    def of_rank(self, name, rank):
        """Return the part of a tensor that another rank has."""
        shard = self.plan.tensors[name]
        return self.whole(name) if shard.axis is None else self.whole(name, shard.index(rank))

    def whole(self, name, *index):
        """Return a whole tensor, or the part with an index."""
        return np.asarray(self._reference.tensor(name, *index)).astype(self._dtype)

    def get(self, name, default=None):
        """Return this rank's part of a tensor, or `default` if the model has none of this name."""
        return self[name] if name in self.plan.tensors else default
