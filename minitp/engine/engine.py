"""The step of many requests that all ranks run together."""

from minitp.kv_cache import PagedCache


class Engine:
    """One rank's part in serving many requests.

    Parameters
    ----------
    model : Model
    scheduler : Scheduler
        On rank 0; None on the others.
    blocks, block_size : int
        Of the pool; as in the scheduler.
    """

    def __init__(self, model, scheduler, blocks, block_size=16):
        self.model, self.scheduler = model, scheduler
        self.pool = model.new_pool(blocks, block_size)
        self._caches = {}  # sequence number -> PagedCache

    def step(self):
        """Run the scheduler's next step, on all ranks. False if there was nothing to do."""
        comm = self.model.comm
        plan = comm.broadcast(self.scheduler.plan() if comm.rank == 0 else None)
        if plan is None:
            return False
        logits = self._run(plan)
        if comm.rank == 0:
            self.scheduler.commit(plan, logits)
        return True

    def run(self):
        """Steps until all requests are done."""
        while self.step():
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
        return self.model.forward_batch(parts, logits_at=logits_at)
