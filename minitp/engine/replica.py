"""A replica, one of several groups of ranks that each have a whole model, as its caller sees it."""

from minitp.engine.routing import ReplicaLoad

COUNTS = ("preempted", "reused_tokens")  # the parts of a load that count since the start


class Replica:
    """One of several groups of ranks with the whole model, as its caller sees it.

    Attributes
    ----------
    ranks : Ranks
        The ranks, which are other ones after a restart.
    load : ReplicaLoad or None
        The waiting tokens; None until the ranks have been ready.
    """

    def __init__(self, index):
        self.index, self.ranks, self.load = index, None, None
        self.rank_times, self._ended_counts = [], dict.fromkeys(COUNTS, 0)

    @property
    def ready(self):
        """True while the ranks accept requests."""
        return self.load is not None and self.ranks.error is None

    def accept(self):
        """Begin to accept requests, after the ranks have become ready."""
        about = self.ranks.description
        self.load = ReplicaLoad(about["blocks"], about["block_size"])

    def end(self):
        """Keep what the ranks have counted, after they have ended."""
        for name in COUNTS:
            self._ended_counts[name] += self.ranks.load.get(name, 0)
        self.rank_times = self.ranks.rank_times
        self.load = None

    def current_load(self):
        """Return the load of the ranks, as Scheduler.load does; counts include those before a restart."""
        ranks = self.ranks
        load = {} if self.load is None else ranks.load
        counts = {name: load.get(name, 0) + before for name, before in self._ended_counts.items()}
        now = {name: load.get(name, 0) * self.ready for name in ("running", "waiting", "blocks_in_use")}
        return {**now, **counts}

    @property
    def waiting(self):
        """The waiting tokens of the replica's requests."""
        load = self.load
        return 0 if load is None else load.waiting

    def current_times(self):
        """Return the times of the ranks, or those at their end if they have ended."""
        ranks = self.ranks
        return self.rank_times if self.load is None else ranks.rank_times
