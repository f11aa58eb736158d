"""A stand-in for CuPy on a machine without a GPU: a GPU that is a part of this process.

With this folder in front of Python's path, `import cupy` gets NumPy's numbers behind CuPy's interface, as
much of it as minitp uses: kernels are built and run by `cuda_on_cpu`, a captured graph is the list of its
launches, NCCL is in `cupy.cuda.nccl`. What CuPy refuses is refused here: NumPy arrays among its own, 16-bit
products of more than two dimensions, arguments of kernels of the wrong type, blocks and shared memory beyond
the limits; and what it widens is widened (`types`). New memory is full of NaN and ends at a page that nobody
may touch. An array does not become a number by itself: there is one way to the host, and that is `asnumpy`.
"""

import builtins
import ctypes
import mmap
import sys
import threading
import weakref
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent.parent))  # for cuda_on_cpu, in processes without pytest

from cuda_on_cpu import build_text

from . import cuda
from .types import loop_of

__version__ = "14.2.0"
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
SCALARS = (bool, int, float, np.generic)
float16, float32, float64 = np.float16, np.float32, np.float64
int8, int32, int64, uint8, uint32, uint64, bool_ = (
    np.int8, np.int32, np.int64, np.uint8, np.uint32, np.uint64, np.bool_,
)  # fmt: skip
dtype, inf, newaxis, pi = np.dtype, float("inf"), None, np.pi


class _Pointer:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray(np.ndarray):
    """An array on the stand-in's GPU."""

    @property
    def data(self):
        return _Pointer(self.__array_interface__["data"][0])

    def get(self, stream=None):
        """CuPy makes an array without gaps first, in a `with stream:` of its own."""
        (stream or cuda.get_current_stream()).finish()
        found = np.array(self)
        if not self.flags.c_contiguous:
            cuda.back_to_entered()
        return found

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if method != "__call__" or kwargs:
            raise TypeError(f"{ufunc.__name__}.{method} of a CuPy array, with {kwargs}")
        return _operation(ufunc.__name__, ufunc, inputs, out[0] if out else None)

    def __matmul__(self, other):
        return matmul(self, other)

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return _wrapped(found) if isinstance(found, np.generic) else found

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray) and not isinstance(value, ndarray):
            raise TypeError(f"Unsupported type {type(value)}")
        super().__setitem__(index, value)

    def sum(self, axis=None, keepdims=False):
        return _reduction("sum")(self, axis, keepdims)

    def max(self, axis=None, keepdims=False):
        return _reduction("max")(self, axis, keepdims)

    def min(self, axis=None, keepdims=False):
        return _reduction("min")(self, axis, keepdims)

    def argmax(self, axis=None):
        return _reduction("argmax")(self, axis)

    def __repr__(self):
        return repr(_bare(self))

    def _no_number(self, *_):
        raise TypeError("an array on the GPU as a number of the host: use to_host")

    __bool__ = __int__ = __float__ = __index__ = item = tolist = _no_number

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of a CuPy array")


def _bare(x):
    if isinstance(x, ndarray):
        return x.view(np.ndarray)
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, (tuple, list)):
        return type(x)(_bare(part) for part in x)
    return x


def _wrapped(x):
    return np.asarray(x).view(ndarray)


def _operation(name, function, inputs, out=None):
    """function(*inputs) in the loop that CuPy has for them."""
    for x in inputs if out is None else (*inputs, out):
        if not isinstance(x, (ndarray, *SCALARS)):
            raise TypeError(f"Unsupported type {type(x)}")
    taken, made = loop_of(name, inputs)
    values = [np.asarray(_bare(x)).astype(kind, copy=False) for x, kind in zip(inputs, taken, strict=True)]
    result = np.asarray(function(*values)).astype(made, copy=False)
    if out is None:
        return _wrapped(result)
    np.copyto(_bare(out), result, casting="same_kind")
    return out


class _MemoryPool:
    """Bytes that arrays have now, and that they have had at most since blocks were last freed."""

    def __init__(self):
        self._used = self._most = 0
        self._lock = threading.RLock()  # the end of an array may come anywhere

    def took(self, room, nbytes):
        with self._lock:
            self._used += nbytes
            self._most = builtins.max(self._most, self._used)
        weakref.finalize(room, self._gave, nbytes)

    def _gave(self, nbytes):
        with self._lock:
            self._used -= nbytes

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._most

    def free_all_blocks(self):
        self._most = self._used


_pool = _MemoryPool()


def get_default_memory_pool():
    return _pool


