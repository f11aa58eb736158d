"""The loop of ranks that serve a caller: they run batches while there are requests, and sleep otherwise.

The caller of rank 0 is the supervisor, or a thread of rank 0's own process. They exchange plain objects:

    to rank 0     {"add": 7, "prompt_ids": [..], "params": {..}}    a request, under the caller's number
                  {"abort": 7}                                      abort this request
                  {"close": true}                                   end the ranks
    from rank 0   {"loading": n, "of": m}                           bytes of weights loaded so far
                  {"failed": "..", "exit_code": 2}                  the reason why all ranks are exiting
                  {"ready": {..}, "load": {..}}                     the ranks accept requests
                  {"updates": [[7, {..}], ..], "load": {..}}        new output of requests; Scheduler.load
                  {"updates": [], "rank_times": [{..}, ..]}         the RankTimes of all ranks, in rank order
"""

from dataclasses import asdict, dataclass
from time import perf_counter

from minitp.errors import InputError
from minitp.request import Request
from minitp.sampling import SamplingParams

MESSAGES_SECONDS = 0.02  # time for messages between two batches
BATCHES = 100  # maximum number of batches in a series, after which the ranks report their times


@dataclass
class RankTimes:
    """The time that a rank has spent on batches since it started.

    Attributes
    ----------
    comm_seconds : float or None
        The time in all-reduces and all-gathers, including waiting for other ranks; None on a GPU, where the
        host only launches them.
    busy_seconds : float
        The time of all series of consecutive batches, from the start of a series to its end.
    """

    comm_seconds: float | None = 0.0
    busy_seconds: float = 0.0


def serve(engine, caller, make_request, times):
    """Serve a caller until it sends "close"; all ranks call this.

    Parameters
    ----------
    engine : Engine
    caller : object
        The caller of rank 0: `inbox` is a queue of its messages, and `send(message)` sends it one.
    make_request : callable
        make_request(prompt_ids, params) -> Request.
    times : RankTimes
        The times of this rank, which are reported after each series of consecutive batches.
    """
    comm = engine.model.comm
    loop = RequestLoop(engine, caller, make_request) if comm.rank == 0 else None
    while comm.allgather_object(loop.wait() if loop else None)[0]:  # the other ranks sleep in this call
        started, comm_started = perf_counter(), comm.seconds
        run_batches(engine, loop)
        times.busy_seconds += perf_counter() - started
        if times.comm_seconds is not None:
            times.comm_seconds += comm.seconds - comm_started
        report_times(comm, caller, times)


def run_batches(engine, loop):
    """Run a series of at most BATCHES batches, until there is no work; all ranks run the same number."""
    for _ in range(BATCHES):
        advanced = engine.run_batch()
        if advanced is None:
            return
        if loop:
            loop.report(advanced)
            loop.handle_messages()


def report_times(comm, caller, times):
    """Send the RankTimes of all ranks to the caller of rank 0; all ranks call this."""
    by_rank = comm.allgather_object(asdict(times))
    if comm.rank == 0:
        caller.send({"updates": [], "rank_times": by_rank})


@dataclass(eq=False)
class TrackedRequest:
    """A request and the amount of its output that has been sent to the caller."""

    number: int
    request: Request
    tokens: int = 0
    text: int = 0  # characters
    prompt_logprobs: int = 0


class RequestLoop:
    """The message loop of rank 0, which accepts requests from the caller and sends back their output."""

    def __init__(self, engine, caller, make_request):
        self.engine, self.caller, self.make_request = engine, caller, make_request
        self.closed = False
        self._by_number, self._by_request = {}, {}  # number, id(request) -> TrackedRequest
        self._load = None

    def wait(self):
        """Sleep until there is work; return False once the caller has sent "close"."""
        self.handle_messages()
        while not (self.closed or self.engine.scheduler.busy):
            self._handle(self.caller.inbox.get())
            self.handle_messages()
        return not self.closed

    def handle_messages(self):
        """Handle the messages that have arrived, for a limited time, and report the load."""
        end = perf_counter() + MESSAGES_SECONDS
        while not self.caller.inbox.empty():
            self._handle(self.caller.inbox.get())
            if perf_counter() > end:
                break  # many long prompts have arrived: running sequences must not wait for all of them
        self.report([])

    def report(self, advanced):
        """Send the caller the new output of these requests, and the load if it has changed."""
        updates = [self._update(self._by_request[id(request)]) for request in advanced]
        load = self.engine.scheduler.load()
        if updates or load != self._load:
            self._load = load
            self.caller.send({"updates": updates, "load": load})

    def _handle(self, message):
        if "add" in message:
            self._add(message["add"], message["prompt_ids"], message["params"])
        elif "abort" in message:
            if message["abort"] in self._by_number:  # the request may have finished already
                self._abort(self._by_number[message["abort"]])
        elif "close" not in message:
            raise ValueError(f"unknown message {message!r:.100}")
        else:
            self.closed = True
            for tracked in list(self._by_number.values()):
                self._abort(tracked)

    def _add(self, number, prompt_ids, params):
        try:
            tracked = TrackedRequest(number, self.make_request(prompt_ids, SamplingParams(**params)))
            self.engine.add(tracked.request)
        except InputError as error:
            self.caller.send({"updates": [[number, {"error": str(error)}]]})
            return
        self._by_number[number] = self._by_request[id(tracked.request)] = tracked

    def _abort(self, tracked):
        self.engine.scheduler.abort(tracked.request)
        self._forget(tracked)

    def _forget(self, tracked):
        del self._by_number[tracked.number], self._by_request[id(tracked.request)]

    def _update(self, tracked):
        request = tracked.request
        update = {
            "token_ids": request.token_ids[tracked.tokens :],
            "text": request.text[tracked.text :],
            "logprobs": request.logprobs[tracked.tokens :],
            "prompt_logprobs": request.prompt_logprobs[tracked.prompt_logprobs :],
            "cached_tokens": request.num_cached_tokens,
            "finish_reason": request.finish_reason,
        }
        tracked.tokens, tracked.text = len(request.token_ids), len(request.text)
        tracked.prompt_logprobs = len(request.prompt_logprobs)
        if request.finish_reason is not None:
            self._forget(tracked)
        return [tracked.number, update]
