"""Streams, events and graphs.

A thread's current stream runs its work at once, like NumPy's arithmetic, which replaces CuPy's. Work for any
other stream is delayed until something waits for that stream or it becomes current, because a GPU does not
guarantee that it runs earlier. So code that reads on one stream what another stream should have written reads
the old contents.

As in CuPy, the end of `with stream:` makes the stream of the enclosing `with` current, or the null stream if
there is none, whatever `use()` had chosen.
"""

import threading
import weakref
from functools import partial
from time import perf_counter

from .driver import Launch

_thread = threading.local()  # a rank may be a thread
_streams = weakref.WeakValueDictionary()  # ptr -> Stream


class Stream:
    """A queue of launches and copies."""

    def __init__(self, non_blocking=False):
        self.ptr = id(self)
        self.non_blocking = non_blocking
        self._waiting = []  # (work, the memory that it needs), in order
        self.given = self.done_count = 0
        _streams[self.ptr] = self

    def use(self):
        _thread.stream = self
        self.finish()
        return self

    def __enter__(self):
        _entered().append(self)
        return self.use()

    def __exit__(self, *exc):
        _entered().pop()
        back_to_entered()

    def give(self, work, pointers=()):
        """Run `work` now if this stream is current, later if not; during a capture, add it to the graph.

        The memory at `pointers` is kept alive until the work is done.
        """
        from .. import memory_at

        if capturing() is not None:
            capturing().append(work)
            return
        self.given += 1
        if self is get_current_stream():
            self.done_count += 1
            work()
        else:
            self._waiting.append((work, [memory_at(pointer) for pointer in pointers]))

    def finish(self, count=None):
        """Do the delayed work: all of it, or the first `count` pieces that this stream was given."""
        while self._waiting and (count is None or self.done_count < count):
            work, _ = self._waiting.pop(0)
            self.done_count += 1
            work()

    def synchronize(self):
        if capturing() is not None:
            raise RuntimeError("synchronize while a graph is captured")
        self.finish()

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        event.synchronize()

    def begin_capture(self):
        if get_current_stream() is not self or not self.non_blocking:
            raise RuntimeError("a capture needs the current stream, and not the null stream")
        _thread.captured = []

    def end_capture(self):
        graph, _thread.captured = Graph(_thread.captured), None
        return graph


class Graph:
    """The launches between begin_capture and end_capture, which can be repeated.

    Every second kernel, if it is a dependent, runs up to where it waits before the previous kernel starts.
    The next time the graph is launched, these are the other kernels.
    """

    def __init__(self, launches):
        self.launches, self._count = launches, 0

    def launch(self, stream=None):
        self._count += 1
        at = 0
        while at < len(self.launches):
            first, *rest = self.launches[at : at + 2]
            early = rest and at % 2 == self._count % 2 and getattr(rest[0], "dependent", False)
            early = early and isinstance(first, Launch)  # a collective waits for ranks that need this kernel
            run = partial(rest[0], first) if early else first
            (stream or get_current_stream()).give(run)
            at += 1 + bool(early)


class Event:
    """A position in a stream."""

    def __init__(self, **options):
        self._stream, self._count, self.at = None, 0, 0.0

    def record(self, stream=None):
        self._stream = stream or get_current_stream()
        self._count, self.at = self._stream.given, perf_counter()

    def synchronize(self):
        if self._stream is not None:
            self._stream.finish(self._count)

    @property
    def done(self):
        return self._stream is None or self._stream.done_count >= self._count


def get_elapsed_time(start, end):
    return 1000 * (end.at - start.at)


NULL = Stream()
Stream.null = NULL


def get_current_stream():
    return getattr(_thread, "stream", None) or NULL


def stream_of(ptr):
    """Return the Stream at an address, as passed to CUDA functions."""
    return _streams[ptr] if ptr else NULL


def back_to_entered():
    """Select the enclosing stream, as CuPy does at the end of any `with stream:`, its own included."""
    (_entered()[-1] if _entered() else NULL).use()


def _entered():
    if not hasattr(_thread, "entered"):
        _thread.entered = []
    return _thread.entered


def capturing():
    """Return the list of launches that are being captured, or None."""
    return getattr(_thread, "captured", None)


def run(launch):
    """Give a launch to the current stream."""
    get_current_stream().give(launch)
