"""Replica groups of a user's mpirun: rank 0 of the world sends requests to rank 0 of each other group.

    caller ── queue ──> rank 0 of group 0
       └───── MPI ────> rank 0 of group 1, ..

The messages are those of `service`, and a last one, {"ended": true}. The first rank of each group, its
leader, looks for messages between two batches. A thread of the caller's process exchanges them with all
leaders.
"""

import pickle
import queue
import threading
import time
from contextlib import contextmanager

import numpy as np

from minitp.comm.mpi import import_mpi
from minitp.engine.ranks import Ranks
from minitp.errors import InputError

PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.005  # between two looks for messages: 1 ms in the caller's process
MESSAGE = 3  # message tag


class RemoteRanks(Ranks):
    """A handle on another replica group of this MPI world; `connected` moves its messages."""

    def __init__(self, **callbacks):
        super().__init__(**callbacks)
        self.outbox, self.ended = queue.SimpleQueue(), threading.Event()

    def deliver(self, message):
        """Handle a message from the leader of the group."""
        if "ended" in message:
            self.end(0)
        else:
            self._receive(message)

    def end(self, code):
        """Record that the group has ended."""
        if not self.ended.is_set():
            self._record_end(code)
            self.ended.set()

    def _send(self, message):
        self.outbox.put(message)

    def close(self):
        """End the group and wait for it, as Ranks.close does."""
        if not self.forked:
            self.begin_close()
            self.ended.wait()


class Mail:
    """Messages between the leaders of the groups, as MPI messages of pickled objects.

    Parameters
    ----------
    leaders : mpi4py.MPI.Comm
        The communicator of the leaders, in the order of the groups.
    """

    def __init__(self, leaders):
        self._mpi, self._leaders = import_mpi(), leaders
        self._sending = []  # (request, data) of messages that are not complete

    def post(self, target, message):
        """Start sending an object to a leader."""
        data = np.frombuffer(pickle.dumps(message), np.uint8)
        request = self._leaders.Isend([data, self._mpi.BYTE], target, MESSAGE)
        self._sending = [(r, d) for r, d in self._sending if not r.Test()] + [(request, data)]

    def next(self):
        """Return (sender, object) of the next message, or None if there is none."""
        status = self._mpi.Status()
        if (message := self._leaders.Improbe(self._mpi.ANY_SOURCE, MESSAGE, status)) is None:
            return None
        data = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        message.Recv([data, self._mpi.BYTE])
        return status.Get_source(), pickle.loads(data)

    def flush(self):
        """Wait until all messages have been sent."""
        while not all(request.Test() for request, _ in self._sending):
            time.sleep(PAUSE_S)


class LeaderLink:
    """The caller that the leader of another group serves; it is also the caller's `inbox` (see `service`)."""

    def __init__(self, mail):
        self._mail, self._next = mail, None
        self.inbox = self

    def send(self, message):
        """Send an object to the caller's process."""
        self._mail.post(0, message)

    def empty(self):
        """Return whether no message has arrived."""
        if self._next is None:
            self._next = self._mail.next()
        return self._next is None

    def get(self):
        """Wait for the next message and return it."""
        while self.empty():
            time.sleep(LONGEST_PAUSE_S)
        (_, message), self._next = self._next, None
        return message


class PostThread:
    """A thread of the caller's process that exchanges the messages of all RemoteRanks."""

    def __init__(self, mail, groups):
        self._mail, self._groups, self._stopped = mail, groups, False
        self._thread = threading.Thread(target=self._run, name="minitp: messages of replicas", daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stopped and not all(group.ended.is_set() for group in self._groups):
            for leader, group in enumerate(self._groups, start=1):
                while not group.outbox.empty():
                    self._mail.post(leader, group.outbox.get())
            while (found := self._mail.next()) is not None:
                self._groups[found[0] - 1].deliver(found[1])
            time.sleep(PAUSE_S)

    def join(self):
        """Wait until all groups have ended."""
        self._thread.join()

    def stop(self):
        """Stop at once, because all groups end with an error."""
        self._stopped = True
        self._thread.join()


@contextmanager
def connected(comm, caller):
    """Yield the caller that this rank serves: `caller`, or on another leader the link to its process.

    All ranks of all groups call this. `caller.others` has the RemoteRanks of the other groups.
    """
    groups = comm.all_groups
    if groups.size == comm.size:
        yield caller
        return
    mpi = import_mpi()
    with groups.agreed():
        if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
            raise InputError(
                "--replicas under mpirun needs an MPI that several threads may call; omit mpirun"
            )
    mail = Mail(groups.split(0 if comm.rank == 0 else 1))
    if groups.rank == 0:
        post = PostThread(mail, caller.others)
        try:
            yield caller
            post.join()
        except BaseException:
            post.stop()
            raise
    elif comm.rank == 0:
        link = LeaderLink(mail)
        yield link
        link.send({"ended": True})
        mail.flush()
    else:
        yield caller
