"""The scheduler: rank 0 decides which tokens to compute next, and sends all ranks a ScheduledBatch.

A batch may contain decoding sequences and prompts together. Decoding sequences come first, one token each,
the oldest first. Then come running sequences whose prompts are not finished, with as many tokens as the batch
still has room for, and then waiting sequences. If no block is free, the youngest sequence is preempted: its
blocks are freed, and it waits. It starts again later, with its generated tokens as part of the prompt, which
gives the same result.

A request may ask for the log-probabilities of its prompt's tokens. They need the logits of every position of
the prompt, and the prefix cache has only keys and values, so these positions are computed in any case.
"""

from dataclasses import dataclass, field

from minitp.engine.blocks import BlockAllocator
from minitp.engine.prefix_cache import block_keys
from minitp.errors import InputError
from minitp.util.format import counted

MAX_SCORED = 128  # prompt positions with logits in a batch, whose rows [V] rank 0 gathers and normalizes


@dataclass(eq=False)
class Sequence:
    """A request that is waiting or running, with its tokens and blocks."""

    number: int  # ascending in the order of arrival
    request: object  # request.Request
    token_ids: list
    num_computed_tokens: int = 0  # tokens from the start whose keys and values are in the blocks
    block_table: list = field(default_factory=list)
    block_keys: list = field(default_factory=list)  # one key for each full block

    @property
    def num_uncomputed_tokens(self):
        """The number of tokens still to compute; above one while the prompt is not finished."""
        return len(self.token_ids) - self.num_computed_tokens


@dataclass
class ScheduledBatch:
    """The work of one forward pass, the same on every rank.

    Attributes
    ----------
    chunks : list of (number, tokens, new_blocks)
        For each sequence, the tokens that go through the model and the blocks allocated for them.
    started : list of (number, block_table, length)
        Sequences that start running, with the cached blocks that they reuse.
    finished : list of int
        Sequences that have stopped running since the last batch.
    logits_at : list of int
        The rows, among all tokens of the batch, that get logits: for each sequence, the positions that score
        its prompt, and the last one if it gets a new token.
    """

    chunks: list
    started: list
    finished: list
    logits_at: list


