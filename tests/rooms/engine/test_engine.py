"""The engine: each of many requests gets the tokens that it gets alone, and all blocks are freed."""

import queue
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from engine_requests import CONTEXT, SHAPES, alone, check_blocks, requests, run_requests
from one_core import run_threads
from tiny import write_tiny

from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.engine import service
from minitp.engine.blocks import BlockAllocator
from minitp.engine.engine import Engine
from minitp.engine.prefix_cache import PrefixCache, block_keys
from minitp.engine.run import blocks_that_fit
from minitp.engine.service import RequestLoop
from minitp.errors import InputError
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request
from minitp.sampling import SamplingParams


@pytest.mark.parametrize(("shape", "tp"), [("plain", 1), ("plain", 3), ("window", 2), ("uneven", 4)])
@pytest.mark.parametrize(
    ("blocks", "block_size", "limits"),
    [
        (200, 4, {}),
        (20, 4, {}),  # room for about one and a half requests, so some are preempted
        (6, 16, {"max_tokens_per_step": 7}),
        (80, 1, {"max_tokens_per_step": 3, "max_sequences": 2}),
        (40, 16, {"max_tokens_per_step": 16, "max_sequences": 5}),
    ],
)
def test_batched_requests_get_the_same_tokens_as_alone(tmp_path, shape, tp, blocks, block_size, limits):
    """Compare greedy tokens of 12 requests, some of which join later, and some of which share a prefix."""
    source = open_model(str(write_tiny(tmp_path, **SHAPES[shape])), tp)

    def rank(comm):
        model = load_model(source, comm, open_device("float32"))
        first, later = requests(8), requests(4, seed=1)
        both = [*first, *later]
        expected = [alone(model, request) for request in both]
        run_requests(model, first, blocks, block_size, later, **limits)
        return expected, [request.token_ids for request in both]

    expected, tokens = run_threads(tp, rank)[0]
    assert tokens == expected


def tiny_model(tmp_path):
    return load_model(open_model(str(write_tiny(tmp_path)), 1), SingleRank(), open_device("float32"))


def test_preemption_changes_no_tokens_and_all_blocks_are_freed(tmp_path):
    model, wanted = tiny_model(tmp_path), requests(10, seed=3)
    expected = [alone(model, request) for request in wanted]
    scheduler = run_requests(model, wanted, num_blocks=20, block_size=4)
    assert scheduler.num_preempted > 0
    assert [request.token_ids for request in wanted] == expected
    assert scheduler.allocator.num_free_blocks == 20
    assert (scheduler.running, scheduler.waiting) == ([], [])


def test_a_batch_keeps_its_token_limit_and_includes_all_decoding_sequences(tmp_path):
    """Check that a sequence gets a token from every batch while a long prompt is computed in chunks."""
    model = tiny_model(tmp_path)
    engine = Engine(model, 60, 4, max_tokens_per_step=10)
    scheduler = engine.scheduler
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    short, long = (Request(params, (), prompt, CONTEXT) for prompt in ([1, 2, 3], list(range(60))))
    sizes, schedule = [], scheduler.schedule

    def observed_schedule():
        batch = schedule()
        sizes.append(batch and [len(tokens) for _, tokens, _ in batch.chunks])
        return batch

    scheduler.schedule = observed_schedule
    engine.add(short)
    engine.run_batch()
    engine.add(long)
    engine.run()
    assert sizes == [[3], *[[1, 9]] * 6, [1, 6], *[[1, 1]] * 4, *[[1]] * 7, None]
    assert [len(short.token_ids), len(long.token_ids)] == [12, 12]


