"""CuPy as the array module of `ops`: all of it as it is, but for the matrix product."""

import numpy as np


class Arrays:
    """What `ops` calls `xp` on a GPU.

    `cupy.matmul` of 16-bit matrices gives 16-bit results, not the float32 sums that `ops` asks for with
    `dtype=float32`; of three dimensions it takes no bfloat16 at all. cuBLAS does: so `matmul` goes there.

    Parameters
    ----------
    cupy : module
    """

    def __init__(self, cupy):
        from cupy_backends.cuda.libs import cublas

        self._cupy, self._cublas = cupy, cublas
        runtime = cupy.cuda.runtime
        self._types = {
            "float32": runtime.CUDA_R_32F,
            "float16": runtime.CUDA_R_16F,
            "bfloat16": runtime.CUDA_R_16BF,
        }
        self._one, self._zero = (
            np.ones(1, np.float32),
            np.zeros(1, np.float32),
        )  # cuBLAS reads their addresses

    def __getattr__(self, name):
        return getattr(self._cupy, name)

    def matmul(self, a, b, dtype=None):
        """a [n, k] @ b [k, m] -> [n, m] in `dtype` (that of `a` if None), summed in float32.

        The transpose of a matrix whose rows lie behind one another is as good as one that lies so itself.
        """
        out = self._cupy.empty((a.shape[0], b.shape[1]), dtype=a.dtype if dtype is None else dtype)  # [n, m]
        self.matmul_into(a, b, out)
        return out

    def matmul_into(self, a, b, out):
        """The same into `out`, whose rows may lie apart from each other."""
        (n, k), m = a.shape, b.shape[1]
        if 0 in (n, k, m):
            out[...] = 0
            return
        a, b = self._readable(a), self._readable(b)
        # cuBLAS counts columns first, so what it sees is the transpose of everything: out.T = b.T @ a.T.
        (transpose_a, step_a), (transpose_b, step_b) = layout(a), layout(b)
        self._cublas.gemmEx(
            self._cupy.cuda.device.get_cublas_handle(),
            *(transpose_b, transpose_a, m, n, k, self._one.ctypes.data),
            *(b.data.ptr, self._types[b.dtype.name], step_b),
            *(a.data.ptr, self._types[a.dtype.name], step_a, self._zero.ctypes.data),
            *(out.data.ptr, self._types[out.dtype.name], max(m, out.strides[0] // out.itemsize)),
            *(self._cublas.CUBLAS_COMPUTE_32F, self._cublas.CUBLAS_GEMM_DEFAULT),
        )

    def _readable(self, a):
        return a if layout(a) is not None else self._cupy.ascontiguousarray(a)


def layout(a):
    """Whether a matrix's columns lie behind one another, and the distance of two in elements.

    (0, step) for rows, (1, step) for columns, None if its elements lie apart in both directions.
    """
    (rows, columns), (by_row, by_column) = a.shape, (stride // a.itemsize for stride in a.strides)
    if by_column == 1 and (by_row >= columns or rows == 1):
        return 0, max(by_row, columns)
    if by_row == 1 and (by_column >= rows or columns == 1):
        return 1, max(by_column, rows)
    return None
