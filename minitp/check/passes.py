"""The forward passes that a check records: they run the code that `generate` and `serve` run.

    prefill, decode.1, ..   the prompt in one pass, then one token per pass
    prefill.0, prefill.1    the same prompt again in two chunks, with a cache of its own; only the last
                            position gets logits
    batch.1.seq0, ..        several sequences through the engine: the part of sequence 0 in its first batch

The sequences of the engine have different lengths and begin with the same tokens, so that they share blocks
of the paged cache. The pool has too few blocks for all of them, so that a sequence is preempted.
"""

from dataclasses import dataclass

import numpy as np

from minitp.engine.engine import Engine
from minitp.engine.scheduler import Scheduler
from minitp.trace.names import BLOCK_TABLE
from minitp.trace.record import greedy_request, passes_of, run_passes

UNWRITTEN = ("", 0)  # origin of a position of the cache that no pass has written
BLOCK_SIZE = 4  # slots in a block of the engine's pool; small, so that a short prompt fills some blocks


@dataclass(frozen=True)
class RecordedPass:
    """The tokens of one sequence in a forward pass.

    Attributes
    ----------
    name : str
    sequence : int
        Index of the sequence in Recording.sequences.
    start, stop : int
        The positions of its tokens in this pass.
    cached : tuple of (str, int)
        For each position before `start`, the name of the pass that wrote its key and value to the cache, and
        its row in that pass.
    block_table : tuple of int
        The blocks of the sequence in a paged cache.
    logits : int
        The number of rows of logits, which belong to the last positions.
    """

    name: str
    sequence: int
    start: int
    stop: int
    cached: tuple = ()
    block_table: tuple = ()
    logits: int = 0

    @property
    def rows(self):
        """The origins of the keys and values of this pass, as in `cached`."""
        return tuple((self.name, row) for row in range(self.stop - self.start))


@dataclass(frozen=True)
class Recording:
    """The recorded passes, in order, and the token ids of each sequence, as rank 0 knows them."""

    passes: list
    sequences: list
    prompts: list  # number of prompt tokens of each sequence


