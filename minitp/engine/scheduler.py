"""What the next step computes: rank 0 decides it, and all ranks get it as a StepPlan.

Sequences that decode go first, one token each, oldest first; then those whose prompt is not through yet, in
chunks, as many tokens as the step may still have; then new ones. When blocks run out, the youngest sequence
gives its own back and waits: it begins anew later, with what it has generated as a part of its prompt, to the
same result.
"""

from dataclasses import dataclass, field

from minitp.engine.blocks import BlockAllocator
from minitp.engine.prefix_cache import block_keys
from minitp.errors import InputError


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens, of which the first `computed` are in its blocks."""

    number: int  # in the order of arrival
    request: object  # request.Request
    token_ids: list
    computed: int = 0
    block_table: list = field(default_factory=list)
    keys: list = field(default_factory=list)  # of its full blocks

    @property
    def missing(self):
        """Tokens that are not computed; more than one: its prompt is not through."""
        return len(self.token_ids) - self.computed


@dataclass
class StepPlan:
    """One step, for every rank.

    Attributes
    ----------
    parts : list of (number, tokens, new_blocks)
        Of each sequence the tokens that go through the model, and the blocks that it gets for them.
    begin : list of (number, block_table, length)
        Sequences that join, with the blocks of others that they begin with.
    end : list of int
        Sequences that have left since the last step.
    logits_at : list of int
        Rows, among all tokens of the step, of the last tokens of those sequences that go on.
    """

    parts: list
    begin: list
    end: list
    logits_at: list


class Scheduler:
    """Decides the steps of many requests.

    Parameters
    ----------
    blocks, block_size : int
        Of every rank's pool.
    max_tokens_per_step : int
    max_sequences : int
        That run at the same time.
    largest_pass : callable
        How many tokens of one sequence a step may take behind so many that are computed.

    Raises
    ------
    InputError
        if one of the numbers is not positive.
    """

    def __init__(self, blocks, block_size, max_tokens_per_step, max_sequences, largest_pass):
        sizes = {"blocks": blocks, "block size": block_size, "tokens per step": max_tokens_per_step}
        for name, value in (sizes | {"sequences": max_sequences}).items():
            if value < 1:
                raise InputError(f"{name}: {value}, expected 1 or more")
        self.largest_pass = largest_pass
        self.allocator = BlockAllocator(blocks, block_size)
        self.max_tokens_per_step, self.max_sequences = max_tokens_per_step, max_sequences
        self.waiting, self.running = [], []  # each from the oldest to the youngest
        self.preempted = 0  # how often a sequence had to give its blocks back
        self.reused_tokens = 0  # that were there, in blocks of others, when a sequence began
        self._arrived, self._ended, self._begun, self._planned = 0, [], [], {}

    def add(self, request):
        """A request joins as soon as there is room; InputError if it could not run even alone."""
        room = self.allocator.blocks * self.allocator.block_size
        if request.positions > room:
            raise InputError(
                f"prompt and new tokens may come to {request.positions} positions, too many for a cache of "
                f"{room}; ask for fewer"
            )
        self.waiting.append(Sequence(self._arrived, request, list(request.prompt_ids)))
        self._arrived += 1

    def remove(self, request):
        """A request that nobody wants any more; its blocks are free at once."""
        for sequence in [s for s in self.running if s.request is request]:
            self._leave(sequence)
        self.waiting = [s for s in self.waiting if s.request is not request]

    @property
    def busy(self):
        """Whether any request is on its way."""
        return bool(self.running or self.waiting)

    def load(self):
        """How busy it is: requests, blocks, and what has been done since the beginning."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "blocks_in_use": self.allocator.blocks - self.allocator.available,
            "preempted": self.preempted,
            "reused_tokens": self.reused_tokens,
        }

    def plan(self):
        """The next StepPlan; None if there is nothing to do."""
        self._planned = {}
        decoding = [s for s in self.running if s.missing == 1]
        for sequence in decoding + [s for s in self.running if s.missing > 1]:
            if sequence in self.running:  # else it has given its blocks to an older one
                self._give(sequence)
        self._admit()
        if not self._planned:
            return None
        return self._step_plan()

    def commit(self, plan, logits):
        """What came of `plan`: logits [len(plan.logits_at), V], a row for each sequence that goes on.

        Returns the requests of these sequences; each has a token more.
        """
        rows, took = iter(logits if plan.logits_at else []), []
        for number, tokens, _ in plan.parts:
            sequence = self._planned[number][0]
            sequence.computed += len(tokens)
            self._remember(sequence)
            if sequence.missing:
                continue
            token, last = sequence.request.take(next(rows))
            sequence.token_ids.append(token)
            took.append(sequence.request)
            if last:
                self._leave(sequence)
        return took

    def _room(self):
        """Tokens that this step may still have."""
        return self.max_tokens_per_step - sum(tokens for _, tokens, _ in self._planned.values())

    def _give(self, sequence):
        """Plan as many of its tokens as this step may have, with blocks from the youngest if need be."""
        tokens = min(sequence.missing, self._room(), self.largest_pass(sequence.computed))
        if tokens == 0:
            return
        size = self.allocator.block_size
        while True:
            needed = -(-(sequence.computed + tokens) // size) - len(sequence.block_table)
            blocks = self.allocator.take(needed)
            if blocks is not None:
                break
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        sequence.block_table += blocks
        self._planned[sequence.number] = sequence, tokens, blocks

    def _admit(self):
        """Let the oldest of those who wait join, while there are tokens, and blocks for the whole prompt."""
        while self.waiting and self._room() and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            size = self.allocator.block_size
            sequence.keys = block_keys(sequence.token_ids, size, sequence.keys)
            # The last token is computed in any case, for its logits.
            shared = self.allocator.find(sequence.keys[: (len(sequence.token_ids) - 1) // size])
            needed = -(-len(sequence.token_ids) // size) - len(shared)
            if needed > self.allocator.available:
                self.allocator.release(shared)
                return
            sequence.block_table, sequence.computed = shared, len(shared) * size
            self._begun.append((sequence.number, list(shared), sequence.computed))
            self.reused_tokens += sequence.computed
            self.waiting.pop(0)
            self.running.append(sequence)
            self._give(sequence)

    def _preempt(self, sequence):
        """Its blocks are taken; it waits before all others."""
        self.preempted += 1
        self._leave(sequence)
        self._planned.pop(sequence.number, None)
        self.waiting.insert(0, Sequence(sequence.number, sequence.request, sequence.token_ids))

    def _leave(self, sequence):
        self.running.remove(sequence)
        self.allocator.release(sequence.block_table)
        self._ended.append(sequence.number)

    def _remember(self, sequence):
        """Its full blocks may serve others from now on."""
        size = self.allocator.block_size
        full = sequence.computed // size
        sequence.keys = block_keys(sequence.token_ids[: full * size], size, sequence.keys[:full])
        for block, key in zip(sequence.block_table[:full], sequence.keys, strict=True):
            self.allocator.prefixes.remember(block, key)

    def _step_plan(self):
        parts, logits_at, rows = [], [], 0
        for number, (sequence, tokens, blocks) in self._planned.items():
            stop = sequence.computed + tokens
            parts.append((number, sequence.token_ids[sequence.computed : stop], blocks))
            rows += tokens
            if stop == len(sequence.token_ids):
                logits_at.append(rows - 1)
        plan = StepPlan(parts, self._begun, self._ended, logits_at)
        self._begun, self._ended = [], []
        return plan
