"""Tests of replicas: which one gets a request, and what happens if one ends, with fake ranks."""

import threading

import pytest

from minitp.engine import replicas as replicas_module
from minitp.engine.options import EngineOptions
from minitp.engine.prefix_cache import block_keys
from minitp.engine.ranks import Ranks
from minitp.engine.replicas import ReplicaRanks, started_replicas
from minitp.engine.routing import ReplicaLoad, WaitingTokens, choose_load
from minitp.errors import InputError, RankError
from minitp.sampling import SamplingParams

BLOCK, SLACK = 4, 32
ABOUT = {"tp": 1, "context": 100, "blocks": 8, "block_size": BLOCK, "max_tokens_per_step": SLACK}


class FakeRanks(Ranks):
    """Ranks whose messages a test sends; `sent` has the messages that they have received."""

    def __init__(self, context=100, **callbacks):
        super().__init__(**callbacks)
        self.sent = []
        about = {**ABOUT, "context": context, "ranks": [{"rank": 0}]}
        self._receive({"updates": [], "rank_times": [{"busy_seconds": 1.0}]})
        self._receive({"ready": about, "load": {"running": 0, "reused_tokens": 0}})

    def _send(self, message):
        self.sent.append(message)

    def output(self, number, tokens, finish_reason=None):
        self._receive({"updates": [[number, {"token_ids": tokens, "finish_reason": finish_reason}]]})

    def die(self, code=3):
        self._record_end(code, ["last words"])

    def close(self):
        if self.error is None:
            self.closing = True
            self._record_end(0)

    @property
    def requests(self):
        return [message["prompt_ids"] for message in self.sent if "add" in message]


class Group:
    """Three fake replicas; `started` has the ranks in the order in which they were started."""

    def __init__(self, count=3, start=FakeRanks):
        self.started, self.ended, self.updates = [], [], []
        self.loaded = []

        def begin(index, **callbacks):
            self.started.append(start(**callbacks))
            return self.started[-1]

        on_loading = lambda *numbers: self.loaded.append(numbers)  # noqa: E731
        self.all = ReplicaRanks(begin, count, on_loading=on_loading, on_end=self.ended.append)
        self.all.wait()

    def __getitem__(self, index):
        return self.all.replicas[index].ranks

    def add(self, prompt, new=10):
        params = SamplingParams(max_new_tokens=new)
        return self.all.add(prompt, params, lambda update: self.updates.append((tuple(prompt), update)))

    @property
    def waiting(self):
        return [replica.waiting for replica in self.all.replicas]

    def counts(self):
        return [len(self[index].requests) for index in range(len(self.all.replicas))]


def prompt(first, length=8):
    """Return a prompt that shares no block with that of another `first`."""
    return [first] * length


# --- the choice of a replica --------------------------------------------------------------------------------


def test_waiting_tokens_shrink_with_the_output():
    load = ReplicaLoad(8, BLOCK)
    one = WaitingTokens(load, prompt=8, new=10)
    one.add()
    assert load.waiting == 18
    one.count(1)
    assert load.waiting == 9, "the prompt is computed once there is output"
    one.count(3)
    assert load.waiting == 6
    one.finish()
    one.finish()
    assert load.waiting == 0


def test_the_fewest_waiting_tokens_win():
    loads = [ReplicaLoad(8, BLOCK) for _ in range(3)]
    for load, waiting in zip(loads, (5, 3, 4), strict=True):
        load.waiting = waiting
    assert choose_load(loads, [b"new"], SLACK) is loads[1]
    loads[2].waiting, loads[1].added = 3, 1
    assert choose_load(loads, [b"new"], SLACK) is loads[2], "of two equal ones, that with fewer requests"


def test_a_cached_prefix_wins_within_its_bound():
    idle, cached = ReplicaLoad(8, BLOCK), ReplicaLoad(8, BLOCK)
    keys = block_keys(list(range(12)), BLOCK)
    cached.remember(keys[:2])
    assert (idle.cached_tokens(keys), cached.cached_tokens(keys)) == (0, 8)
    cached.waiting = 8 + SLACK
    assert choose_load([idle, cached], keys, SLACK) is cached
    cached.waiting += 1
    assert choose_load([idle, cached], keys, SLACK) is idle
    idle.remember(keys[:2])
    cached.waiting = 1
    assert choose_load([idle, cached], keys, SLACK) is idle, "both have the prefix"


