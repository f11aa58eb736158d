"""Helpers that run ranks on the GPUs of the stand-in for CuPy, as threads or as processes."""

import importlib
import os
import sys
from contextlib import contextmanager
from unittest.mock import patch

from cuda_on_cpu import build_folder
from paths import STAND_IN

from minitp.comm import run_threads
from minitp.launch.transport import select_comm
from minitp.load import load_model
from minitp.loading.source import open_model

MODULES = ("cupy", "cupy_backends", "cupyx")
# The environment for processes, in which `import cupy` finds the stand-in and reuses kernels already built.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")])),
    "CUDA_ON_CPU": str(build_folder()),
}


@contextmanager
def stand_in():
    """Make `import cupy` get a new stand-in within a `with` block."""
    before = _remove_cupy()
    sys.path.insert(0, str(STAND_IN))
    try:
        cupy = importlib.import_module("cupy")
        with patch("minitp.cuda.launch.driver_launch", lambda: cupy.cuda.driver.cuLaunchKernelEx):
            yield cupy
    finally:
        sys.path.remove(str(STAND_IN))
        _remove_cupy()
        sys.modules.update(before)


def _remove_cupy():
    """Remove CuPy's modules from `sys.modules`, and return them by name."""
    names = [name for name in sys.modules if name.partition(".")[0] in MODULES]
    return {name: sys.modules.pop(name) for name in names}


def run_on_gpus(ranks, function, transport="nccl"):
    """Run function(comm) on `ranks` ranks, each with its own GPU; return the results in rank order."""

    def rank(host):
        comm = select_comm(host, "cuda", transport)
        result = function(comm)
        comm.close()
        return result

    return run_threads(ranks, rank)


def model_on_gpu(directory, comm, dtype="float16", split=None, **options):
    """Load a rank's Model; `options` are those of load_model."""
    from minitp.cuda.gpu import with_dtype

    source = open_model(str(directory), comm.size, split=split)
    return load_model(source, comm, with_dtype(comm.gpu, dtype, source.config.dtype), **options)
