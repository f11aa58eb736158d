"""A connection of the HTTP server with time limits for its client."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # time for the headers of a request to arrive
STALLED_SECONDS = 60  # time in which a client must read something of a response that waits for it


class Connection(H11Protocol):
    """A uvicorn connection that is closed if its client sends headers, or reads a response, too slowly.

    uvicorn limits only the time between two requests. body.BODY_SECONDS limits the body.

    Parameters
    ----------
    most : int
        The maximum number of connections; further ones are closed at once, because a server that can open no
        more files does not even close connections.
    **options
        The parameters of H11Protocol.
    """

    def __init__(self, *, most, **options):
        super().__init__(**options)
        self._most, self._header_timer, self._stalled_timer = most, None, None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._limit_headers()
        if len(self.connections) > self._most:
            transport.abort()

    def data_received(self, data):
        super().data_received(data)
        self._limit_headers()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._header_timer = _cancelled(self._header_timer)
        self._stalled_timer = _cancelled(self._stalled_timer)

    def pause_writing(self):
        super().pause_writing()
        self._stalled_timer = self._watch_reader()

    def resume_writing(self):
        super().resume_writing()
        self._stalled_timer = _cancelled(self._stalled_timer)

    def _limit_headers(self):
        """Start the timer while headers are awaited, or the rest of a body that has been answered already."""
        awaited = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        if not awaited:
            self._header_timer = _cancelled(self._header_timer)
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _watch_reader(self):
        """Close the connection after STALLED_SECONDS in which the client has read nothing."""
        unread = self.transport.get_write_buffer_size()

        def check():
            if self.transport.get_write_buffer_size() >= unread:
                self.transport.abort()
            else:
                self._stalled_timer = self._watch_reader()

        return self.loop.call_later(STALLED_SECONDS, check)


def _cancelled(timer):
    """Cancel a timer, if there is one; return None."""
    if timer is not None:
        timer.cancel()