def test_no_more_prefixes_are_remembered_than_the_pool_has_blocks():
    load = ReplicaLoad(4, BLOCK)
    keys = [block_keys(prompt(n, 12), BLOCK) for n in range(2)]
    for each in keys:
        load.remember(each)
    assert [load.cached_tokens(each) for each in keys] == [4, 12], "the end of the older prompt is forgotten"


def test_requests_are_balanced():
    group = Group()
    for number in range(12):
        group.add(prompt(number))
    assert group.counts() == [4, 4, 4]
    assert group.waiting == [4 * 18] * 3


def test_long_requests_count_more():
    group = Group(2)
    group.add(prompt(0), new=50)
    for number in range(1, 4):
        group.add(prompt(number))
    assert group.counts() == [1, 3]


def test_a_conversation_stays_on_its_replica():
    group = Group(2)
    turns = [list(range(length)) for length in (9, 20, 33)]
    for turn in turns:
        group.add(prompt(90))  # of another client
        number = group.add(turn)._number
        ranks = next(group[index] for index in (0, 1) if turn in group[index].requests)
        ranks.output(number, [1], "length")
    where = [[turn in group[index].requests for turn in turns] for index in (0, 1)]
    assert [True] * 3 in where


def test_a_popular_prefix_does_not_starve_a_replica():
    group = Group(2)
    for number in range(20):
        group.add([7] * 8 + [number])
    first, second = group.counts()
    assert 8 <= first <= 12
    assert first + second == 20


def test_requests_with_the_same_prompt_go_together():
    group = Group(2)
    choices = [(SamplingParams(max_new_tokens=90, seed=seed), print) for seed in range(4)]
    group.all.add_all(prompt(1), choices)
    group.all.add_all(prompt(2), choices)
    assert [set(map(tuple, group[index].requests)) for index in (0, 1)] == [
        {tuple(prompt(1))},
        {tuple(prompt(2))},
    ]


def test_an_aborted_request_waits_for_nothing():
    group = Group(2)
    request = group.add(prompt(1))
    group.all.abort(request)
    assert group.waiting == [0, 0]
    assert group[0].sent[-1] == {"abort": 0}


# --- the end of a replica -----------------------------------------------------------------------------------


def test_a_dead_replica_ends_only_its_own_requests():
    group = Group(2)
    group.add(prompt(1))
    group.add(prompt(2))
    group[0].die()
    ((of, update),) = group.updates
    assert (of, update.finish_reason) == (tuple(prompt(1)), "error")
    assert update.error.message == "replica 0: the ranks exited with code 3"
    assert group.all.error is None
    assert [str(error) for error in group.ended] == ["replica 0: the ranks exited with code 3\n  last words"]
    assert [replica.ready for replica in group.all.replicas] == [False, True]
    for number in range(3, 6):
        group.add(prompt(number))
    assert len(group[1].requests) == 4
    group[1].output(0, [5], "length")
    assert group.updates[-1][1].token_ids == [5]


def test_the_end_of_the_last_replica_is_the_end_of_all():
    group = Group(2)
    group[1].die()
    group[0].die()
    assert str(group.all.error).startswith("replica 0: the ranks exited with code 3")
    assert len(group.ended) == 2
    with pytest.raises(RankError, match="replica 0"):
        group.add(prompt(1))


def test_a_restarted_replica_serves_again_with_an_empty_cache():
    group = Group(2)
    group.add(prompt(1))
    group[0]._receive({"updates": [], "load": {"running": 1, "reused_tokens": 5}})
    dead = group[0]
    dead.die()
    assert group.all.load["reused_tokens"] == 5, "counts never go back"
    assert group.all.load["running"] == 0
    assert group.all.restart() == [0]
    assert group[0] is not dead
    assert group[0] is group.started[-1]
    assert group.waiting == [0, 0]
    group.add(prompt(1))
    assert group.counts() == [1, 0]
    group[0]._receive({"updates": [], "load": {"running": 1, "reused_tokens": 2}})
    assert group.all.load["reused_tokens"] == 7
    assert len(group.all.rank_times) == 2
    assert group.all.restart() == [], "nothing has ended"


def test_a_replica_that_does_not_start_again():
    group = Group(2)
    group[0].die()
    fails = lambda index, **callbacks: ended_ranks(**callbacks)  # noqa: E731
    group.all._start = fails
    with pytest.raises(RankError, match="replica 0: no memory"):
        group.all.restart()
    assert (group.all.error, len(group.ended)) == (None, 1), "the other replica goes on"
    group.add(prompt(1))


def ended_ranks(error=None, **callbacks):
    """Return ranks that have ended while they were starting."""
    ranks = Ranks(**callbacks)
    ranks._failure = error or RankError("no memory")
    ranks.close = ranks.begin_close = lambda: None
    threading.Thread(target=ranks._record_end, args=(3,)).start()
    return ranks


