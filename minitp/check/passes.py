"""The forward passes that a check runs and records, with the code of `generate` and `serve`.

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
from minitp.trace.record import Recorder, greedy_request, passes_of, run_passes

UNWRITTEN = ("", 0)  # the origin of a position of the cache that no pass has written
BLOCK_SIZE = 4  # slots in a block of the engine's pool; small, so that a short prompt fills some blocks


@dataclass(frozen=True)
class RecordedPass:
    """The tokens of one sequence in a forward pass.

    Attributes
    ----------
    name : str
    sequence : int
        Index of the sequence in RecordedRun.sequences.
    start, stop : int
        The positions of its tokens in this pass.
    cached : tuple of (str, int)
        The origin of each position before `start`: the name of the pass that wrote its key and value to the
        cache, and its row in that pass.
    block_table : tuple of int
        The blocks of the sequence in a paged cache; empty for another cache.
    logit_rows : int
        The number of rows of logits, which belong to the last positions.
    """

    name: str
    sequence: int
    start: int
    stop: int
    cached: tuple = ()
    block_table: tuple = ()
    logit_rows: int = 0

    @property
    def origins(self):
        """The origins of the positions from `start` to `stop`, as in `cached`."""
        return tuple((self.name, row) for row in range(self.stop - self.start))


@dataclass(frozen=True)
class RecordedRun:
    """The passes and sequences of a check, as rank 0 knows them; the arrays are in each rank's StepFile.

    Attributes
    ----------
    passes : list of RecordedPass
        The passes in the order of the findings.
    sequences : list of list of int
        The token ids of each sequence that went through the model; sequence 0 is the user's prompt and the
        tokens decoded after it.
    prompt_lengths : list of int
        The number of prompt tokens of each sequence.
    results : list of list of int
        The token ids of each sequence at the end, including a last one that was chosen but not run.
    """

    passes: list
    sequences: list
    prompt_lengths: list
    results: list


def chunk_stops(tokens):
    """Return the stops of two unequal chunks of a prompt, the first the smaller; empty for a single token."""
    return [max(1, 2 * tokens // 5), tokens] if tokens > 1 else []


def run_all_passes(model, prompt, decode, batch, step_file):
    """Run all passes of a check; return the RecordedRun on every rank.

    Parameters
    ----------
    model : Model
    prompt : list of int
    decode : int
        The number of tokens to decode after the prompt.
    batch : int
        The number of sequences that run through the engine; 0 for none.
    step_file : StepFile
        The file that gets this rank's steps.
    """
    recorder = Recorder(model.device, None, step_file.write)
    prefill_and_decode = passes_of(len(prompt), decode)
    ids = run_passes(model, prompt, prefill_and_decode, recorder)
    passes, cached = [], ()
    for name, start, stop in prefill_and_decode:
        passes.append(RecordedPass(name, 0, start, stop, cached, logit_rows=stop - start))
        cached += passes[-1].origins
    passes[1:1] = run_chunks(model, prompt, recorder)  # the chunks are listed next to `prefill`
    sequences, prompts, results = [ids], [prompt], [ids]
    if batch:
        engine_run = EngineRun(model, prompt, batch, recorder, step_file)
        passes += engine_run.run()
        sequences += engine_run.sequences
        prompts += engine_run.prompts
        results += engine_run.results
    return model.comm.broadcast(RecordedRun(passes, sequences, list(map(len, prompts)), results))


def run_chunks(model, prompt, recorder):
    """Run a prompt in two chunks, as `generate.prefill` runs a long one; return a list of RecordedPass."""
    passes, start, cached, cache = [], 0, (), model.new_cache(len(prompt))
    for number, stop in enumerate(chunk_stops(len(prompt))):
        name = f"prefill.{number}"
        recorder.begin(name)
        last = stop == len(prompt)
        model.forward(prompt[start:stop], cache, slice(-1, None) if last else None, recorder)
        passes.append(RecordedPass(name, 0, start, stop, cached, logit_rows=int(last)))
        start, cached = stop, cached + passes[-1].origins
    return passes


class EngineRun:
    """A run of several sequences through the engine.

    Parameters
    ----------
    model, prompt, step_file
        The same as for `run_all_passes`.
    count : int
        The number of sequences.
    recorder : Recorder

    Attributes
    ----------
    prompts : list of list of int
        The tokens of each prompt.
    sequences : list of list of int
        The tokens of each sequence that went through the model; on rank 0, after `run`.
    results : list of list of int
        The tokens of each sequence and the last one, which has not gone through it; on rank 0, after `run`.
    """

    def __init__(self, model, prompt, count, recorder, step_file):
        self.model, self.recorder, self.step_file = model, recorder, step_file
        self.prompts = batch_prompts(prompt, count, model.config.vocab_size)
        # The maximum number of tokens in a batch: fewer than those of all prompts, so that one is divided.
        self.budget = max(BLOCK_SIZE, sum(map(len, self.prompts)) * 2 // 3)
        self.sequences, self.results = [], []
        self._passes, self._num_batches = [], 0
        self._origins = {}  # slot of the pool -> the origin of the key and value that it holds
        self._block_tables, self._lengths = {}, {}  # by the engine's number of a sequence

    def run(self):
        """Run all sequences to their ends; return a list of RecordedPass."""
        rank0 = self.model.comm.rank == 0
        blocks = self.model.comm.broadcast(scarce_blocks(self.prompts, self.budget) if rank0 else None)
        engine = Engine(self.model, blocks, BLOCK_SIZE, self.budget, len(self.prompts), run_ahead=False)
        requests = requests_for(self.prompts) if rank0 else []
        for request in requests[:-1]:
            engine.add(request)
        engine.run_batch(self._begin_batch)
        for request in requests[-1:]:  # it arrives when the blocks of the common tokens are full
            engine.add(request)
        while engine.run_batch(self._begin_batch) is not None:
            pass
        self.results = [[*request.prompt_ids, *request.token_ids] for request in requests]
        self.sequences = [ids[:-1] for ids in self.results]  # the last token has been chosen but not run
        return self._passes

    def _begin_batch(self, batch, parts):
        """Note the passes of a batch and begin to record them; return the recorder (see Engine.run_batch)."""
        self._num_batches += 1
        for number, block_table, length in batch.started:
            self._block_tables[number], self._lengths[number] = list(block_table), length
        row_stops = np.cumsum([len(tokens) for _, tokens, _ in batch.chunks])  # among the rows of the batch
        passes = []
        chunks = zip(batch.chunks, row_stops, parts, strict=True)
        for (number, tokens, new_blocks), row_stop, (_, cache) in chunks:
            block_table, start = self._block_tables[number], self._lengths[number]
            block_table += new_blocks
            stop = self._lengths[number] = start + len(tokens)
            slots = [slot_of(block_table, position) for position in range(stop)]
            cached = tuple(self._origins.get(slot, UNWRITTEN) for slot in slots[:start])
            name, logit_rows = f"batch.{self._num_batches}.seq{number}", int(row_stop - 1 in batch.logits_at)
            sequence = 1 + number  # sequence 0 of the RecordedRun has not run in the engine
            pass_ = RecordedPass(name, sequence, start, stop, cached, tuple(block_table), logit_rows)
            self._origins.update(zip(slots[start:], pass_.origins, strict=True))
            passes.append(pass_)
            self.step_file.write(f"{name}/{BLOCK_TABLE}", np.array(cache.block_table, np.int64))  # [B]
        self._passes += passes
        rows = [pass_.stop - pass_.start for pass_ in passes]
        logit_rows = [pass_.logit_rows for pass_ in passes]
        self.recorder.begin(*(pass_.name for pass_ in passes), rows=rows, logit_rows=logit_rows)
        return self.recorder


def slot_of(block_table, position):
    """Return the slot of the pool that holds a position of a sequence.

    This repeats `paged_cache.slot_mapping`, which is under test and so must not be what it is compared with.
    """
    return block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def batch_prompts(prompt, count, vocab_size):
    """Return `count` prompts of different lengths that begin with the same tokens, at least one block."""
    shared = (prompt * BLOCK_SIZE)[: max(BLOCK_SIZE, len(prompt) // BLOCK_SIZE * BLOCK_SIZE)]
    tail = [(prompt[-1] + 1 + i) % vocab_size for i in range(count + 1)]
    return [[*shared, tail[number], *tail[:number]] for number in range(count)]


def requests_for(prompts):
    """Return a request for each prompt, whose new tokens do not fit in the prompt's last block."""
    return [greedy_request(prompt, len(prompt) + BLOCK_SIZE + 1) for prompt in prompts]


def longest_positions(prompts):
    """Return the number of positions of the longest sequence; 0 if there is none."""
    return max((request.positions for request in requests_for(prompts)), default=0)


def scarce_blocks(prompts, budget):
    """Return the largest number of blocks with which a sequence is preempted.

    If none is preempted with any number, return the number of blocks that the longest sequence needs.
    `budget` is the maximum number of tokens in a batch.
    """
    needed = -(-longest_positions(prompts) // BLOCK_SIZE)
    pools = range(needed * len(prompts), needed, -1)
    return next((blocks for blocks in pools if preemptions(prompts, blocks, budget)), needed)


def preemptions(prompts, blocks, budget):
    """Return how often the scheduler preempts a sequence if the model always chooses token 0."""
    scheduler = Scheduler(blocks, BLOCK_SIZE, budget, len(prompts), lambda past: budget)
    waiting = requests_for(prompts)
    for request in waiting[:-1]:
        scheduler.add(request)
    while (batch := scheduler.schedule()) is not None:
        scheduler.accept(np.zeros((len(batch.logits_at), 1), np.float32))
        for request in waiting[-1:]:  # it arrives after the first batch, as in EngineRun.run
            scheduler.add(request)
        waiting = []
    return scheduler.num_preempted
