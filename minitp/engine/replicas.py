"""Several replicas of a model as one: each request goes to one of them, and they start and end separately."""

import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from minitp.engine.client import JoinedRanks, StartedRanks
from minitp.engine.leaders import RemoteRanks
from minitp.engine.prefix_cache import block_keys
from minitp.engine.replica import Replica
from minitp.engine.routing import WaitingTokens, choose_load
from minitp.errors import RankError
from minitp.util.shares import MEASURED

POLL_S = 0.1  # interval at which a failed replica is noticed while another one is still starting


class ReplicaRanks:
    """A caller's handle on several replicas, with the methods and attributes of `ranks.Ranks`.

    If a rank dies, its replica ends: its unfinished requests get an error, and the other replicas go on.

    Parameters
    ----------
    start : callable
        start(index, on_loading=.., on_end=..) -> the Ranks of a replica.
    count : int
        The number of replicas.
    on_loading : callable
        See ranks.Ranks; the bytes are those of all replicas.
    on_end : callable
        on_end(error) is called with the RankError that ended a replica, unless `close` ended it.

    Attributes
    ----------
    description : dict or None
        The settings and sizes of the replicas, once they are ready; blocks and ranks are those of all.
    error : MinitpError or None
        The reason why no replica is left, or why one of them has not started.
    """

    def __init__(self, start, count, on_loading=lambda done, total: None, on_end=lambda error: None):
        self._start, self._on_loading, self.on_end = start, on_loading, on_end
        self.description = self.error = None
        self.closing, self._lock, self._restarting = False, threading.RLock(), threading.Lock()
        self._loaded = {}  # index -> (bytes done, bytes in all)
        self.replicas = [Replica(index) for index in range(count)]
        try:
            for replica in reversed(self.replicas):  # under mpirun, the first one connects to the others
                self._start_ranks(replica)
        except BaseException:
            self.close()
            raise

    @property
    def forked(self):
        """True in a forked child of the process that owns the ranks, which must leave them alone."""
        return self.replicas[0].ranks.forked

    @property
    def load(self):
        """The current load of all replicas; see Scheduler.load."""
        loads = [replica.current_load() for replica in self.replicas]
        return {name: sum(load[name] for load in loads) for name in loads[0]}

    @property
    def rank_times(self):
        """The times of all ranks, replica after replica; see service.RankTimes."""
        return [times for replica in self.replicas for times in replica.current_times()]

    def wait(self):
        """Wait until all replicas are ready or one of them has ended."""
        for replica in self.replicas:
            while not replica.ranks.started.wait(POLL_S) and self.error is None:
                pass
            if self.error is None:
                self._accept(replica)
                if not replica.ready:
                    self.error = named(replica.index, replica.ranks.error)
        with self._lock:
            if self.error is None:
                self.description = described([replica.ranks.description for replica in self.replicas])

    def add(self, prompt_ids, params, listener):
        """Send a request to a replica; see Ranks.add."""
        return self.add_all(prompt_ids, [(params, listener)])[0]

    def add_all(self, prompt_ids, requests):
        """Send requests with the same prompt, (params, listener) each, to the same replica.

        Returns
        -------
        list of RoutedRequest
            The requests, for `abort`.
        """
        sent = []
        while True:
            replica, keys = self._choose(prompt_ids)
            try:
                for request in requests:
                    sent.append(self._add(replica, prompt_ids, keys, *request))
                return sent
            except RankError:
                if sent or replica.ready or self.error is not None:
                    raise  # otherwise the replica has just ended, and another one can take the requests

    def abort(self, routed):
        """Stop a request and free its blocks, as Ranks.abort does."""
        routed.abort()

    def restart(self):
        """Start the replicas that have ended again, and wait for them while the others serve.

        Returns
        -------
        list of int
            The replicas that have been started.

        Raises
        ------
        MinitpError
            If a replica does not start.
        """
        self.replicas[0].ranks.refuse_in_child()
        with self._restarting:
            ended = [replica for replica in self.replicas if not replica.ready]
            for replica in ended:
                if replica.ranks.error is not None:  # otherwise Ctrl-C has interrupted an earlier restart
                    self._start_ranks(replica)
            errors = [error for replica in ended if (error := self._wait_again(replica)) is not None]
            if errors:
                raise errors[0]
        return [replica.index for replica in ended]

    def close(self):
        """End all ranks, and wait until they have exited; unfinished requests get a RankError."""
        with self._lock:
            self.closing = True
        with ExitStack() as stack:  # closes all of them, even if Ctrl-C interrupts one
            for replica in self.replicas:
                if replica.ranks is not None:
                    stack.callback(replica.ranks.close)
                    replica.ranks.begin_close()

    def kill(self):
        """Let `close`, which may be waiting in another thread, kill the ranks."""
        for replica in self.replicas:
            replica.ranks.kill()

    def _start_ranks(self, replica):
        """Start the ranks of a replica, unless `close` has been called."""
        callbacks = {"on_loading": partial(self._count_bytes, replica.index)}
        with self._lock:
            if self.closing:
                raise RankError("the ranks have been closed")
            if replica.load is not None:  # `_end` comes later than this restart
                replica.end()
            replica.ranks = self._start(replica.index, on_end=partial(self._end, replica), **callbacks)

    def _wait_again(self, replica):
        """Wait until a replica that has been started again is ready; return its error, or None."""
        replica.ranks.wait()
        with self._lock:
            self._accept(replica)
            if not replica.ready:
                return named(replica.index, replica.ranks.error)
            self.error = None
        return None

    def _accept(self, replica):
        """Let a replica that has started accept requests, unless it has ended already."""
        with self._lock:
            if replica.ranks.error is None:
                replica.accept()

    def _count_bytes(self, index, done, total):
        self._loaded[index] = done, total
        self._on_loading(*map(sum, zip(*self._loaded.values(), strict=True)))

    def _end(self, replica, error):
        """Record the end of a replica; called in the thread of its ranks."""
        with self._lock:
            if replica.ranks.error is not error:  # a restart has replaced these ranks already
                return
            error = named(replica.index, error)
            was_ready, all_were_ready = replica.load is not None, self.description is not None
            if was_ready:
                replica.end()
            if not all_were_ready or not any(other.ready for other in self.replicas):
                self.error = error
        if was_ready and all_were_ready:  # otherwise `wait` or `restart` reports it
            self.on_end(error)

    def _choose(self, prompt_ids):
        """Return the replica for a prompt, and the keys of the prompt's blocks."""
        about = self.description
        keys = block_keys(prompt_ids, about["block_size"])
        with self._lock:
            loads = {replica.load: replica for replica in self.replicas if replica.ready}
            if not loads:
                raise self.error or RankError("no replica accepts requests")
            return loads[choose_load(list(loads), keys, about["max_tokens_per_step"])], keys

    def _add(self, replica, prompt_ids, keys, params, listener):
        with self._lock:
            load = replica.load
            if load is None:
                raise replica.ranks.error or RankError("the replica has ended")
            uncached = max(1, len(prompt_ids) - load.cached_tokens(keys))
            waiting = WaitingTokens(load, uncached, params.max_new_tokens)
            waiting.add()
            load.remember(keys)
        try:
            return RoutedRequest(replica, waiting, self._lock, prompt_ids, params, listener)
        except BaseException:
            with self._lock:
                waiting.finish()
            raise


