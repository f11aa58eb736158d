"""One rank's weights on its GPU, in the layout that the kernels read."""

import numpy as np

from minitp.cuda.gpu import Uploads
from minitp.loading.weights import EMBED, LM_HEAD, Loader

PACK = 8  # 16-bit numbers that one load takes


def padded(width):
    """The distance between rows of `width` elements, so that each begins where a load of 16 bytes may."""
    return -(-width // PACK) * PACK


class GpuLoader(Loader):
    """Reads one rank's slices of a checkpoint onto a GPU.

    A projection's rows lie as in the file, [out, in], each a run of memory, padded with zeros to a multiple
    of PACK; as `w` [in, out] the model gets a view of that. The slices go through pinned buffers in the dtype
    of the weights: on the GPU there is never more than the shard, on the host never more than a block of a
    slice and the buffers (the file is mapped, and belongs to the page cache).
    """

    def __init__(self, plan, rank, source, device, progress=lambda nbytes: None):
        self.plan, self.rank, self.source, self.device, self.progress = plan, rank, source, device, progress
        self._uploads = Uploads(device)

    def load(self):
        """All of this rank's Weights."""
        weights = super().load()
        self._uploads.finish()
        return weights

    def _embeddings(self):
        """lm_head [D, V_r] and embed [V_r, D]; when tied, one is the transpose of the other."""
        if LM_HEAD in self.plan.tensors:
            return self._matrix(LM_HEAD), self._matrix(EMBED).T
        lm_head = self._matrix(EMBED)  # [D, V_r]
        self._refuse_untied_copy(lm_head)
        return lm_head, lm_head.T

    def _matrix(self, *names):
        """The slices of `names`, [out, in] in the file, one below the other; as [in, sum of out]."""
        shapes = [self.plan.tensors[name].shape_on(self.rank) for name in names]
        rows, width = sum(out for out, _ in shapes), shapes[0][1]
        joined = self.device.cupy.empty((rows, padded(width)), dtype=self.device.dtype)  # [sum of out, >= in]
        start = 0
        for name, (out, _) in zip(names, shapes, strict=True):
            for row, block in self._blocks(name):  # [rows, in]
                self._uploads.copy(block, joined[start + row : start + row + len(block)])
            start += out
        self.progress(rows * width * self.device.dtype.itemsize)
        return joined[:, :width].T

    def _vector(self, *names):
        """The slices of `names` end to end."""
        parts = [self.source.read(name, self.plan.tensors[name].index(self.rank)) for name in names]
        return self.device.from_host(np.concatenate(parts).astype(self.device.dtype))  # [sum of n]
