"""An engine that runs a batch ahead of the host: the tokens are the same, and no block is shared wrongly.

The GPU is a fake that computes no layers. A slot of its pool holds the tokens up to its position; the next
token is a hash of them and the draw. So a wrong block, token, draw or order of batches changes the tokens.
"""

import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from engine_requests import check_blocks

from minitp.comm import run_threads
from minitp.comm.single import SingleRank
from minitp.engine.engine import Engine
from minitp.errors import RankError
from minitp.request import Request
from minitp.sampling import PENDING, SamplingParams

VOCABULARY, CONTEXT, EOS = 23, 60, 5
BLOCK_SIZE = 4


def token_after(text, draw):
    return zlib.crc32(repr((text, draw)).encode()) % VOCABULARY


def logits_after(text):
    """Return the logits [V] for a row whose token the host chooses, which are clear enough for any draw."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token_after(text, 0.0)] = 50
    return logits


class FakeModel:
    """The part of FusedModel that an engine uses."""

    fused, prefill_chunk = True, 7

    def __init__(self, comm=None):
        self.comm = comm or SingleRank()
        self.config = SimpleNamespace(vocab_size=VOCABULARY)

    def new_pool(self, blocks, block_size):
        return SimpleNamespace(block_size=block_size, slots=[None] * (blocks * block_size))

    def batches_ahead(self, pool, sequences):
        self.gpu = FakeGpu(pool)
        return self.gpu


class FakeGpu:
    """A replacement for BatchesAhead, on which batches run in order, as on a stream."""

    def __init__(self, pool):
        self._pool, self._chosen, self._unread = pool, {}, []
        self.most_unread = 0

    @property
    def unread(self):
        return len(self._unread)

    def launch(self, batch, parts):
        self._check_new_blocks(batch)
        texts, written = [], set()
        for (number, _, _), (tokens, cache) in zip(batch.chunks, parts, strict=True):
            for token in tokens:
                texts.append(self._write(number, token, cache))
                written.add(cache.block_table[(cache.length - 1) // BLOCK_SIZE])
        rows = []
        for row, choice in zip(batch.logits_at, batch.choices, strict=True):
            if choice is None:
                rows.append(logits_after(texts[row]))
                continue
            number, draw = choice
            self._chosen[number] = token_after(texts[row], draw)
            rows.append((self._chosen[number], None))
        self._unread.append((rows, written))
        self.most_unread = max(self.most_unread, len(self._unread))

    def _write(self, number, token, cache):
        """Put a token into its slot; return the text up to it, from the slots before it."""
        slots = [
            cache.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(cache.length + 1)
        ]
        before = self._pool.slots[slots[-2]] if len(slots) > 1 else ()
        assert len(before) == cache.length
        for position, slot in enumerate(slots[:-1]):
            assert self._pool.slots[slot] == before[: position + 1], (
                "another sequence has written to this block"
            )
        text = (*before, self._chosen[number] if token == PENDING else token)
        self._pool.slots[slots[-1]] = text
        cache.length += 1
        return text

    def _check_new_blocks(self, batch):
        """No new block may be one that a launched batch, whose end the host has not seen, writes to."""
        written = set().union(*(blocks for _, blocks in self._unread))
        new = {block for _, _, blocks in batch.chunks for block in blocks}
        assert not new & written

    def read(self):
        return self._unread.pop(0)[0]


def new_request(rng, common):
    """Return a random request: greedy or sampled, and for the GPU alone or in part for the host."""
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]
    if rng.random() < 0.5:
        prompt = common[: rng.randint(1, len(common))] + prompt
    new = rng.randint(1, 20)
    kind = rng.choice(["greedy", "sampled", "sampled", "host", "scored", "only scored"])
    options = {
        "greedy": {},
        "sampled": {"temperature": 1.0, "seed": rng.randrange(100)},
        "host": {"logprobs": 21},
        "scored": {"prompt_logprobs": 0},
        "only scored": {"prompt_logprobs": 0},
    }[kind]
    params = SamplingParams(max_new_tokens=0 if kind == "only scored" else new, **options)
    return Request(params, (EOS,), prompt, CONTEXT)


def expected_tokens(request):
    """Return the tokens that a request gets alone."""
    again, text = Request(request.params, (EOS,), request.prompt_ids, CONTEXT), tuple(request.prompt_ids)
    while again.finish_reason is None and request.params.max_new_tokens:
        again.append_token(token_after(text, again.sampler.draw()))
        text = *text, again.token_ids[-1]
    return again.token_ids


def run_schedule(seed):
    """Run random requests; some arrive late or are aborted. Return (requests, aborted, engine, model)."""
    rng = random.Random(seed)
    common = [rng.randrange(VOCABULARY) for _ in range(10)]
    blocks = rng.choice([11, 13, 20, 60])  # 44 positions are the most that a request needs
    limits = {"max_tokens_per_step": rng.choice([3, 16, 100]), "max_sequences": rng.choice([2, 5, 30])}
    model = FakeModel()
    engine = Engine(model, blocks, BLOCK_SIZE, **limits)
    scheduler, aborted = engine.scheduler, []
    waiting = [new_request(rng, common) for _ in range(rng.randint(1, 14))]
    wanted = list(waiting)
    while True:
        while waiting and rng.random() < 0.4:
            engine.add(waiting.pop())
        if engine.run_batch() is None and not waiting:
            return wanted, aborted, engine, model
        check_blocks(scheduler)
        if rng.random() < 0.05:
            running = [s.request for s in [*scheduler.running, *scheduler.waiting]]
            if running:
                aborted.append(rng.choice(running))
                scheduler.abort(aborted[-1])
                check_blocks(scheduler)


def test_random_schedules():
    """Check the tokens, that scored prompts have all scores, and that every block is free at the end."""
    most_unread, preempted, stopped, reused = 0, 0, 0, 0
    for seed in range(150):
        wanted, aborted, engine, model = run_schedule(seed)
        for request in wanted:
            expected = expected_tokens(request)
            if request in aborted:
                assert request.token_ids == expected[: len(request.token_ids)]
                continue
            assert request.token_ids == expected, seed
            assert request.finish_reason is not None
            stopped += request.finish_reason == "stop"
            if request.params.prompt_logprobs is not None:
                check_scores(request)
        scheduler = engine.scheduler
        assert scheduler.allocator.num_free_blocks == scheduler.allocator.num_blocks
        assert not scheduler.busy
        most_unread, preempted = max(most_unread, model.gpu.most_unread), preempted + scheduler.num_preempted
        reused += scheduler.num_reused_tokens
    assert most_unread == 2
    assert min(preempted, stopped, reused) > 50, "the schedules try everything"


def check_scores(request):
    assert len(request.prompt_logprobs) == len(request.prompt_ids)
    for position, scored in enumerate(request.prompt_logprobs[1:], 1):
        best = token_after(tuple(request.prompt_ids[:position]), 0.0)
        assert (scored[0] > -1) == (request.prompt_ids[position] == best)


def passes_of(params, count):
    """Return the number of passes, and of rows in them, for `count` equal requests."""
    model, sizes = FakeModel(), []
    engine = Engine(model, 100, BLOCK_SIZE)
    launch = model.gpu.launch
    model.gpu.launch = lambda batch, parts: sizes.append(len(parts)) or launch(batch, parts)
    for _ in range(count):
        engine.add(Request(params, (), [1, 2], CONTEXT))
    engine.run()
    return sizes


def test_a_known_length_needs_no_extra_row():
    assert passes_of(SamplingParams(max_new_tokens=8, ignore_eos=True), 3) == [3] * 8


def test_a_request_that_the_host_chooses_for_gets_every_other_batch():
    assert passes_of(SamplingParams(max_new_tokens=4, logprobs=21, ignore_eos=True), 2) == [2] * 4
    model, sizes = FakeModel(), []
    engine = Engine(model, 100, BLOCK_SIZE)
    launch = model.gpu.launch
    model.gpu.launch = lambda batch, parts: sizes.append(len(parts)) or launch(batch, parts)
    for logprobs, new in ((None, 8), (21, 4)):
        params = SamplingParams(max_new_tokens=new, logprobs=logprobs, ignore_eos=True)
        engine.add(Request(params, (), [1, 2], CONTEXT))
    engine.run()
    assert sizes == [2, 1] * 4


def test_an_end_of_text_costs_one_row():
    """The batch after the end is launched before the end is known."""
    request = Request(SamplingParams(max_new_tokens=30), (EOS,), [3, 1], CONTEXT)
    model = FakeModel()
    engine = Engine(model, 20, BLOCK_SIZE)
    engine.add(request)
    batches = 0
    while engine.run_batch() is not None:
        batches += 1
    assert request.finish_reason == "stop"
    assert batches == len(request.token_ids) + 2  # one more is launched, and one call only reads


def test_ranks_whose_gpus_choose_different_tokens_are_an_error():
    def rank(comm):
        model = FakeModel(comm)
        engine = Engine(model, 20, BLOCK_SIZE)
        if comm.rank == 0:
            engine.add(Request(SamplingParams(max_new_tokens=9, ignore_eos=True), (), [1, 2, 3], CONTEXT))
        else:
            read = model.gpu.read
            model.gpu.read = lambda: [(token + 1, None) for token, _ in read()]
        engine.run()

    with pytest.raises(RankError, match=r"rank 1 chose token .* and rank 0 .*: their GPUs disagree"):
        run_threads(2, rank)
