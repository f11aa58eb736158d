"""The weights with which the operations of a rank are repeated."""

import numpy as np

EMBEDDING = "model.embed_tokens.weight"


class RankWeights:
    """A rank's parts of the checkpoint's tensors by name, [out, in], rounded to the engine's dtype.

    Parameters
    ----------
    reference : Oracle
    plan : Plan
    rank : int
    dtype, matmul_dtype : numpy dtype
        The dtype of the engine, and that in which it multiplies matrices.
    """

    def __init__(self, reference, plan, rank, dtype, matmul_dtype):
        self._reference, self.plan, self._rank = reference, plan, rank
        self._dtype, self._matmul_dtype = dtype, matmul_dtype

    def __getitem__(self, name):
        return self.of_rank(name, self._rank)

    def of_rank(self, name, rank):
        """Return the part of a tensor that another rank has."""
        shard = self.plan.tensors[name]
        return self.whole(name) if shard.axis is None else self.whole(name, shard.index(rank))

    def whole(self, name, *index):
        """Return a whole tensor, or the part with an index."""
        tensor = np.asarray(self._reference.tensor(name, *index))
        is_operand = tensor.ndim == 2 and name != EMBEDDING
        return tensor.astype(self._matmul_dtype if is_operand else self._dtype)

    def get(self, name, default=None):
        """Return this rank's part of a tensor, or `default` if the model has none of this name."""
        if name in self.plan.tensors:
            return self[name]
        # The default of the output matrix is the embedding, with which they are tied.
        return default if default is None else default.astype(self._matmul_dtype)
