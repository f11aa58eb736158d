"""A stand-in for CuPy on a machine without a GPU; its GPU is simulated within the process.

With this folder first in Python's path, `import cupy` gets NumPy arrays with as much of CuPy's interface as
minitp uses. `cuda_on_cpu` builds and runs kernels, a captured graph is the list of its launches, and NCCL is
in `cupy.cuda.nccl`. Like CuPy, the stand-in rejects NumPy arrays mixed with its own, 16-bit products of more
than two dimensions, kernel arguments of the wrong type, and blocks and shared memory beyond the limits; and
it widens dtypes where CuPy does (`types`). New memory is full of NaN and ends at a protected page. Arrays do
not convert to numbers implicitly: `asnumpy` is the only way to the host.
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
        """Copy to the host; like CuPy, make an array contiguous first in an inner `with stream:`."""
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
        raise TypeError("a GPU array was used as a number on the host: call to_host first")

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
    """Compute function(*inputs) with the dtypes of the loop that CuPy would choose."""
    for x in inputs if out is None else (*inputs, out):
        if not isinstance(x, (ndarray, *SCALARS)):
            raise TypeError(f"Unsupported type {type(x)}")
    kinds, result_kind = loop_of(name, inputs)
    values = [np.asarray(_bare(x)).astype(kind, copy=False) for x, kind in zip(inputs, kinds, strict=True)]
    result = np.asarray(function(*values)).astype(result_kind, copy=False)
    if out is None:
        return _wrapped(result)
    np.copyto(_bare(out), result, casting="same_kind")
    return out


class _MemoryPool:
    """A count of the bytes in use by arrays, and of their peak since blocks were last freed."""

    def __init__(self):
        self._used = self._most = 0
        self._lock = threading.RLock()  # an array may be finalized at any time

    def allocate(self, room, nbytes):
        with self._lock:
            self._used += nbytes
            self._most = builtins.max(self._most, self._used)
        weakref.finalize(room, self._free, nbytes)

    def _free(self, nbytes):
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
    """Return zeroed bytes that end where a protected page begins, or at most 15 bytes before it."""
    size = -(-builtins.max(nbytes, 1) // PAGE) * PAGE
    room = mmap.mmap(-1, size + PAGE)
    _pool.allocate(room, nbytes)
    whole = np.frombuffer(room, np.uint8)
    LIBC.mprotect(ctypes.c_void_p(whole.ctypes.data + size), ctypes.c_size_t(PAGE), 0)
    _rooms[whole.ctypes.data] = room
    start = size - -(-nbytes // 16) * 16
    return whole[start : start + nbytes]


_rooms = weakref.WeakValueDictionary()  # address -> memory map


def memory_at(pointer):
    """Return the object that keeps the memory at a pointer alive, or None if no array has that memory."""
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
    """Multiply like CuPy 14, which supports only two-dimensional 16-bit matrices with 16-bit results."""
    if a.dtype != b.dtype:
        raise ValueError("Not supported dtype combination.")
    if a.dtype.itemsize == 2 and (dtype not in (None, a.dtype) or builtins.max(a.ndim, b.ndim) > 2):
        raise ValueError("Not supported dtype combination.")
    if out is not None:
        raise TypeError("the stand-in's matmul does not support `out`")
    return _wrapped(np.matmul(_bare(a), _bare(b), dtype=np.float32).astype(a.dtype))


def _reduction(name):
    function = getattr(np, name)

    def reduced(a, axis=None, keepdims=False):
        def wide(values):  # 16-bit numbers are summed in float32
            values = values.astype(np.float32) if name == "sum" and values.dtype.itemsize == 2 else values
            return function(values, axis=axis, keepdims=keepdims)

        return _operation(name, wide, (a,))

    return reduced


def _elementwise(name):
    return lambda *inputs, out=None: _operation(name, getattr(np, name), inputs, out)


def _forwarded(name):
    """Return a function that creates arrays or moves their elements, for any dtype."""

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
    """A module of kernels compiled from a text, as NVRTC would do."""

    def __init__(self, code, options=(), backend="nvrtc"):
        if backend != "nvrtc":
            raise ValueError(backend)
        self._kernels = build_text(code, options)

    def get_function(self, name):
        return _Function(self._kernels[name])


class _Function:
    """A kernel that is launched like CuPy's, with a GPU's limits."""

    def __init__(self, kernel):
        self.name, self._kernel = kernel.name, kernel
        self.max_dynamic_shared_size_bytes = 48 << 10
        cuda.driver.functions[id(self)] = self

    @property
    def kernel(self):
        return _Pointer(id(self))

    def __call__(self, grid, block, args, shared_mem=0):
        for arg in args:
            if arg is None:
                raise TypeError(f"{self._kernel.name}: CuPy would drop the argument None, and crash")
            if isinstance(arg, np.ndarray) and not isinstance(arg, ndarray):
                raise TypeError(f"Unsupported type {type(arg)}")
        values = [self._kernel.value(*pair) for pair in zip(self._kernel.parameters, args, strict=True)]
        cuda.run(self.checked_launch(grid, block, values, shared_mem))

    def launch_values(self, grid, block, pointers, shared_mem, dependent, cluster):
        """Launch the kernel with the arguments at some addresses, which are copied."""
        values = self._kernel.values_at(pointers)
        cuda.run(self.checked_launch(grid, block, values, shared_mem, dependent, cluster))

    def checked_launch(self, grid, block, values, shared_mem, dependent=False, cluster=1):
        """Return a launch of the kernel that is within a GPU's limits."""
        if (
            builtins.max((*grid, 1, 1)[1:3]) > 65535
            or int(np.prod(block)) > 1024
            or builtins.min(*grid, *block) < 1
            or cluster > 8
            or grid[0] % cluster
        ):
            raise ValueError(f"{self.name}: a grid of {grid}, blocks of {block}, clusters of {cluster}")
        if shared_mem > builtins.min(self.max_dynamic_shared_size_bytes, 227 << 10):
            raise ValueError(f"{self.name}: {shared_mem} bytes of shared memory")
        self._kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        return cuda.driver.Launch(self._kernel, grid, block, values, shared_mem, dependent, cluster)
