"""Functions of the CUDA runtime: the number of GPUs, copies, and memory that other processes can map."""

import ctypes
import mmap
import os
import tempfile

import numpy as np

CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF = 0, 2, 14
memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3


class CUDARuntimeError(RuntimeError):
    pass


def getDeviceCount():
    return int(os.environ.get("STAND_IN_GPUS", "4"))


def getDeviceProperties(number):
    return {"name": b"a stand-in for a GPU", "totalGlobalMem": 1 << 33, "major": 9, "minor": 0}


def runtimeGetVersion():
    return 12090


def driverGetVersion():
    return 12090


def deviceCanAccessPeer(device, peer):
    return int(os.environ.get("STAND_IN_PEERS", "1"))


def memcpyAsync(dst, src, nbytes, kind, stream):
    from .stream import stream_of

    stream_of(stream).give(lambda: ctypes.memmove(dst, src, nbytes), (dst, src))


def memsetAsync(ptr, value, nbytes, stream):
    from .stream import stream_of

    stream_of(stream).give(lambda: ctypes.memset(ptr, value, nbytes), (ptr,))


_mapped = {}


def malloc(nbytes):
    """Allocate memory in a file, which other processes map by its name."""
    descriptor, path = tempfile.mkstemp(prefix="minitp-stand-in-", dir="/dev/shm")
    os.ftruncate(descriptor, nbytes)
    return _map(descriptor, path)


def free(ptr):
    _, path = _mapped.pop(ptr)
    os.unlink(path)


def ipcGetMemHandle(ptr):
    return _mapped[ptr][1].encode().ljust(64, b"\0")


def ipcOpenMemHandle(handle, flags=1):
    path = handle.rstrip(b"\0").decode()
    return _map(os.open(path, os.O_RDWR), path)


def ipcCloseMemHandle(ptr):
    del _mapped[ptr]


def _map(descriptor, path):
    room = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    address = np.frombuffer(room, np.uint8).ctypes.data
    _mapped[address] = room, path
    return address
