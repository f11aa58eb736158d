"""One rank's part in running many requests: forward passes over the batches that rank 0 schedules."""

from functools import partial

from minitp.engine.scheduler import Scheduler
from minitp.generate import check_choice, host_logits, largest_pass
from minitp.model import unrecorded
from minitp.paged_cache import PagedCache
from minitp.request import check_request


class Engine:
    """One rank's part in running many requests on a model.

    Parameters
    ----------
    model : Model
    num_blocks, block_size : int
        The size of the pool.
    max_tokens_per_step, max_sequences : int
        The maximum number of tokens in one forward pass, and of sequences that run at the same time.
    run_ahead : bool
        Let a GPU with the fused path choose the tokens, and launch each batch before the host has read the
        tokens of the last one. False is the simple way of the other paths, in which the passes of a batch can
        be recorded.

    Attributes
    ----------
    scheduler : Scheduler
        The scheduler on rank 0, None on the other ranks.
    """

    def __init__(
        self, model, num_blocks, block_size=16, max_tokens_per_step=512, max_sequences=64, run_ahead=True
    ):
        self.model, self.scheduler, run_ahead = model, None, run_ahead and model.fused
        if model.comm.rank == 0:
            sizes = num_blocks, block_size, max_tokens_per_step, max_sequences
            self.scheduler = Scheduler(*sizes, partial(largest_pass, model), run_ahead)
        self.pool = model.new_pool(num_blocks, block_size)
        self._caches = {}  # sequence number -> PagedCache
        self._ahead = model.batches_ahead(self.pool, max_sequences) if run_ahead else None
        self._chosen = []  # tokens of the batch that was read last

    def add(self, request):
        """Queue a request; only rank 0 calls this.

        Raises
        ------
        InputError
            If the request is invalid for the model, or would not fit in the pool even alone.
        """
        check_request(request.prompt_ids, request.params, self.model.config, request.max_context)
        self.scheduler.add(request)

    def run_batch(self, recording=lambda batch, parts: unrecorded):
        """Run the next batch of the scheduler; all ranks call this.

        Parameters
        ----------
        recording : callable
            recording(batch, parts) returns the `record` of a ScheduledBatch's forward pass over `parts`; see
            Model.forward_batch.

        Returns
        -------
        list of Request or None
            The requests that have new output (an empty list except on rank 0), or None without work.
        """
        if self._ahead is not None:
            return self._run_batch_ahead()
        comm = self.model.comm
        batch = comm.broadcast(self.scheduler.schedule() if comm.rank == 0 else None)
        if batch is None:
            return None
        logits = self._forward(batch, recording)
        return self.scheduler.accept([] if logits is None else logits) if comm.rank == 0 else []

    def run(self):
        """Run batches until all requests are done."""
        while self.run_batch() is not None:
            pass

    def _run_batch_ahead(self):
        """Launch the next batch, then read the results of the one before it.

        The tokens that rank 0 read last travel with the batch, and all ranks compare theirs.
        """
        comm = self.model.comm
        batch = self.scheduler.schedule() if comm.rank == 0 else None
        batch, chosen = comm.broadcast((batch, self._chosen))
        for own, token in zip(self._chosen, chosen, strict=True):
            check_choice(comm, own, token)
        unread, self._chosen = self._ahead.unread, []
        if batch is not None:
            self._ahead.launch(batch, self._parts(batch))
        elif not unread:
            return None
        if not unread:
            return []
        rows = self._ahead.read()
        self._chosen = [row[0] for row in rows if isinstance(row, tuple)]
        return self.scheduler.accept(rows) if comm.rank == 0 else []

    def _parts(self, batch):
        """Return the (tokens, cache) of each chunk of a batch, after updating the caches of its sequences."""
        for number in batch.finished:
            self._caches.pop(number, None)  # a sequence may finish before its first batch
        for number, block_table, length in batch.started:
            self._caches[number] = PagedCache(self.pool, list(block_table), length)
        parts = []
        for number, tokens, blocks in batch.chunks:
            cache = self._caches[number]
            cache.block_table += blocks
            parts.append((tokens, cache))
        return parts

    def _forward(self, batch, recording):
        """Run a batch; return its logits, float32 [len(batch.logits_at), V], or None if it has none."""
        parts = self._parts(batch)
        logits_at = self.model.device.xp.asarray(batch.logits_at) if batch.logits_at else None
        logits = self.model.forward_batch(parts, logits_at, recording(batch, parts))
        return None if logits is None else host_logits(self.model, logits)
