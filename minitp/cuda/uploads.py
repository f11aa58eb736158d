"""Transfers from files to a GPU: threads fill pinned buffers, from which the GPU copies by itself."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PINNED_BYTES = 1 << 21  # size of each buffer; together they fit into the L3 cache, which makes reading faster
BUFFERS = 8
READERS = 4  # threads; one alone copies from the page cache at less than the speed of the GPU's link


class Uploads:
    """A ring of pinned buffers: some are filled by reader threads while others are copied to the GPU.

    The readers only fill memory of the host. All calls of CUDA are made by the thread that calls `copy`, in
    the order of the rows. An error of a reader is raised by `copy` or `finish`.

    Parameters
    ----------
    gpu : Gpu
    """

    def __init__(self, gpu):
        import cupyx

        self._gpu, self._turn = gpu, 0
        self._buffers = [cupyx.empty_pinned(PINNED_BYTES, np.uint8) for _ in range(BUFFERS)]
        self._events = [gpu.cupy.cuda.Event(disable_timing=True) for _ in range(BUFFERS)]
        self._filling = deque()  # (future, buffer's number, rows in the buffer, out), oldest first
        self._readers = ThreadPoolExecutor(READERS, "minitp-reader")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._readers.shutdown(cancel_futures=True)

    def copy(self, read, out, width):
        """Fill the first `width` columns of `out` [n, m] on the GPU, which must be contiguous; others get 0.

        Parameters
        ----------
        read : callable
            read(start, rows) fills `rows`, a NumPy array [k, width] in the dtype of `out`, with the rows
            from `start` on. It runs in several threads at once.
        out : cupy.ndarray
        width : int
        """
        if width == 0:
            return
        most = max(1, PINNED_BYTES // out.strides[0])  # rows per buffer
        for start in range(0, len(out), most):
            part = out[start : start + most]  # [<= most, m]
            if len(self._filling) > READERS:  # one more than the readers, so that none of them waits
                self._copy_oldest()
            self._turn = (self._turn + 1) % BUFFERS
            self._events[self._turn].synchronize()  # the last copy from this buffer is complete
            pinned = self._buffers[self._turn][: part.nbytes].view(out.dtype).reshape(part.shape)
            future = self._readers.submit(_fill, read, start, pinned, width)
            self._filling.append((future, self._turn, pinned, part))

    def finish(self):
        """Wait until all copies are complete."""
        while self._filling:
            self._copy_oldest()
        self._gpu.stream.synchronize()

    def _copy_oldest(self):
        future, turn, pinned, part = self._filling.popleft()
        future.result()  # raises the reader's error
        runtime, stream = self._gpu.cupy.cuda.runtime, self._gpu.stream
        source, kind = pinned.ctypes.data, runtime.memcpyHostToDevice
        runtime.memcpyAsync(part.data.ptr, source, pinned.nbytes, kind, stream.ptr)
        self._events[turn].record(stream)


def _fill(read, start, pinned, width):
    read(start, pinned[:, :width])
    if width < pinned.shape[1]:
        pinned[:, width:] = 0
