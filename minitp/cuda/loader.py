"""Load one rank's weights onto its GPU, in the layout that the kernels read."""

import numpy as np

from minitp.cuda.gpu import Uploads
from minitp.loading.weights import EMBED, LM_HEAD, Loader

PACK = 8  # 16-bit numbers per load of 16 bytes


def padded(width):
    """Round `width` up to a multiple of PACK, so that every row is aligned for 16-byte loads."""
    return -(-width // PACK) * PACK


class GpuLoader(Loader):
    """A loader that reads one rank's slices of a checkpoint onto a GPU.

    A projection keeps the file's layout, [out, in], with contiguous rows padded with zeros to a multiple of
    PACK; `w` [in, out] is a view of it. The slices go through pinned buffers in the dtype of the weights. So
    the GPU never holds more than the shard, and the host never more than the buffers and a block of a slice
    (the file is mapped, so its pages belong to the page cache).
    """

    def __init__(self, plan, rank, source, device, progress=lambda nbytes: None):
        self.plan, self.rank, self.source, self.device, self.progress = plan, rank, source, device, progress
        self._uploads = Uploads(device)

    def load(self):
        """Return this rank's Weights once all copies to the GPU are complete."""
        weights = super().load()
        self._uploads.finish()
        return weights

    def _embeddings(self):
        """Return lm_head [D, V_r] and embed [V_r, D]; when tied, one is a view of the other."""
        if LM_HEAD in self.plan.tensors:
            return self._matrix(LM_HEAD), self._matrix(EMBED).T
        lm_head = self._matrix(EMBED)  # [D, V_r]
        self._refuse_untied_copy(lm_head)
        return lm_head, lm_head.T

    def _matrix(self, *names):
        """Return the slices of `names`, [out, in] in the file, joined into one matrix [in, sum of out]."""
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
        """Return the concatenated slices of `names`, [sum of n]; zeros after them fill a multiple of PACK."""
        parts = [self.source.read(name, self.plan.tensors[name].index(self.rank)) for name in names]
        size = sum(map(len, parts))
        padding = np.zeros(padded(size) - size, self.device.dtype)
        joined = np.concatenate([*(part.astype(self.device.dtype) for part in parts), padding])
        return self.device.from_host(joined)[:size]  # [sum of n]


def rows_of(model, w):
    """Return a projection `w` [in, out] as a view of its layout on the GPU: [out, in and padding]."""
    return model.device.cupy.lib.stride_tricks.as_strided(
        w.T, (w.shape[1], w.strides[1] // w.itemsize), (w.strides[1], w.itemsize)
    )
