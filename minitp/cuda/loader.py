"""Load one rank's weights onto its GPU, in the layout that the kernels read."""

from functools import partial

import numpy as np

from minitp.cuda.uploads import Uploads
from minitp.loading.weights import EMBED, LM_HEAD, Loader

PACK = 8  # 16-bit numbers per load of 16 bytes


def padded(width):
    """Round `width` up to a multiple of PACK, so that every row is aligned for 16-byte loads."""
    return -(-width // PACK) * PACK


class GpuLoader(Loader):
    """A loader that reads one rank's slices of a checkpoint onto a GPU.

    A projection keeps the file's layout, [out, in], with contiguous rows padded with zeros to a multiple of
    PACK; `w` [in, out] is a view of it. The slices go through pinned buffers in the dtype of the weights. So
    the GPU never holds more than the shard, and the host never more than the buffers (and, if the source has
    no file in that layout, what its `read` returns for the rows in each of them).
    """

    def __init__(self, plan, rank, source, device, progress=lambda nbytes: None):
        self.plan, self.rank, self.source, self.device, self.progress = plan, rank, source, device, progress

    def load(self):
        """Return this rank's Weights once all copies to the GPU are complete."""
        with Uploads(self.device) as self._uploads:
            weights = super().load()
            self._uploads.finish()
        return weights

    def _embeddings(self):
        """Return lm_head [D, V_r] and embed [V_r, D]; when tied, one is a view of the other."""
        if LM_HEAD in self.plan.tensors:
            return self._matrix(LM_HEAD), self._matrix(EMBED).T
        lm_head = self._matrix(EMBED)  # [D, V_r]
        self._uploads.finish()
        self._refuse_untied_copy(lm_head)
        return lm_head, lm_head.T

    def _matrix(self, *names):
        """Return the slices of `names`, [out, in] in the file, joined into one matrix [in, sum of out]."""
        shapes = [self.plan.tensors[name].shape_on(self.rank) for name in names]
        rows, width = sum(out for out, _ in shapes), shapes[0][1]
        joined = self.device.cupy.empty((rows, padded(width)), dtype=self.device.dtype)  # [sum of out, >= in]
        start = 0
        for name, (out, _) in zip(names, shapes, strict=True):
            self._uploads.copy(partial(self._read_rows, name), joined[start : start + out], width)
            start += out
        self.progress(rows * width * self.device.dtype.itemsize)
        return joined[:, :width].T

    def _read_rows(self, name, start, rows):
        """Fill `rows` [n, in] with the rows of this rank's slice of `name` from `start` on."""
        slice_rows, columns = self.plan.tensors[name].index(self.rank)
        first = slice_rows.start + start
        self.source.read_into(name, (slice(first, first + len(rows)), columns), rows)

    def _vector(self, *names):
        """Return the concatenated slices of `names`, [sum of n]; zeros after them fill a multiple of PACK."""
        shards = [self.plan.tensors[name] for name in names]
        sizes = [shard.shape_on(self.rank)[0] for shard in shards]
        joined, start = np.zeros(padded(sum(sizes)), self.device.dtype), 0  # [sum of n and padding]
        for shard, size in zip(shards, sizes, strict=True):
            self.source.read_into(shard.name, shard.index(self.rank), joined[start : start + size])
            start += size
        return self.device.from_host(joined)[:start]  # [sum of n]


def rows_of(model, w):
    """Return a projection `w` [in, out] as a view of its layout on the GPU: [out, in and padding]."""
    return model.device.cupy.lib.stride_tricks.as_strided(
        w.T, (w.shape[1], w.strides[1] // w.itemsize), (w.strides[1], w.itemsize)
    )
