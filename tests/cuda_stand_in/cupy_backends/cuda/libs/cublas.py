"""The only cuBLAS product that minitp calls directly."""

import ctypes

import ml_dtypes
import numpy as np

from minitp.check.sums import TENSOR_CORES

HOPPER = TENSOR_CORES[90]
CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_COMPUTE_32F = 68
CUBLAS_GEMM_DEFAULT = -1
DTYPES = {0: np.float32, 2: np.float16, 14: ml_dtypes.bfloat16}


class CUBLASError(RuntimeError):
    pass


def _columns(ptr, dtype, rows, columns, ld):
    """Return the column-major matrix [rows, columns] at an address."""
    if ld < rows:
        raise ValueError(f"the leading dimension {ld} is less than {rows} rows")
    item = np.dtype(dtype).itemsize
    count = (columns - 1) * ld + rows
    flat = np.frombuffer((ctypes.c_char * (count * item)).from_address(ptr), dtype=np.dtype(dtype))
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (item, ld * item))


def gemmEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute, algo
):
    from cupy.cuda import capturing

    if capturing() is not None:
        raise NotImplementedError("cuBLAS on a stream that is being captured")
    one, zero = (ctypes.cast(p, ctypes.POINTER(ctypes.c_float))[0] for p in (alpha, beta))
    assert (handle, one, zero, compute) == (1, 1.0, 0.0, CUBLAS_COMPUTE_32F)
    if Atype != Btype or Ctype not in (Atype, 0):
        raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")
    a = _columns(A, DTYPES[Atype], *((k, m) if transa else (m, k)), lda)
    b = _columns(B, DTYPES[Btype], *((n, k) if transb else (k, n)), ldb)
    a, b = (x.T if t else x for x, t in ((a, transa), (b, transb)))
    c = _columns(C, DTYPES[Ctype], m, n, ldc)
    c[...] = (a @ b if a.dtype == np.float32 else HOPPER.matmul(a, b)).astype(c.dtype)