class RoutedRequest:
    """A request that a replica has received, whose output updates the replica's load."""

    def __init__(self, replica, waiting, lock, prompt_ids, params, listener):
        self._index, self._ranks = replica.index, replica.ranks  # a restart gives the replica other ranks
        self._waiting, self._lock, self._listener = waiting, lock, listener
        self._number = self._ranks.add(prompt_ids, params, self._receive)

    def abort(self):
        """Stop the request; see Ranks.abort."""
        self._ranks.abort(self._number)
        with self._lock:
            self._waiting.finish()

    def _receive(self, update):
        with self._lock:
            self._waiting.count(len(update.token_ids))
            if update.finish_reason is not None:
                self._waiting.finish()
        if update.error is not None:
            update.error = named(self._index, update.error)
        self._listener(update)


def named(index, error):
    """Return a RankError with the replica's number; an InputError is the same for all replicas."""
    if not isinstance(error, RankError):
        return error
    return RankError(f"replica {index}: {error.message}", error.last_words)


def described(each):
    """Return the description of all replicas, given that of each; see engine.run.describe."""
    parts = [{**part, "replica": index} for index, about in enumerate(each) for part in about["ranks"]]
    context, blocks = min(about["context"] for about in each), sum(about["blocks"] for about in each)
    return {**each[0], "replicas": len(each), "context": context, "blocks": blocks, "ranks": parts}


def started_replicas(options, size, **callbacks):
    """Start the replicas as separate jobs of `size` ranks; return their ReplicaRanks.

    If the devices decide the shares, the first one measures them, and then the others get the same ones.
    """
    first = None

    def start(index, **callbacks):
        nonlocal first, options
        if first is not None and options.split in MEASURED:
            first.wait()
            if first.description is None:
                raise first.error
            options = replace(options, split=first.description["split"])
        ranks = StartedRanks(options, size, replica=(index, options.replicas), **callbacks)
        first = first or ranks
        return ranks

    return ReplicaRanks(start, options.replicas, **callbacks)


def joined_replicas(options, world, **callbacks):
    """Join the ranks of mpirun, which are divided into replica groups; return their ReplicaRanks.

    If a rank dies, MPI ends the ranks of all groups.
    """
    others = []

    def start(index, **callbacks):
        if index:
            others.append(RemoteRanks(**callbacks))
            return others[-1]
        return JoinedRanks(options, world, others, **callbacks)

    return ReplicaRanks(start, options.replicas, **callbacks)
