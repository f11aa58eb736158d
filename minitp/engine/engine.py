"""The step of many requests that all ranks run together."""

from functools import partial

from minitp.engine.scheduler import Scheduler
from minitp.generate import host_logits, largest_pass
from minitp.paged_cache import PagedCache
from minitp.request import check_prompt


class Engine:
    """One rank's part in serving many requests.

    Parameters
    ----------
    model : Model
    blocks, block_size : int
        Of the pool.
    max_tokens_per_step, max_sequences : int
        Tokens that go through the model at once, and sequences that run at the same time.

    Attributes
    ----------
    scheduler : Scheduler
        On rank 0; None on the others.
    """

    def __init__(self, model, blocks, block_size=16, max_tokens_per_step=512, max_sequences=64):
        self.model, self.scheduler = model, None
        if model.comm.rank == 0:
            longest = partial(largest_pass, model)
            self.scheduler = Scheduler(blocks, block_size, max_tokens_per_step, max_sequences, longest)
        self.pool = model.new_pool(blocks, block_size)
        self._caches = {}  # sequence number -> PagedCache

    def add(self, request):
        """On rank 0: a request joins as soon as there is room.

        Raises
        ------
        InputError
            if the model cannot take its prompt, or it could not run even alone.
        """
        check_prompt(request.prompt_ids, self.model.config, request.max_context)
        self.scheduler.add(request)

    def step(self):
        """Run the scheduler's next step, on all ranks.

        Returns
        -------
        list of Request or None
            On rank 0 those that have got a token. None, on all ranks, if there was nothing to do.
        """
        comm = self.model.comm
        plan = comm.broadcast(self.scheduler.plan() if comm.rank == 0 else None)
        if plan is None:
            return None
        logits = self._run(plan)
        return self.scheduler.commit(plan, logits) if comm.rank == 0 else []

    def run(self):
        """Steps until all requests are done."""
        while self.step() is not None:
            pass

    def _run(self, plan):
        """float32 [len(plan.logits_at), V], or None if no sequence has come to its last token."""
        for number in plan.end:
            self._caches.pop(number, None)  # it may have left before its first step
        for number, block_table, length in plan.begin:
            self._caches[number] = PagedCache(self.pool, list(block_table), length)
        parts = []
        for number, tokens, blocks in plan.parts:
            cache = self._caches[number]
            cache.block_table += blocks
            parts.append((tokens, cache))
        logits_at = self.model.device.xp.asarray(plan.logits_at) if plan.logits_at else None
        logits = self.model.forward_batch(parts, logits_at=logits_at)
        return None if logits is None else host_logits(self.model, logits)
