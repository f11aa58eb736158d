"""Ranks on the GPUs of the stand-in for CuPy, as threads of this process or as processes."""

import importlib
import os
import sys
from contextlib import contextmanager

from cuda_on_cpu import build_folder
from paths import STAND_IN

from minitp.comm import run_threads
from minitp.launch.transport import select_comm
from minitp.load import load_model
from minitp.loading.source import open_model

MODULES = ("cupy", "cupy_backends", "cupyx")
# For processes: `import cupy` finds the stand-in there, and the stand-in the kernels that have been built.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")])),
    "CUDA_ON_CPU": str(build_folder()),
}


@contextmanager
def stand_in():
    """While this lasts `import cupy` gets the stand-in, a fresh one; then whatever it got before."""
    before = _taken_out()
    sys.path.insert(0, str(STAND_IN))
    try:
        yield importlib.import_module("cupy")
    finally:
        sys.path.remove(str(STAND_IN))
        _taken_out()
        sys.modules.update(before)


def _taken_out():
    """All modules of CuPy's, which are no more among those that have been imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in MODULES]
    return {name: sys.modules.pop(name) for name in names}


def run_on_gpus(ranks, function, transport="nccl"):
    """function(comm) on so many ranks, each with a GPU of its own; their results in rank order."""

    def rank(host):
        comm = select_comm(host, "cuda", transport)
        result = function(comm)
        comm.close()
        return result

    return run_threads(ranks, rank)


def model_on_gpu(directory, comm, dtype="float16", **options):
    """A rank's Model; `options` as of load_model."""
    from minitp.cuda.gpu import with_dtype

    source = open_model(str(directory), comm.size)
    return load_model(source, comm, with_dtype(comm.gpu, dtype, source.config.dtype), **options)