def _memory(nbytes):
    """Zeroed bytes that end, but for 15, where a forbidden page begins."""
    size = -(-builtins.max(nbytes, 1) // PAGE) * PAGE
    room = mmap.mmap(-1, size + PAGE)
    _pool.took(room, nbytes)
    whole = np.frombuffer(room, np.uint8)
    LIBC.mprotect(ctypes.c_void_p(whole.ctypes.data + size), ctypes.c_size_t(PAGE), 0)
    _rooms[whole.ctypes.data] = room
    start = size - -(-nbytes // 16) * 16
    return whole[start : start + nbytes]


_rooms = weakref.WeakValueDictionary()  # by their address


def memory_at(pointer):
    """What has to be kept so that the memory at a pointer is not given back; None if it is not an array's."""
    for start, room in list(_rooms.items()):
        if start <= pointer < start + len(room):
            return room
    return None


def zeros(shape, dtype=float):
    dtype, shape = np.dtype(dtype), (shape,) if np.isscalar(shape) else tuple(shape)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return _memory(nbytes).view(dtype).reshape(shape).view(ndarray)


def empty(shape, dtype=float):
    found = zeros(shape, dtype)
    if found.size:
        found.reshape(-1).view(np.uint8)[:] = 0xFF
    return found


def zeros_like(a):
    return zeros(a.shape, a.dtype)


def empty_like(a):
    return empty(a.shape, a.dtype)


def asarray(a, dtype=None):
    if isinstance(a, ndarray):
        return a.astype(dtype or a.dtype, copy=False)
    a = np.asarray(a, dtype=dtype)
    found = empty(a.shape, a.dtype)
    found[...] = a.view(ndarray)
    return found


array = asarray


def asnumpy(a, stream=None):
    if cuda.capturing() is not None:
        raise RuntimeError("a copy to the host while a graph is captured")
    return a.get(stream) if isinstance(a, ndarray) else np.asarray(a)


def ascontiguousarray(a):
    return _wrapped(np.ascontiguousarray(_bare(a)))


def nonzero(a):
    return tuple(_wrapped(places) for places in np.nonzero(_bare(a)))


def copyto(dst, src, where=True):
    np.copyto(_bare(dst), _bare(src), where=_bare(where))


def matmul(a, b, out=None, dtype=None):
    """As CuPy 14: of 16-bit numbers only two dimensions, and into 16 bits."""
    if a.dtype != b.dtype:
        raise ValueError("Not supported dtype combination.")
    if a.dtype.itemsize == 2 and (dtype not in (None, a.dtype) or builtins.max(a.ndim, b.ndim) > 2):
        raise ValueError("Not supported dtype combination.")
    if out is not None:
        raise TypeError("the stand-in has no `out` here")
    return _wrapped(np.matmul(_bare(a), _bare(b), dtype=np.float32).astype(a.dtype))


def _reduction(name):
    function = getattr(np, name)

    def reduced(a, axis=None, keepdims=False):
        def wide(values):  # 16-bit numbers are added up in float32
            values = values.astype(np.float32) if name == "sum" and values.dtype.itemsize == 2 else values
            return function(values, axis=axis, keepdims=keepdims)

        return _operation(name, wide, (a,))

    return reduced


def _elementwise(name):
    return lambda *inputs, out=None: _operation(name, getattr(np, name), inputs, out)


def _forwarded(name):
    """Functions that make arrays or move their numbers, whatever dtype those have."""

    def call(*args, **kwargs):
        kwargs = {key: _bare(value) for key, value in kwargs.items()}
        return _wrapped(getattr(np, name)(*_bare(args), **kwargs))

    return call


for _name in ("argmax", "max", "min", "sum"):
    globals()[_name] = _reduction(_name)
for _name in (
    "abs", "cos", "exp", "isfinite", "isnan", "log", "maximum", "minimum", "rint", "sin", "sqrt", "tanh",
    "where",
):  # fmt: skip
    globals()[_name] = _elementwise(_name)
for _name in ("arange", "concatenate", "full", "ones", "stack"):
    globals()[_name] = _forwarded(_name)


class lib:
    class stride_tricks:
        @staticmethod
        def as_strided(a, shape, strides):
            return np.lib.stride_tricks.as_strided(_bare(a), shape, strides).view(ndarray)


class RawModule:
    """Kernels from a text, as NVRTC would compile them."""

    def __init__(self, code, options=(), backend="nvrtc"):
        if backend != "nvrtc":
            raise ValueError(backend)
        self._kernels = build_text(code, options)

    def get_function(self, name):
        return _Function(self._kernels[name])


class _Function:
    """A kernel with CuPy's way of being launched and a GPU's limits."""

    def __init__(self, kernel):
        self._kernel = kernel
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid, block, args, shared_mem=0):
        if (
            builtins.max((*grid, 1, 1)[1:3]) > 65535
            or int(np.prod(block)) > 1024
            or builtins.min(*grid, *block) < 1
        ):
            raise ValueError(f"{self._kernel.name}: a grid of {grid}, blocks of {block}")
        if shared_mem > builtins.min(self.max_dynamic_shared_size_bytes, 227 << 10):
            raise ValueError(f"{self._kernel.name}: {shared_mem} bytes of shared memory")
        for arg in args:
            if arg is None:
                raise TypeError(f"{self._kernel.name}: None, which CuPy passes as no argument: a crash")
            if isinstance(arg, np.ndarray) and not isinstance(arg, ndarray):
                raise TypeError(f"Unsupported type {type(arg)}")
        self._kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        cuda.run(lambda: self._kernel(grid, block, args, shared_mem))
