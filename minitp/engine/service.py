"""What ranks do that serve somebody: they step while there are requests, and sleep while there are none.

Rank 0 has a caller: the front, or a thread of its own process. What they say to each other are plain objects:

    to rank 0     {"add": 7, "prompt_ids": [..], "params": {..}}    a request, by a number of the caller's
                  {"drop": 7}                                       nobody wants it any more
                  {"close": true}                                   the ranks are to leave
    from rank 0   {"loading": n, "of": m}                           bytes of weights, on the way
                  {"failed": "..", "exit_code": 2}                  all ranks leave, and why
                  {"ready": {..}, "load": {..}}                     from now on requests are served
                  {"updates": [[7, {..}], ..], "load": {..}}        what has come of requests; how busy it is
"""

from dataclasses import dataclass

from minitp.errors import InputError
from minitp.request import Request
from minitp.sampling import SamplingParams


def serve(engine, caller, make_request):
    """Serve a caller until it wants no more; all ranks call this.

    Parameters
    ----------
    engine : Engine
    caller : object
        On rank 0: its `inbox` is a queue of what it says, and `say` tells it something.
    make_request : callable
        A Request from its prompt's token ids and SamplingParams.
    """
    comm = engine.model.comm
    desk = Desk(engine, caller, make_request) if comm.rank == 0 else None
    while comm.exchange(desk.wait() if desk else None)[0]:  # waits asleep
        while (took := engine.step()) is not None:
            if desk:
                desk.tell(took)
                desk.take_messages()


@dataclass(eq=False)
class Asked:
    """A request, and how much of what came of it has been told."""

    number: int
    request: Request
    tokens: int = 0
    text: int = 0


class Desk:
    """Where rank 0 takes requests and tells what comes of them."""

    def __init__(self, engine, caller, make_request):
        self.engine, self.caller, self.make_request = engine, caller, make_request
        self.closed = False
        self._by_number, self._by_request = {}, {}  # number, id(request) -> Asked
        self._load = None

    def wait(self):
        """Sleep until there is something to do. False if the ranks are to leave."""
        self.take_messages()
        while not (self.closed or self.engine.scheduler.busy):
            self._take(self.caller.inbox.get())
            self.take_messages()
        return not self.closed

    def take_messages(self):
        """Do what the caller has said meanwhile."""
        while not self.caller.inbox.empty():
            self._take(self.caller.inbox.get())
        self.tell([])

    def tell(self, took):
        """Tell the caller what is new: of the requests that have a token more, and of the load."""
        updates = [self._update(self._by_request[id(request)]) for request in took]
        load = self.engine.scheduler.load()
        if updates or load != self._load:
            self._load = load
            self.caller.say({"updates": updates, "load": load})

    def _take(self, message):
        if "add" in message:
            self._add(message["add"], message["prompt_ids"], message["params"])
        elif "drop" in message:
            if message["drop"] in self._by_number:  # it may have come to its end by itself
                self._remove(self._by_number[message["drop"]])
        else:
            self.closed = True
            for asked in list(self._by_number.values()):
                self._remove(asked)

    def _add(self, number, prompt_ids, params):
        try:
            asked = Asked(number, self.make_request(prompt_ids, SamplingParams(**params)))
            self.engine.add(asked.request)
        except InputError as error:
            self.caller.say({"updates": [[number, {"error": str(error)}]]})
            return
        self._by_number[number] = self._by_request[id(asked.request)] = asked

    def _remove(self, asked):
        self.engine.scheduler.remove(asked.request)
        self._forget(asked)

    def _forget(self, asked):
        del self._by_number[asked.number], self._by_request[id(asked.request)]

    def _update(self, asked):
        request = asked.request
        update = {
            "token_ids": request.token_ids[asked.tokens :],
            "text": request.text[asked.text :],
            "logprobs": request.logprobs[asked.tokens :],
            "finish_reason": request.finish_reason,
        }
        asked.tokens, asked.text = len(request.token_ids), len(request.text)
        if request.finish_reason is not None:
            self._forget(asked)
        return [asked.number, update]
