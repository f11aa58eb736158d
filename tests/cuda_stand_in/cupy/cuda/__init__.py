"""Streams that do everything at once, and graphs that are lists of what they were told to do."""

import threading
from types import SimpleNamespace

from . import device, nccl, runtime

DEVICES = 4
_here = threading.local()  # a rank may be a thread


class Device:
    """One of the GPUs."""

    def __init__(self, number=None):
        self.id = getattr(_here, "device", 0) if number is None else number

    def use(self):
        if not 0 <= self.id < runtime.getDeviceCount():
            raise runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        _here.device = self.id
        return self

    @property
    def attributes(self):
        return {"MultiProcessorCount": 4, "L2CacheSize": 1 << 16}

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


class Stream:
    """Where launches go; what goes there is done at once."""

    def __init__(self, non_blocking=False):
        self.ptr = id(self)
        self.non_blocking = non_blocking

    def use(self):
        _here.stream = self
        return self

    def __enter__(self):
        self._before = getattr(_here, "stream", None)
        return self.use()

    def __exit__(self, *exc):
        _here.stream = self._before

    def synchronize(self):
        if capturing() is not None:
            raise RuntimeError("synchronize while a graph is captured")

    def record(self, event=None):
        return event or Event()

    def wait_event(self, event):
        pass

    def begin_capture(self):
        if get_current_stream() is not self or not self.non_blocking:
            raise RuntimeError("a capture on another stream than the current one")
        _here.captured = []

    def end_capture(self):
        graph, _here.captured = Graph(_here.captured), None
        return graph


class Graph:
    """What was launched between begin_capture and end_capture, to be done again."""

    def __init__(self, launches):
        self.launches = launches

    def launch(self, stream=None):
        for launch in self.launches:
            launch()


class Event:
    def __init__(self, **options):
        pass

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass

    @property
    def done(self):
        return True


def get_elapsed_time(start, end):
    return 1.0


def get_current_stream():
    return getattr(_here, "stream", None) or NULL


NULL = Stream()
Stream.null = NULL


def capturing():
    """The list of the graph that is being captured, or None."""
    return getattr(_here, "captured", None)


def run(launch):
    """Do this now, or whenever the graph that is being captured is launched."""
    if capturing() is None:
        launch()
    else:
        capturing().append(launch)


memory = SimpleNamespace(OutOfMemoryError=MemoryError)
