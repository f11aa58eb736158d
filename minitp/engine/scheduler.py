"""The scheduler: rank 0 decides which tokens to compute next, and sends all ranks a ScheduledBatch.

A batch may contain decoding sequences and prompts together. Decoding sequences come first, one token each,
the oldest first. Then come running sequences whose prompts are not finished, with as many tokens as the batch
still has room for, and then waiting sequences. If no block is free, the youngest sequence is preempted: its
blocks are freed, and it waits. It starts again later, with its generated tokens as part of the prompt, which
gives the same result.

On a GPU that chooses the tokens, batches are scheduled before the tokens of the last one are known, on the
assumption that every sequence goes on. A token that the GPU knows and the host does not is PENDING. If a
sequence ends after all, the batch in flight has one row too many: its result is dropped, and its blocks are
freed when that batch is accepted. A sequence is preempted only while no batch is in flight.

A request may ask for the log-probabilities of its prompt's tokens. They need the logits of every position of
the prompt, and the prefix cache has only keys and values, so these positions are computed in any case.
"""

from collections import deque

from minitp.engine.batch import ScheduledBatch, ScheduledChunk, Sequence
from minitp.engine.blocks import BlockAllocator
from minitp.engine.prefix_cache import block_keys
from minitp.errors import InputError
from minitp.sampling import PENDING
from minitp.util.format import counted

