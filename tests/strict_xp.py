"""A stand-in for CuPy on a machine without a GPU: NumPy's numbers behind CuPy's refusals.

`StrictXp` is the array module and `StrictArray` its array. CuPy neither takes nor gives NumPy arrays
silently, and nor do these: NumPy's own functions, `np.asarray` included, raise TypeError on a StrictArray,
operators and functions take only StrictArrays and Python scalars, and the module has only what is listed
below, all of which CuPy has too. A float64 result raises as well: a GPU would compute it, slowly, and nobody
would notice. `to_device` and `to_host` are the only ways in and out.
"""

import operator

import numpy as np

SCALARS = (bool, int, float)


class StrictArray:
    """A NumPy array that nobody sees."""

    __hash__ = None

    def __init__(self, array):
        if array.dtype == np.float64 or np.issubdtype(array.dtype, np.complexfloating):
            raise TypeError(f"the result is {array.dtype}: wider than anything minitp computes in")
        self._array = array

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    T = property(lambda self: StrictArray(self._array.T))

    def astype(self, dtype, copy=True):
        return StrictArray(self._array.astype(dtype, copy=copy))

    def copy(self):
        return StrictArray(self._array.copy())

    def reshape(self, *shape):
        return StrictArray(self._array.reshape(*shape))

    def max(self, axis=None, keepdims=False):
        return StrictArray(np.asarray(self._array.max(axis=axis, keepdims=keepdims)))

    def sum(self, axis=None, keepdims=False):
        return StrictArray(np.asarray(self._array.sum(axis=axis, keepdims=keepdims)))

    def transpose(self, *axes):
        return StrictArray(self._array.transpose(*axes))

    def __len__(self):
        return len(self._array)

    def __getitem__(self, index):
        return StrictArray(np.asarray(self._array[_unwrap_index(index)]))

    def __setitem__(self, index, value):
        self._array[_unwrap_index(index)] = _unwrap(value)


def _operator(function):
    def method(self, other):
        return StrictArray(np.asarray(function(self._array, _unwrap(other))))

    return method


def _reflected(function):
    def method(self, other):
        return StrictArray(np.asarray(function(_unwrap(other), self._array)))

    return method


def _unary(function):
    return lambda self: StrictArray(np.asarray(function(self._array)))


def _in_place(function):
    def method(self, other):
        function(self._array, _unwrap(other))
        return self

    return method


def _refusal(name):
    def method(self, *args, **kwargs):
        raise TypeError(f"{name}: a device array does not turn into a host value by itself")

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    _function = getattr(operator, f"__{_name}__")
    setattr(StrictArray, f"__{_name}__", _operator(_function))
    setattr(StrictArray, f"__r{_name}__", _reflected(_function))
    setattr(StrictArray, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))
for _name in ("lt", "le", "eq", "ne", "ge", "gt"):
    setattr(StrictArray, f"__{_name}__", _operator(getattr(operator, _name)))
for _name in ("neg", "abs", "invert"):
    setattr(StrictArray, f"__{_name}__", _unary(getattr(operator, _name)))
for _name in ("array", "array_ufunc", "array_function", "float", "int", "bool", "index", "complex", "iter"):
    setattr(StrictArray, f"__{_name}__", _refusal(f"__{_name}__"))


def _unwrap(value):
    """The NumPy array or Python scalar in `value`, an operand."""
    if isinstance(value, StrictArray):
        return value._array
    if type(value) in SCALARS:
        return value
    raise TypeError(f"{type(value).__name__} among device arrays: expected a StrictArray or a Python scalar")


def _unwrap_index(index):
    if isinstance(index, tuple):
        return tuple(_unwrap_index(part) for part in index)
    if index is None or index is Ellipsis or type(index) is int:
        return index
    if isinstance(index, StrictArray):
        return index._array
    if isinstance(index, slice):
        if all(part is None or type(part) is int for part in (index.start, index.stop, index.step)):
            return index
        raise TypeError(f"{index}: expected Python integers")
    raise TypeError(f"index {type(index).__name__}: expected int, slice, None, Ellipsis or a StrictArray")


def _unwrap_argument(value):
    """The same for an argument of a function: shapes, axes, dtypes and tuples of arrays as well."""
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrap_argument(part) for part in value)
    if value is None or isinstance(value, (np.dtype, type)):
        return value
    return _unwrap(value)


# What CuPy has under the same name with the same meaning. CuPy's `asarray` would copy a NumPy array to the
# device; that is for the loader to do, not for an operation, so here it refuses like the others.
FUNCTIONS = (
    "abs", "arange", "argmax", "argmin", "asarray", "concatenate", "copyto", "cos", "empty", "empty_like",
    "exp", "full", "isfinite", "isnan", "log", "matmul", "max", "maximum", "mean", "min", "minimum",
    "nonzero", "ones", "rint", "sin", "sqrt", "stack", "sum", "tanh", "where", "zeros", "zeros_like",
)  # fmt: skip
DTYPES = ("bool_", "int8", "int32", "int64", "float16", "float32")


class _StrictXp:
    """The namespace; anything not listed is an AttributeError."""

    __name__ = "strict_xp"
    inf = float("inf")
    pi = np.pi
    newaxis = None


def _strict(function):
    def call(*args, **kwargs):
        if function is np.matmul and "out" in kwargs:
            raise TypeError("matmul: CuPy's takes no `out`")
        args = [_unwrap_argument(arg) for arg in args]
        kwargs = {name: _unwrap_argument(value) for name, value in kwargs.items()}
        found = function(*args, **kwargs)
        if isinstance(found, tuple):
            return tuple(StrictArray(np.asarray(part)) for part in found)
        return StrictArray(np.asarray(found))

    return staticmethod(call)


for _name in FUNCTIONS:
    setattr(_StrictXp, _name, _strict(getattr(np, _name)))
for _name in DTYPES:
    setattr(_StrictXp, _name, getattr(np, _name))

StrictXp = _StrictXp()


def to_device(array):
    """A NumPy array as a StrictArray; it is copied."""
    return StrictArray(np.array(array))


def to_host(value):
    """The NumPy array in a StrictArray."""
    if not isinstance(value, StrictArray):
        raise TypeError(f"{type(value).__name__}: not an array of this module")
    return value._array