def chunk_stops(tokens):
    """Return the stops of two unequal chunks of a prompt, the first the smaller; empty for a single token."""
    return [max(1, 2 * tokens // 5), tokens] if tokens > 1 else []


def run_all(model, prompt, decode, batch, recorder, take):
    """Run all passes of a check; return the Recording on every rank.

    Parameters
    ----------
    model : Model
    prompt : list of int
    decode : int
        The number of tokens to decode after the prompt.
    batch : int
        The number of sequences that run through the engine; 0 for none.
    recorder : Recorder
    take : callable
        A function take(full name, array) that gets each rank's block tables.
    """
    whole = passes_of(len(prompt), decode)
    ids = run_passes(model, prompt, whole, recorder)
    passes, cached = [], ()
    for name, start, stop in whole:
        passes.append(RecordedPass(name, 0, start, stop, cached, logits=stop - start))
        cached += passes[-1].rows
    passes[1:1] = run_chunks(model, prompt, recorder)
    sequences, prompts = [ids], [len(prompt)]
    if batch:
        batches = Batches(model, prompt, batch, recorder, take)
        passes += batches.run()
        sequences += batches.sequences
        prompts += map(len, batches.prompts)
    return model.comm.broadcast(Recording(passes, sequences, prompts))


def run_chunks(model, prompt, recorder):
    """Run a prompt in two chunks, as `generate.prefill` runs a long one; return their Recording."""
    passes, start, cached, cache = [], 0, (), model.new_cache(len(prompt))
    for number, stop in enumerate(chunk_stops(len(prompt))):
        name = f"prefill.{number}"
        recorder.begin(name)
        last = stop == len(prompt)
        model.forward(prompt[start:stop], cache, slice(-1, None) if last else None, recorder)
        passes.append(RecordedPass(name, 0, start, stop, cached, logits=int(last)))
        start, cached = stop, cached + passes[-1].rows
    return passes


class Batches:
    """A run of several sequences through the engine.

    Parameters
    ----------
    model, prompt, recorder, take
        The same as for `run_all`.
    count : int
        The number of sequences.

    Attributes
    ----------
    prompts, sequences : list of list of int
        The tokens of each prompt; those of each sequence after the run, on rank 0.
    """

    def __init__(self, model, prompt, count, recorder, take):
        self.model, self.recorder, self.take = model, recorder, take
        self.prompts = batch_prompts(prompt, count, model.config.vocab_size)
        self.budget = max(BLOCK_SIZE, sum(map(len, self.prompts)) * 2 // 3)  # so that a prompt is divided
        self.sequences = []
        self._number, self._passes = 0, []
        self._written = {}  # slot of the pool -> (pass name, row) that wrote it last
        self._state = {}  # sequence number -> [block table, length]

    def run(self):
        """Run all sequences to their ends; return the Recording."""
        rank0 = self.model.comm.rank == 0
        blocks = self.model.comm.broadcast(scarce_blocks(self.prompts, self.budget) if rank0 else None)
        engine = Engine(self.model, blocks, BLOCK_SIZE, self.budget, len(self.prompts))
        requests = requests_for(self.prompts) if rank0 else []
        for request in requests[:-1]:
            engine.add(request)
        engine.run_batch(self._recording)
        for request in requests[-1:]:  # it arrives when the blocks of the common tokens are full
            engine.add(request)
        while engine.run_batch(self._recording) is not None:
            pass
        # The last token of a sequence has been chosen but not run.
        self.sequences = [[*request.prompt_ids, *request.token_ids[:-1]] for request in requests]
        return self._passes

    def _recording(self, batch, parts):
        """Note the passes of a batch; return the recorder that records them."""
        self._number += 1
        for number, block_table, length in batch.started:
            self._state[number] = [list(block_table), length]
        stops = np.cumsum([len(tokens) for _, tokens, _ in batch.chunks])
        now = []
        for (number, tokens, blocks), stop, (_, cache) in zip(batch.chunks, stops, parts, strict=True):
            state = self._state[number]
            state[0] += blocks
            name = f"batch.{self._number}.seq{number}"
            slots = [self._slot(state[0], position) for position in range(state[1] + len(tokens))]
            cached = tuple(self._written.get(slot, UNWRITTEN) for slot in slots[: state[1]])
            table, logits = tuple(state[0]), int(stop - 1 in batch.logits_at)
            now.append(RecordedPass(name, 1 + number, state[1], len(slots), cached, table, logits))
            self._written.update(zip(slots[state[1] :], now[-1].rows, strict=True))
            state[1] = len(slots)
            self.take(f"{name}/{BLOCK_TABLE}", np.array(cache.block_table, np.int64))
        self._passes += now
        rows = [pass_.stop - pass_.start for pass_ in now]
        self.recorder.begin(*(p.name for p in now), rows=rows, logit_rows=[p.logits for p in now])
        return self.recorder

    def _slot(self, block_table, position):
        return block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def batch_prompts(prompt, count, vocab_size):
    """Return `count` prompts of different lengths that begin with the same tokens, at least one block."""
    shared = (prompt * BLOCK_SIZE)[: max(BLOCK_SIZE, len(prompt) // BLOCK_SIZE * BLOCK_SIZE)]
    tail = [(prompt[-1] + 1 + i) % vocab_size for i in range(count + 1)]
    return [[*shared, tail[number], *tail[:number]] for number in range(count)]


def requests_for(prompts):
    """Return a request for each prompt, whose new tokens do not fit in its last block."""
    return [greedy_request(prompt, len(prompt) + BLOCK_SIZE + 1) for prompt in prompts]


def longest_positions(prompts):
    """Return the number of positions of the longest sequence; 0 if there is none."""
    return max((request.positions for request in requests_for(prompts)), default=0)


def scarce_blocks(prompts, budget):
    """Return the largest number of blocks with which a sequence is preempted."""
    needed = -(-longest_positions(prompts) // BLOCK_SIZE)
    pools = range(needed * len(prompts), needed, -1)
    return next((blocks for blocks in pools if preemptions(prompts, blocks, budget)), needed)


def preemptions(prompts, blocks, budget):
    """Return how often the scheduler preempts a sequence when the model always chooses token 0."""
    scheduler = Scheduler(blocks, BLOCK_SIZE, budget, len(prompts), lambda past: budget)
    waiting = requests_for(prompts)
    for request in waiting[:-1]:
        scheduler.add(request)
    while (batch := scheduler.schedule()) is not None:
        scheduler.commit(batch, np.zeros((len(batch.logits_at), 1), np.float32))
        for request in waiting[-1:]:
            scheduler.add(request)
        waiting = []
    return scheduler.num_preempted