class Scheduler:
    """A scheduler of many requests over one pool of blocks.

    Parameters
    ----------
    num_blocks, block_size : int
        The size of every rank's pool.
    max_tokens_per_step : int
        The maximum number of tokens in one batch.
    max_sequences : int
        The maximum number of sequences that run at the same time.
    largest_pass : callable
        largest_pass(n) -> the maximum number of tokens of a sequence in one batch after n computed tokens.

    Raises
    ------
    InputError
        If a size or limit is not positive.
    """

    def __init__(self, num_blocks, block_size, max_tokens_per_step, max_sequences, largest_pass):
        sizes = dict(num_blocks=num_blocks, block_size=block_size)
        limits = dict(max_tokens_per_step=max_tokens_per_step, max_sequences=max_sequences)
        for name, value in (sizes | limits).items():
            if value < 1:
                raise InputError(f"{name} {value}: expected 1 or more")
        self.largest_pass = largest_pass
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.max_tokens_per_step, self.max_sequences = max_tokens_per_step, max_sequences
        self.waiting, self.running = [], []  # sequences, from the oldest to the youngest
        self.num_preempted = 0
        self.num_reused_tokens = 0  # tokens found in the prefix cache
        self._arrived, self._started, self._finished = 0, [], []
        self._scheduled = {}  # sequence number -> (sequence, number of tokens, new blocks)
        self._num_scored = 0  # prompt positions with logits in the batch that is being scheduled

    def add(self, request):
        """Queue a request; raise InputError if it would not fit in the pool even alone."""
        room = self.allocator.num_blocks * self.allocator.block_size
        if request.positions > room:
            raise InputError(
                f"the prompt and the new tokens need up to {counted(request.positions, 'position')}, but the "
                f"cache has only {room}; ask for fewer new tokens"
            )
        keys = block_keys(request.prompt_ids, self.allocator.block_size)
        self.waiting.append(Sequence(self._arrived, request, list(request.prompt_ids), block_keys=keys))
        self._arrived += 1

    def abort(self, request):
        """Remove a request that is no longer needed and free its blocks."""
        for sequence in [s for s in self.running if s.request is request]:
            self._stop(sequence)
        self.waiting = [s for s in self.waiting if s.request is not request]

    @property
    def busy(self):
        """True if any request is waiting or running."""
        return bool(self.running or self.waiting)

    def load(self):
        """Return the current numbers of requests and blocks, and counts since the start, by name."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "blocks_in_use": self.allocator.num_blocks - self.allocator.num_free_blocks,
            "preempted": self.num_preempted,
            "reused_tokens": self.num_reused_tokens,
        }

    def schedule(self):
        """Return the next ScheduledBatch, or None if there is nothing to do."""
        self._scheduled, self._num_scored = {}, 0
        decoding = [s for s in self.running if s.num_uncomputed_tokens == 1]
        for sequence in decoding + [s for s in self.running if s.num_uncomputed_tokens > 1]:
            if sequence in self.running:  # an older sequence may have preempted it
                self._schedule_tokens(sequence)
        self._admit()
        if not self._scheduled:
            return None
        return self._batch()

    def commit(self, batch, logits):
        """Sample the next token of each sequence that gets one, and score prompts whose requests ask for it.

        Parameters
        ----------
        batch : ScheduledBatch
        logits : float32 [len(batch.logits_at), V], or None

        Returns
        -------
        list of Request
            The requests that have new output.
        """
        rows, advanced = iter(logits if batch.logits_at else []), []
        for number, tokens, _ in batch.chunks:
            sequence = self._scheduled[number][0]
            request, start = sequence.request, sequence.num_computed_tokens
            sequence.num_computed_tokens += len(tokens)
            self._register_full_blocks(sequence, len(tokens))
            scored = request.positions_to_score(start, sequence.num_computed_tokens)
            for _ in scored:
                request.score_prompt(next(rows))
            is_done = not sequence.num_uncomputed_tokens
            if is_done and request.params.max_new_tokens == 0:
                request.finish_reason = "length"
            elif is_done:
                sequence.token_ids.append(request.sample(next(rows))[0])
            if is_done or scored:
                advanced.append(request)
            if is_done and request.finish_reason is not None:
                self._stop(sequence)
        return advanced

    def _tokens_left(self):
        return self.max_tokens_per_step - sum(tokens for _, tokens, _ in self._scheduled.values())

    def _schedule_tokens(self, sequence):
        """Schedule as many tokens of a sequence as fit, preempting the youngest sequences for blocks."""
        done = sequence.num_computed_tokens
        tokens = min(sequence.num_uncomputed_tokens, self._tokens_left(), self.largest_pass(done))
        if sequence.request.positions_to_score(done, done + tokens):  # each of these tokens gets logits
            tokens = min(tokens, MAX_SCORED - self._num_scored)
        if tokens == 0:
            return
        needed = -(-(done + tokens) // self.allocator.block_size) - len(sequence.block_table)
        while (blocks := self.allocator.allocate(needed)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        sequence.block_table += blocks
        self._scheduled[sequence.number] = sequence, tokens, blocks
        self._num_scored += len(sequence.request.positions_to_score(done, done + tokens))

    def _admit(self):
        """Start the oldest waiting sequences while the batch has room and there are blocks for the prompt."""
        while self.waiting and self._tokens_left() and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            size = self.allocator.block_size
            sequence.block_keys = block_keys(sequence.token_ids, size, sequence.block_keys)
            # The last token is always computed, for its logits, and so are positions that score the prompt.
            scored = sequence.request.positions_to_score(0, len(sequence.token_ids))
            reusable = scored.start if scored else len(sequence.token_ids) - 1
            cached = self.allocator.lookup(sequence.block_keys[: reusable // size])
            needed = -(-len(sequence.token_ids) // size) - len(cached)
            if needed > self.allocator.num_free_blocks:
                self.allocator.free(cached)
                return
            sequence.block_table, sequence.num_computed_tokens = cached, len(cached) * size
            self._started.append((sequence.number, list(cached), sequence.num_computed_tokens))
            self.num_reused_tokens += sequence.num_computed_tokens
            if sequence.request.num_cached_tokens is None:  # otherwise it was preempted
                sequence.request.num_cached_tokens = sequence.num_computed_tokens
            self.waiting.pop(0)
            self.running.append(sequence)
            self._schedule_tokens(sequence)

    def _preempt(self, sequence):
        """Free the blocks of a sequence and put it at the head of the queue."""
        self.num_preempted += 1
        self._stop(sequence)
        self._scheduled.pop(sequence.number, None)
        self.waiting.insert(0, Sequence(sequence.number, sequence.request, sequence.token_ids))

    def _stop(self, sequence):
        self.running.remove(sequence)
        self.allocator.free(sequence.block_table)
        self._finished.append(sequence.number)

    def _register_full_blocks(self, sequence, tokens):
        """Register the blocks that the last `tokens` computed tokens have filled in the prefix cache."""
        size, done = self.allocator.block_size, sequence.num_computed_tokens
        new = slice((done - tokens) // size, done // size)
        if new.start == new.stop:
            return
        sequence.block_keys = block_keys(sequence.token_ids[: new.stop * size], size, sequence.block_keys)
        for block, key in zip(sequence.block_table[new], sequence.block_keys[new], strict=True):
            self.allocator.prefixes.register(block, key)

    def _batch(self):
        """Return the ScheduledBatch of the tokens that are scheduled."""
        chunks, logits_at, rows = [], [], 0
        for number, (sequence, tokens, blocks) in self._scheduled.items():
            request, start = sequence.request, sequence.num_computed_tokens
            stop = start + tokens
            chunks.append((number, sequence.token_ids[start:stop], blocks))
            logits_at += [rows + n - start for n in request.positions_to_score(start, stop)]
            rows += tokens
            if stop == len(sequence.token_ids) and request.params.max_new_tokens > 0:
                logits_at.append(rows - 1)
        batch = ScheduledBatch(chunks, self._started, self._finished, logits_at)
        self._started, self._finished = [], []
        return batch
