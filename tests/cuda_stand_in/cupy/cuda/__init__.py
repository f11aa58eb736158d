"""The part of `cupy.cuda` that minitp uses; the streams are in `stream`."""

from types import SimpleNamespace

from . import device, driver, nccl, runtime
from .stream import (
    Event,
    Graph,
    Stream,
    _thread,
    back_to_entered,
    capturing,
    get_current_stream,
    get_elapsed_time,
    run,
    stream_of,
)

__all__ = [
    "DEVICES",
    "Device",
    "Event",
    "Graph",
    "Stream",
    "back_to_entered",
    "capturing",
    "device",
    "driver",
    "get_current_stream",
    "get_elapsed_time",
    "memory",
    "nccl",
    "run",
    "runtime",
    "stream_of",
]
DEVICES = 4


class Device:
    """One of the GPUs."""

    def __init__(self, number=None):
        self.id = getattr(_thread, "device", 0) if number is None else number

    def use(self):
        if not 0 <= self.id < runtime.getDeviceCount():
            raise runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        _thread.device = self.id
        return self

    @property
    def attributes(self):
        return {"MultiProcessorCount": 4, "L2CacheSize": 1 << 9}

    @property
    def compute_capability(self):
        return "90"

    @property
    def mem_info(self):
        return 1 << 32, 1 << 33

    @property
    def pci_bus_id(self):
        return f"0000:{self.id:02X}:00.0"

    def synchronize(self):
        pass


memory = SimpleNamespace(OutOfMemoryError=MemoryError)