def test_cached_prefixes_are_not_computed_again(tmp_path):
    """Send 19 tokens three times: their four blocks of four stay cached when a request has ended."""
    model = tiny_model(tmp_path)
    engine = Engine(model, 40, 4)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    computed, forward = [], model.forward_batch
    model.forward_batch = lambda parts, *args: (
        computed.append(sum(len(ids) for ids, _ in parts)) or forward(parts, *args)
    )
    same = [Request(params, (), list(range(19)), CONTEXT) for _ in range(3)]
    engine.add(same[0])
    engine.run_batch()
    engine.add(same[1])
    engine.run()
    engine.add(same[2])
    engine.run()
    assert computed == [19, 1 + 3, 1 + 1, 1, 3, 1, 1]
    assert same[0].token_ids == same[1].token_ids == same[2].token_ids


def test_running_sequences_do_not_wait_for_many_new_requests(tmp_path, monkeypatch):
    """Rank 0 accepts requests between two batches for a limited time, but at least one of them."""
    monkeypatch.setattr(service, "MESSAGES_SECONDS", 0)
    caller = SimpleNamespace(inbox=queue.SimpleQueue(), send=lambda message: None)
    for number in range(3):
        caller.inbox.put({"add": number, "prompt_ids": [1, 2, 3], "params": {"max_new_tokens": 5}})
    engine = Engine(tiny_model(tmp_path), num_blocks=20, block_size=4)
    loop = RequestLoop(engine, caller, lambda ids, params: Request(params, (), ids, CONTEXT))
    for running in (1, 2, 3, 3):
        loop.handle_messages()
        engine.run_batch()
        assert engine.scheduler.load()["running"] == running


@pytest.mark.parametrize("tp", [1, 3])
def test_times_are_reported_during_a_long_series_of_batches_and_after_it(tmp_path, tp):
    source = open_model(str(write_tiny(tmp_path)), tp)
    inbox, sent = queue.SimpleQueue(), []
    inbox.put({"add": 0, "prompt_ids": [1, 2, 3], "params": {"max_new_tokens": 250, "ignore_eos": True}})

    def send(message):
        sent.append(message)
        if any(update["finish_reason"] for _, update in message["updates"]):
            inbox.put({"close": True})

    def times_of(message):
        return message.get("rank_times", [])

    def rank(comm):
        model = load_model(source, comm, open_device("float32"))
        engine = Engine(model, num_blocks=20)
        service.serve(
            engine,
            SimpleNamespace(inbox=inbox, send=send),
            lambda ids, params: Request(params, (), ids, CONTEXT),
            service.RankTimes(),
        )
        return comm.seconds

    in_collectives = run_threads(tp, rank)
    tokens, counts = 0, []
    for message in sent:
        tokens += sum(len(update["token_ids"]) for _, update in message["updates"])
        if times_of(message):
            counts.append(tokens)
    assert counts == [100, 200, 250]
    reports = [times_of(message) for message in sent if times_of(message)]
    assert [one["comm_seconds"] for one in reports[-1]] == pytest.approx(in_collectives)
    for earlier, later in zip([[vars(service.RankTimes())] * tp, *reports], reports, strict=False):
        for before, after in zip(earlier, later, strict=True):
            assert before["comm_seconds"] < after["comm_seconds"] < after["busy_seconds"]
            assert before["busy_seconds"] < after["busy_seconds"]


def test_each_block_is_registered_once(tmp_path, monkeypatch):
    """The work for a token must not grow with the number of blocks of its sequence."""
    registered = []
    monkeypatch.setattr(PrefixCache, "register", lambda self, block, key: registered.append((block, key)))
    (request,) = wanted = requests(1, longest=30)
    run_requests(tiny_model(tmp_path), wanted, num_blocks=40, block_size=4, max_tokens_per_step=7)
    tokens = [*request.prompt_ids, *request.token_ids][:-1]
    assert [key for _, key in registered] == block_keys(tokens, 4)