MAX_SCORED = 128  # prompt positions with logits in a batch, whose rows [V] rank 0 gathers and normalizes


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
    gpu_chooses : bool
        Let a GPU choose the tokens, so that a batch may be scheduled before the last one is accepted.

    Raises
    ------
    InputError
        If a size or limit is not positive.
    """

    def __init__(
        self, num_blocks, block_size, max_tokens_per_step, max_sequences, largest_pass, gpu_chooses=False
    ):
        sizes = dict(num_blocks=num_blocks, block_size=block_size)
        limits = dict(max_tokens_per_step=max_tokens_per_step, max_sequences=max_sequences)
        for name, value in (sizes | limits).items():
            if value < 1:
                raise InputError(f"{name} {value}: expected 1 or more")
        self.largest_pass, self.gpu_chooses = largest_pass, gpu_chooses
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.max_tokens_per_step, self.max_sequences = max_tokens_per_step, max_sequences
        self.waiting, self.running = [], []  # sequences, from the oldest to the youngest
        self.num_preempted = 0
        self.num_reused_tokens = 0  # tokens found in the prefix cache
        self._arrived, self._started, self._finished, self._sampling = 0, [], [], {}
        self._scheduled = {}  # sequence number -> (sequence, number of tokens, new blocks)
        self._in_flight = deque()  # the ScheduledChunks of each batch that has not been accepted
        self._tokens_left = 0  # tokens for which that batch has room
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
        """True if any request is waiting or running, or any batch is in flight."""
        return bool(self.running or self.waiting or self._in_flight)

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
        """Return the next ScheduledBatch; None if there is nothing to do before a batch is accepted."""
        if self._in_flight and not self._has_room_ahead():
            return None
        self._scheduled, self._num_scored, self._tokens_left = {}, 0, self.max_tokens_per_step
        ready = [s for s in self.running if s.is_ready]
        decoding = [s for s in ready if s.num_uncomputed_tokens == 1]
        for sequence in decoding + [s for s in ready if s.num_uncomputed_tokens > 1]:
            if sequence in self.running:  # an older sequence may have preempted it
                self._schedule_tokens(sequence)
        self._admit()
        if not self._scheduled:
            return None
        return self._batch()

    def accept(self, rows):
        """Add the results of the oldest scheduled batch that has not been accepted.

        Parameters
        ----------
        rows : iterable
            For each row of the batch's `logits_at`, the token and its log-probabilities or None if a GPU has
            chosen the token; otherwise the logits, float32 [V].

        Returns
        -------
        list of Request
            The requests that have new output.
        """
        rows, advanced = iter(rows), []
        for chunk in self._in_flight.popleft():
            sequence, request = chunk.sequence, chunk.sequence.request
            sequence.in_flight -= 1
            gets_token = chunk.is_last and request.params.max_new_tokens > 0
            if sequence.stopped:
                for _ in range(chunk.num_scored + gets_token):
                    next(rows)
                self._free_stopped(sequence)
                continue
            self._register_full_blocks(chunk)
            for _ in range(chunk.num_scored):
                request.score_prompt(next(rows))
            if gets_token:
                sequence.token_ids[chunk.stop] = append_choice(request, next(rows))
            elif chunk.is_last:
                request.finish_reason = "length"
            if chunk.is_last or chunk.num_scored:
                advanced.append(request)
            if request.finish_reason is not None:
                self._stop(sequence)
        return advanced

    def _has_room_ahead(self):
        """Return whether every running sequence gets the blocks for all its tokens without preempting one."""
        size = self.allocator.block_size
        needed = sum(-(-len(s.token_ids) // size) - len(s.block_table) for s in self.running)
        return needed <= self.allocator.num_free_blocks

    def _schedule_tokens(self, sequence):
        """Schedule as many tokens of a sequence as fit, preempting the youngest sequences for blocks."""
        done = sequence.num_computed_tokens
        tokens = min(sequence.num_uncomputed_tokens, self._tokens_left, self.largest_pass(done))
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
        self._tokens_left -= tokens
        self._num_scored += len(sequence.request.positions_to_score(done, done + tokens))

    def _admit(self):
        """Start the oldest waiting sequences while the batch has room and there are blocks for the prompt."""
        while self.waiting and self._tokens_left and len(self.running) < self.max_sequences:
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
            if self._gpu_chooses_for(sequence.request):
                self._sampling[sequence.number] = sampling_of(sequence)
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
        if sequence.number in self._scheduled:
            _, tokens, _ = self._scheduled.pop(sequence.number)
            self._tokens_left += tokens
        self.waiting.insert(0, Sequence(sequence.number, sequence.request, sequence.token_ids))

    def _stop(self, sequence):
        self.running.remove(sequence)
        sequence.stopped = True
        self._finished.append(sequence.number)
        self._free_stopped(sequence)

    def _free_stopped(self, sequence):
        """Free the blocks of a stopped sequence, unless a batch in flight still writes to them."""
        if not sequence.in_flight:
            self.allocator.free(sequence.block_table)

    def _register_full_blocks(self, chunk):
        """Register the blocks that a chunk has filled in the prefix cache."""
        size, sequence = self.allocator.block_size, chunk.sequence
        new = slice(chunk.start // size, chunk.stop // size)
        if new.start == new.stop:
            return
        sequence.block_keys = block_keys(sequence.token_ids[: new.stop * size], size, sequence.block_keys)
        for block, key in zip(sequence.block_table[new], sequence.block_keys[new], strict=True):
            self.allocator.prefixes.register(block, key)

    def _batch(self):
        """Return the ScheduledBatch of the tokens that are scheduled, which is in flight from now on."""
        batch = ScheduledBatch([], self._started, self._finished, [], [], self._sampling)
        in_flight, rows = [], 0
        for number, (sequence, tokens, blocks) in self._scheduled.items():
            request, start = sequence.request, sequence.num_computed_tokens
            stop = start + tokens
            batch.chunks.append((number, sequence.token_ids[start:stop], blocks))
            scored = request.positions_to_score(start, stop)
            batch.logits_at += [rows + n - start for n in scored]
            batch.choices += [None] * len(scored)
            rows += tokens
            is_last = stop == len(sequence.token_ids)
            if is_last and request.params.max_new_tokens > 0:
                batch.logits_at.append(rows - 1)
                batch.choices.append(self._choice(sequence))
                sequence.token_ids.append(PENDING)
            in_flight.append(ScheduledChunk(sequence, start, stop, len(scored), is_last))
            sequence.num_computed_tokens = stop
            sequence.in_flight += 1
        self._started, self._finished, self._sampling = [], [], {}
        self._in_flight.append(in_flight)
        return batch

    def _gpu_chooses_for(self, request):
        return self.gpu_chooses and request.params.max_new_tokens > 0 and not request.params.needs_host

    def _choice(self, sequence):
        """Return (number, draw) if a GPU chooses the next token of a sequence, else None."""
        if not self._gpu_chooses_for(sequence.request):
            return None
        return sequence.number, sequence.request.sampler.draw()


def append_choice(request, row):
    """Append the token of a row to a request, and return it; see Scheduler.accept."""
    if isinstance(row, tuple):
        request.append_token(*row)
        return row[0]
    return request.sample(row)[0]


def sampling_of(sequence):
    """Return the (params, prompt_ids, new_ids, room) from which a GPU goes on choosing tokens."""
    request, new = sequence.request, []
    prompt = request.prompt_ids if request.params.repetition_penalty != 1 else []
    if request.params.changes_logits:
        new = sequence.token_ids[len(request.prompt_ids) :]
    room = request.positions - len(sequence.token_ids) + 1  # with the row of a sequence that has ended
    return request.params, prompt, new, room