@pytest.mark.parametrize("kind", [InputError, RankError])
def test_a_replica_that_fails_to_start_fails_all(kind):
    def start(index, **callbacks):
        return FakeRanks(**callbacks) if index else ended_ranks(kind("too large"), **callbacks)

    ended = []
    replicas = ReplicaRanks(start, 2, on_end=ended.append)
    replicas.wait()
    assert type(replicas.error) is kind
    assert str(replicas.error).endswith("too large")
    assert ended == [], "the constructor of LLM raises the error"
    replicas.close()


def test_a_forked_child_starts_no_replica(monkeypatch):
    group = Group(2)
    group[0].die()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(InputError, match="this process was forked from process"):
        group.all.restart()
    assert len(group.started) == 2


def test_close_ends_all_and_starts_none():
    group = Group(2)
    group.add(prompt(1))
    group.all.close()
    assert [ranks.closing for ranks in group.started] == [True, True]
    assert group.ended == []
    assert group.updates[-1][1].finish_reason == "error"
    with pytest.raises(RankError, match="closed"):
        group.all.restart()


@pytest.mark.parametrize(("split", "others"), [("auto", "3,1"), ("2,1", "2,1"), (None, None)])
def test_replicas_have_the_shares_that_the_first_one_has_measured(monkeypatch, split, others):
    splits = []

    def start(options, size, replica, **callbacks):
        splits.append(options.split)
        ranks = FakeRanks(**callbacks)
        ranks.description["split"] = "3,1" if options.split == "auto" else options.split
        return ranks

    monkeypatch.setattr(replicas_module, "StartedRanks", start)
    group = started_replicas(EngineOptions(split=split, replicas=3), 2)
    group.wait()
    group.replicas[0].ranks.die()
    group.restart()
    assert splits == [split, others, others, others]


# --- one description for all --------------------------------------------------------------------------------


def test_the_description_has_the_ranks_of_all_replicas():
    contexts = iter((100, 80))
    group = Group(2, lambda **callbacks: FakeRanks(next(contexts), **callbacks))
    about = group.all.description
    assert (about["replicas"], about["blocks"], about["context"]) == (2, 16, 80)
    assert about["ranks"] == [{"rank": 0, "replica": 0}, {"rank": 0, "replica": 1}]
    assert group.all.rank_times == [{"busy_seconds": 1.0}] * 2


def test_the_bytes_of_all_replicas_are_loaded():
    group = Group(2)
    group[0]._receive({"loading": 5, "of": 10})
    group[1]._receive({"loading": 3, "of": 10})
    assert group.loaded == [(5, 10), (8, 20)]


# --- while ranks end ----------------------------------------------------------------------------------------


def test_counts_and_times_are_there_while_a_replica_ends():
    """Read them in a listener, which is called before the replica knows that its ranks have ended."""
    group, seen = Group(2), []
    group[0]._receive({"updates": [], "load": {"running": 1, "reused_tokens": 5}})
    group.all.add([1], SamplingParams(), lambda update: seen.append((group.all.load, group.all.rank_times)))
    group[0].die()
    ((load, times),) = seen
    assert (load["reused_tokens"], load["running"], len(times)) == (5, 0, 2)


def test_a_restart_before_the_end_is_recorded():
    """Call `restart` in a listener, as a script may do as soon as its request has failed."""
    group, restarted = Group(2), []
    group[0]._receive({"updates": [], "load": {"running": 1, "reused_tokens": 5}})
    group.all.add([1], SamplingParams(), lambda update: restarted.append(group.all.restart()))
    group[0].die()
    assert restarted == [[0]]
    assert group.all.replicas[0].ready
    assert group.all.load["reused_tokens"] == 5
    assert group.waiting == [0, 0]
    assert group.all.error is None


def test_a_restart_that_fails_in_part_leaves_no_ranks_behind():
    """Let replica 0 fail to start again, and replica 1 start: it serves, and is not started once more."""
    group = Group(3)
    group[0].die()
    group[1].die()
    begin = group.all._start

    def only_replica_1(index, **callbacks):
        return begin(index, **callbacks) if index else ended_ranks(**callbacks)

    group.all._start = only_replica_1
    with pytest.raises(RankError, match="replica 0: no memory"):
        group.all.restart()
    assert [replica.ready for replica in group.all.replicas] == [False, True, True]
    group.all._start = begin
    assert group.all.restart() == [0]
    assert len(group.started) == 5
