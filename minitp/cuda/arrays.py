"""The array module that `ops` uses on a GPU: CuPy with another matrix product."""

import numpy as np

from minitp.device import DTYPES


class Arrays:
    """The array module that `ops` receives as `xp` on a GPU.

    `cupy.matmul` returns 16-bit results for 16-bit matrices, not the float32 sums that `ops` requests with
    `dtype=float32`, and does not accept three-dimensional bfloat16 arrays at all. So `matmul` calls cuBLAS.

    Parameters
    ----------
    cupy : module
    """

    def __init__(self, cupy):
        from cupy_backends.cuda.libs import cublas

        self._cupy, self._cublas = cupy, cublas
        runtime = cupy.cuda.runtime
        kinds = {
            "float32": runtime.CUDA_R_32F,
            "float16": runtime.CUDA_R_16F,
            "bfloat16": runtime.CUDA_R_16BF,
        }
        self._types = {np.dtype(DTYPES[name]): kind for name, kind in kinds.items()}
        self._factors = np.array([1, 0], np.float32)  # cuBLAS expects pointers to these numbers
        self._one = self._factors.ctypes.data
        self._zero = self._one + self._factors.itemsize

    def __getattr__(self, name):
        return getattr(self._cupy, name)

    def matmul(self, a, b, dtype=None):
        """Return a [n, k] @ b [k, m], summed in float32, as [n, m] of `dtype` (that of `a` if None).

        Each matrix may be row-major or column-major; both are equally fast.
        """
        out = self._cupy.empty((a.shape[0], b.shape[1]), dtype=a.dtype if dtype is None else dtype)  # [n, m]
        self.matmul_into(a, b, out)
        return out

    def matmul_into(self, a, b, out):
        """Write a @ b into `out`, which may have gaps between its rows."""
        (n, k), m = a.shape, b.shape[1]
        if 0 in (n, k, m):
            out[...] = 0
            return
        # cuBLAS is column-major, so it sees all matrices transposed: out.T = b.T @ a.T.
        (a, transpose_a, stride_a), (b, transpose_b, stride_b) = self._readable(a), self._readable(b)
        self._cublas.gemmEx(
            self._cupy.cuda.device.get_cublas_handle(),
            *(transpose_b, transpose_a, m, n, k, self._one),
            *(b.data.ptr, self._types[b.dtype], stride_b),
            *(a.data.ptr, self._types[a.dtype], stride_a, self._zero),
            *(out.data.ptr, self._types[out.dtype], max(m, out.strides[0] // out.itemsize)),
            *(self._cublas.CUBLAS_COMPUTE_32F, self._cublas.CUBLAS_GEMM_DEFAULT),
        )

    def _readable(self, a):
        """Return (a or a contiguous copy, its layout)."""
        found = layout(a)
        if found is None:
            a = self._cupy.ascontiguousarray(a)
            found = layout(a)
        return a, *found


def layout(a):
    """Return whether a matrix is column-major (0 or 1), and its stride in elements.

    The result is (0, stride) if the rows are contiguous, (1, stride) if the columns are, and None if neither
    are.
    """
    (rows, columns), (by_row, by_column), size = a.shape, a.strides, a.itemsize
    by_row, by_column = by_row // size, by_column // size
    if by_column == 1 and (by_row >= columns or rows == 1):
        return 0, max(by_row, columns)
    if by_row == 1 and (by_column >= rows or columns == 1):
        return 1, max(by_column, rows)
    return None
