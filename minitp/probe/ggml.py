"""A tensor of ggml, the library under llama.cpp, as a callback gets it in C."""

import ctypes

import ml_dtypes
import numpy as np

from minitp.errors import InputError

DTYPES = {0: np.float32, 1: np.float16, 26: np.int32, 27: np.int64, 30: ml_dtypes.bfloat16}  # by ggml_type
MOST_SOURCES, MOST_AXES = 10, 4


class GgmlTensor(ctypes.Structure):
    """The struct ggml_tensor of ggml.h, as it has been since the end of 2024."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MOST_AXES),
        ("nb", ctypes.c_size_t * MOST_AXES),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MOST_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Ggml:
    """The functions of a loaded ggml library.

    Parameters
    ----------
    library : ctypes.CDLL
    """

    def __init__(self, library):
        try:
            self._get_name, self._op_name = library.ggml_get_name, library.ggml_op_name
            self._tensor_get = library.ggml_backend_tensor_get
        except AttributeError as error:
            raise InputError(f"not the ggml library that llama.cpp uses: {error}") from error
        self._get_name.restype = self._op_name.restype = ctypes.c_char_p
        self._get_name.argtypes, self._op_name.argtypes = [ctypes.c_void_p], [ctypes.c_int]
        sizes = [ctypes.c_size_t, ctypes.c_size_t]
        self._tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *sizes]

    def tensor(self, address):
        """Return the GgmlTensor at an address."""
        tensor = GgmlTensor.from_address(address)
        if self._get_name(address) != tensor.name:
            raise InputError("this version of ggml has another struct ggml_tensor than the probe knows")
        return tensor

    def operation(self, tensor):
        """Return the name of the operation that computes a tensor, such as MUL_MAT."""
        return self._op_name(tensor.op).decode()

    def source(self, tensor, number):
        """Return an input of a tensor's operation, or None."""
        address = tensor.src[number]
        return None if address is None else self.tensor(address)

    def read(self, tensor):
        """Return a copy of a tensor as a NumPy array of four axes, which are in the reverse order of `ne`."""
        dtype = DTYPES.get(tensor.type)
        if dtype is None:
            raise InputError(
                f"{tensor.name.decode()} has ggml type {tensor.type}, which the probe cannot read; if it is "
                "a quantized cache, leave out type_k and type_v"
            )
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        size = np.dtype(dtype).itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        data = ctypes.create_string_buffer(size)
        self._tensor_get(ctypes.addressof(tensor), data, 0, size)
        return np.ndarray(shape, dtype, data, strides=strides).copy()
