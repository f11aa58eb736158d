"""Streams, events and graphs.

A thread's current stream does at once what it is given, because NumPy's arithmetic, which stands for CuPy's,
does. Work for any other stream is put off until somebody waits for that stream, or until it becomes the
current one: on a GPU nothing says that it runs earlier. So whoever reads on one stream what another stream
was to make reads what was there before.

As in CuPy, `with stream:` ends with the stream of the `with` around it, and if there is none with the null
stream, whatever `use()` had chosen in between.
"""

import threading
import weakref

_here = threading.local()  # a rank may be a thread
_streams = weakref.WeakValueDictionary()  # by their ptr


class Stream:
    """Where launches and copies go."""

    def __init__(self, non_blocking=False):
        self.ptr = id(self)
        self.non_blocking = non_blocking
        self._waiting = []  # (work, the memory that it needs), in order
        self.given = self.done_count = 0
        _streams[self.ptr] = self

    def use(self):
        _here.stream = self
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

        What lies at `pointers` is kept until the work is done.
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
        """Do what waits, all of it or the first `count` that this stream was given."""
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
            (stream or get_current_stream()).give(launch)


class Event:
    """A place in a stream."""

    def __init__(self, **options):
        self._stream, self._count = None, 0

    def record(self, stream=None):
        self._stream = stream or get_current_stream()
        self._count = self._stream.given

    def synchronize(self):
        if self._stream is not None:
            self._stream.finish(self._count)

    @property
    def done(self):
        return self._stream is None or self._stream.done_count >= self._count


def get_elapsed_time(start, end):
    return 1.0


NULL = Stream()
Stream.null = NULL


def get_current_stream():
    return getattr(_here, "stream", None) or NULL


def stream_of(ptr):
    """The Stream at an address, as CUDA's own functions are given it."""
    return _streams[ptr] if ptr else NULL


def back_to_entered():
    """What CuPy does at the end of a `with stream:`, its own inner ones among them."""
    (_entered()[-1] if _entered() else NULL).use()


def _entered():
    if not hasattr(_here, "entered"):
        _here.entered = []
    return _here.entered


def capturing():
    """The list of the graph that is being captured, or None."""
    return getattr(_here, "captured", None)


def run(launch):
    """Give this to the current stream."""
    get_current_stream().give(launch)