def test_an_aborted_request_frees_its_blocks_at_once(tmp_path):
    model, wanted = tiny_model(tmp_path), requests(4, seed=5, most_new=40)
    expected = [alone(model, request) for request in wanted]
    engine = Engine(model, 100, 4, max_sequences=3)
    scheduler = engine.scheduler
    for request in wanted:
        engine.add(request)
    engine.run_batch()
    before = scheduler.allocator.num_free_blocks
    scheduler.abort(wanted[1])  # a running request
    assert scheduler.allocator.num_free_blocks > before
    check_blocks(scheduler)
    scheduler.abort(wanted[3])  # a waiting request
    engine.run()
    assert [len(request.token_ids) for request in wanted][3] == 0
    assert [wanted[n].token_ids for n in (0, 2)] == [expected[n] for n in (0, 2)]
    assert scheduler.allocator.num_free_blocks == 100
    engine.add(requests(1)[0])
    engine.run_batch()
    assert len(engine._caches) == 1, "caches of finished sequences are dropped"


@pytest.mark.parametrize("length", [1, 4, 8, 9])
def test_a_repeated_prompt_gets_the_same_tokens(tmp_path, length):
    """Include prompts that fill their blocks exactly: the last token must be computed, for its logits."""
    model = tiny_model(tmp_path)
    engine = Engine(model, 20, 4)
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    results = []
    for _ in range(2):
        request = Request(params, (), list(range(50, 50 + length)), CONTEXT)
        engine.add(request)
        for _ in range(5):
            assert engine.run_batch() is not None
        assert engine.run_batch() is None
        results.append(request.token_ids)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("prompt", "new", "context", "words"),
    [
        ([1] * 7, 10, CONTEXT, "17 positions, but the cache has only 16"),
        ([], 4, CONTEXT, "the prompt is empty"),
        ([1, 999], 4, CONTEXT, "token id 999"),
        ([1] * 10, 4, 8, "10 tokens, which leaves no room"),
    ],
)
def test_a_request_that_could_never_run_is_rejected(tmp_path, prompt, new, context, words):
    engine = Engine(tiny_model(tmp_path), num_blocks=4, block_size=4)
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    engine.add(Request(params, (), [1] * 6, CONTEXT))
    with pytest.raises(InputError, match=words):
        engine.add(Request(SamplingParams(max_new_tokens=new), (), prompt, context))
    engine.run()
    assert not engine.scheduler.waiting


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_tokens_per_step", "max_sequences"])
def test_sizes_below_one_are_rejected(tmp_path, name):
    sizes = {"num_blocks": 4, "block_size": 4, "max_tokens_per_step": 4, "max_sequences": 4}
    with pytest.raises(InputError, match=" 0: expected 1 or more"):
        Engine(tiny_model(tmp_path), **{**sizes, name: 0})


def test_chunks_of_a_long_prompt_keep_the_limit_of_attention_scores(tmp_path, monkeypatch):
    """Check that no pass of a sequence has more scores than MAX_SCORES allows, with 4 heads."""
    monkeypatch.setattr("minitp.generate.MAX_SCORES", 4 * 512 * 4)
    model = tiny_model(tmp_path)
    engine = Engine(model, 40, 16)
    expected = alone(model, requests(1, seed=7, longest=300)[0])
    passes, forward = [], model.forward_batch
    model.forward_batch = lambda parts, *args: (
        passes.extend((len(ids), cache.length + len(ids)) for ids, cache in parts) or forward(parts, *args)
    )
    request = requests(1, seed=7, longest=300)[0]
    engine.add(request)
    engine.run()
    assert request.token_ids == expected
    assert all(4 * tokens * keys <= 4 * 512 * 4 for tokens, keys in passes)
    assert len(passes) > 20


# --- blocks ---------------------------------------------------------------------------------------------


def test_block_keys_depend_on_all_preceding_tokens():
    a, b = [1, 2, 3, 4, 5, 6, 7], [9, 2, 3, 4, 5, 6, 7, 8, 8]
    keys = block_keys(a, 2)
    assert len(keys) == 3
    assert block_keys(a[:6], 2) == keys
    assert not set(keys) & set(block_keys(b, 2))
    assert block_keys(a, 2, before=keys[:1]) == keys
    assert block_keys([], 2) == block_keys([1], 2) == []


