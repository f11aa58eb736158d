"""A compiler that builds the kernels of minitp/cuda for the CPU and launches them on NumPy arrays.

    kernel = CpuCompiler(np.float16).kernel("rms_norm.cu", "rms_norm")
    kernel((rows,), (128,), (x, None, weight, out, np.int32(width), np.float32(eps)))

Kernels are launched like CuPy's RawKernel, but more strictly: an argument of the wrong type is refused, where
a GPU would misread it.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from minitp.cuda import compiler
from minitp.cuda.compiler import compile_options

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "minitp" / "cuda" / "kernels"
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)')
SCALARS = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
}
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
POINTED = {
    "Half": NARROW,
    "float": (np.dtype(np.float32),),
    "double": (np.dtype(np.float64),),
    "int": (np.dtype(np.int32),),
    "unsigned": (np.dtype(np.uint32),),
    "long long": (np.dtype(np.int64),),
    "unsigned long long": (np.dtype(np.uint64),),
    "signed char": (np.dtype(np.int8),),
}


class CpuCompiler:
    """A replacement for minitp.cuda.compiler.Compiler, for a GPU with or without clusters."""

    def __init__(self, dtype, has_clusters=False):
        self._dtype, self.has_clusters = np.dtype(dtype), has_clusters

    def kernel(self, file, name, **defines):
        built = build_text(compiler.whole_source(file), compile_options(self._dtype, **defines))[name]
        return compiler.Kernel(built, Kernel.__call__ if self.has_clusters else None)

    def lend(self, array):
        """Return an array's address, for a structure, and a function that returns its content later."""
        return array.ctypes.data, lambda: array


def build_text(source, options=()):
    """Build the kernels in a text, as {name: Kernel}; the library is kept for later processes."""
    headers = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.h"))]
    options = [option for option in options if option.startswith("-D")]
    key = hashlib.sha256("\0".join([source, *headers, *options]).encode()).hexdigest()[:24]
    folder = build_folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    parameters = dict(KERNEL.findall(source))
    if not library.exists():
        _compile(source, options, library)
    loaded = ctypes.PyDLL(str(library))  # keeps the GIL, so ranks that are threads run one kernel at a time
    there = [
        kernel for kernel in parameters if hasattr(loaded, f"launch_{kernel}")
    ]  # macros may exclude some
    return {kernel: Kernel(loaded, kernel, parameters[kernel]) for kernel in there}


def build_folder():
    """Return the folder of the built libraries."""
    default = Path(tempfile.gettempdir()) / f"minitp-cuda-on-cpu-{os.getuid()}"
    return Path(os.environ.get("CUDA_ON_CPU", default))


def _compile(source, options, library):
    preprocess = ["g++", "-E", "-P", "-x", "c++", *options, "-"]
    preprocessed = subprocess.run(preprocess, input=source, capture_output=True, text=True, check=True).stdout
    launchers = "".join(
        f'extern "C" void launch_{name}(dim3 grid, dim3 block, size_t shared, int cluster, bool dependent, '
        "void (*previous)(), void **values) { "
        f"cuda_on_cpu::launch({name}, grid, block, shared, cluster, dependent, previous, values); }}\n"
        for name, _ in KERNEL.findall(preprocessed)
    )
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        path, built = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        path.write_text(source + "\n" + launchers, encoding="utf-8")
        command = [
            "g++",
            "-std=c++17",
            "-O2",
            "-g",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            "-Wall",
            "-Werror",
        ]
        command += [
            "-Wno-unknown-pragmas",
            "-Wno-unused-function",
            "-Wno-unused-variable",
            "-U_FORTIFY_SOURCE",
        ]
        command += [
            *options,
            "-include",
            str(HERE / "cuda_on_cpu.h"),
            str(path),
            "-o",
            str(built),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ cannot compile the kernels: {done.stderr}")
        os.replace(built, library)


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


Previous = ctypes.PYFUNCTYPE(None)


class Kernel:
    """A kernel built for the CPU; call it as kernel(grid, block, args, shared_mem=0)."""

    # The types of launch_NAME's arguments.
    ARGUMENTS = (
        *(_Dim3, _Dim3, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_bool, Previous, ctypes.POINTER(ctypes.c_void_p)),
    )

    def __init__(self, library, name, parameters):
        self.name = name
        self._launch = getattr(library, f"launch_{name}")
        self._launch.argtypes = self.ARGUMENTS
        self._launch.restype = None
        self.parameters = [" ".join(one.split()) for one in parameters.split(",")]
        self.max_dynamic_shared_size_bytes = 48 << 10  # callers raise it if they need more, like with CuPy

    def __call__(self, grid, block, args, shared_mem=0, dependent=False, cluster=1):
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(args)}")
        values = [self.value(*pair) for pair in zip(self.parameters, args, strict=True)]
        self.launch(grid, block, values, shared_mem, dependent, cluster)

    def launch(self, grid, block, values, shared_mem, dependent, cluster, previous=None):
        """Run the kernel with arguments that are C values.

        `previous` is called when the first cluster of blocks waits for the previous kernel.
        """
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{self.name}: {shared_mem} bytes of shared memory exceed the kernel's limit")
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = _Dim3(*_three(grid)), _Dim3(*_three(block)), shared_mem
        self._launch(*sizes, cluster, dependent, Previous(previous) if previous else Previous(), pointers)

    def values_at(self, pointers):
        """Return copies of the arguments at these addresses, as a driver makes them at a launch."""
        kinds = [_c_type(_kind(parameter)) for parameter in self.parameters]
        return [
            kind.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(kind)))
            for kind, at in zip(kinds, pointers, strict=True)
        ]

    def value(self, parameter, argument):
        """Convert an argument to the C type of its parameter; raise TypeError if it has another type."""
        kind = _kind(parameter)
        if not kind.endswith("*"):
            expected = SCALARS[kind]
            if type(argument) is not expected:
                raise TypeError(f"{self.name}: {parameter} must be {expected.__name__}, not {argument!r}")
            return _c_type(kind)(argument.item())
        if argument is None:
            return ctypes.c_void_p(0)
        if type(argument) is np.uint64:  # an address
            return ctypes.c_void_p(int(argument))
        pointed = kind.removesuffix("*").strip()
        if argument.dtype not in POINTED[pointed]:
            raise TypeError(f"{self.name}: {parameter} must be {POINTED[pointed]}, not {argument.dtype}")
        return ctypes.c_void_p(np.asarray(argument).__array_interface__["data"][0])


def _kind(parameter):
    """Return the type of a C parameter without its name and qualifiers, such as "Half *"."""
    kind = re.sub(r"\b(const|__restrict__)\b", "", parameter)
    return " ".join(re.sub(r"\w+$", "", kind.strip()).split())


def _c_type(kind):
    return ctypes.c_void_p if kind.endswith("*") else np.ctypeslib.as_ctypes_type(SCALARS[kind])


def _three(size):
    return (*size, 1, 1)[:3]