def test_the_least_recently_used_block_is_evicted_first():
    allocator = BlockAllocator(num_blocks=3, block_size=2)
    first, second, third = allocator.allocate(3)
    for block, key in ((first, b"1"), (second, b"2"), (third, b"3")):
        allocator.prefixes.register(block, key)
    allocator.free([second])
    allocator.free([first, third])  # the end of a prefix is evicted before its beginning
    assert allocator.allocate(4) is None
    assert allocator.lookup([b"2"]) == [second]  # in use again
    assert allocator.allocate(1) == [third]
    assert allocator.lookup([b"3"]) == []
    assert allocator.lookup([b"1", b"3"]) == [first]
    assert allocator.num_free_blocks == 0


def test_a_shared_block_is_free_after_its_last_reference():
    allocator = BlockAllocator(num_blocks=2, block_size=2)
    (block,) = allocator.allocate(1)
    allocator.prefixes.register(block, b"k")
    assert allocator.lookup([b"k"]) == [block]
    allocator.free([block])
    assert allocator.num_free_blocks == 1
    allocator.free([block])
    assert allocator.num_free_blocks == 2


def test_only_one_of_two_equal_blocks_is_registered():
    allocator = BlockAllocator(num_blocks=2, block_size=2)
    a, b = allocator.allocate(2)
    allocator.prefixes.register(a, b"k")
    allocator.prefixes.register(b, b"k")
    allocator.free([b])
    assert allocator.allocate(1) == [b]
    allocator.free([a])
    assert allocator.lookup([b"k"]) == [a]


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_agree_with_a_plain_count(seed):
    """Allocate, look up and free at random: no block in use is allocated, no lookup finds other content."""
    rng = np.random.default_rng(seed)
    allocator, content, users = BlockAllocator(num_blocks=9, block_size=1), {}, Counter()
    tables = []
    for n in range(2000):
        action = rng.integers(3)
        if action == 0:
            blocks = allocator.allocate(int(rng.integers(1, 4)))
            if blocks is None:
                continue
            for block in blocks:
                assert users[block] == 0
                content[block] = bytes([n % 256])
                if rng.random() < 0.7:
                    content[block] = str(rng.integers(6)).encode()
                    allocator.prefixes.register(block, content[block])
        elif action == 1:
            keys = [str(k).encode() for k in rng.integers(6, size=3)]
            blocks = allocator.lookup(keys)
            assert [content[block] for block in blocks] == keys[: len(blocks)]
        elif tables:
            blocks = tables.pop(int(rng.integers(len(tables))))
            users.subtract(blocks)
            allocator.free(blocks)
            continue
        else:
            continue
        users.update(blocks)
        tables.append(blocks)
        assert allocator.num_free_blocks == sum(users[block] == 0 for block in range(9))


def test_an_unknown_message_is_an_error():
    """Check that it does not end the ranks as "close" does, without a reason."""
    with pytest.raises(ValueError, match="unknown message"):
        RequestLoop(None, None, None)._handle({"clsoe": True})


@pytest.mark.parametrize(
    ("where", "rooms", "sizes", "blocks"),
    [
        (("a", "a"), (100, 100), (15, 5), 10),  # one memory: 200 bytes for 20 a block
        (("a", "b"), (100, 100), (15, 5), 6),  # two memories: rank 0 has room for 6
        (("a", "b"), (100, 30), (15, 5), 6),
        (("a", "b", "a"), (60, 30, 60), (15, 5, 5), 6),
    ],
)
def test_blocks_of_unequal_ranks_fit_in_their_memories(where, rooms, sizes, blocks):
    def rank(comm):
        device = SimpleNamespace(
            weights_room=lambda: (where[comm.rank], 0), cache_room=lambda ranks: rooms[comm.rank]
        )
        return blocks_that_fit(comm, device, sizes[comm.rank])

    assert run_threads(len(where), rank) == [blocks] * len(where)
