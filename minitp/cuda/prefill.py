"""The prefill of the fused model: passes over prompts, and the choice between a graph and cuBLAS.

A pass over up to CAPTURED_ROWS tokens computes its products with `linear.store` and is padded to one of three
sizes. The first pass of a size is captured as a graph, which later ones replay. Larger passes use cuBLAS,
which CuPy does not let a graph capture.
"""

from functools import cache

from minitp import ops
from minitp.cuda.kernels.linear import MAX_TOKENS
from minitp.cuda.prompt_pass import Buffers, PromptPass
from minitp.model import unrecorded

CAPTURED_ROWS = MAX_TOKENS
SMALLEST_PASS = 16  # rows of the smallest captured pass; smaller ones would hardly be faster


class Prefill:
    """The passes over prompts of one model, and their memory.

    Parameters
    ----------
    model : FusedModel
    """

    def __init__(self, model):
        self.model, self._buffers = model, {}
        self.kernels = cache(self._kernels)  # block size -> (BeginDecode, AttentionPrefill by window)

    def __call__(self, parts, logits_at, record):
        """Return the logits [n, V] of the rows `logits_at`, or None if that is None."""
        rows = sum(len(ids) for ids, _ in parts)
        if rows <= CAPTURED_ROWS and self.model.comm.capturable and record is unrecorded:
            prompts = self._captured_pass(parts[0][1].pool, rows, len(parts))
        else:
            blocks = sum(len(kv_cache.block_table) for _, kv_cache in parts)
            longest = max(len(ids) for ids, _ in parts)
            prompts = self._new_pass(
                parts[0][1].pool, rows, len(parts), blocks, longest, rows > CAPTURED_ROWS
            )
        prompts.fill(parts)
        if record is unrecorded:
            prompts.launch()
        else:
            prompts.run(record)
        return self._logits(self.model.without_padding(prompts.buffers.h[:rows]), logits_at, record)

    def _captured_pass(self, pool, rows, sequences):
        """Return a pool's PromptPass for at least this many rows, which other prompts use too."""
        size = next(size for size in (SMALLEST_PASS, 32, CAPTURED_ROWS) if rows <= size)
        most = 1 if sequences == 1 else size
        if (size, most) not in pool.prompt_graphs:
            context = min(self.model.config.max_position_embeddings, pool.blocks * pool.block_size)
            blocks = most * -(-context // pool.block_size)
            pool.prompt_graphs[size, most] = self._new_pass(pool, size, most, blocks, size, captures=True)
        return pool.prompt_graphs[size, most]

    def _new_pass(self, *args, **options):
        return PromptPass(self, *args, **options)

    def buffers(self, rows):
        """Return the Buffers of a pass of this many rows; passes of similar sizes share their memory."""
        size = max(CAPTURED_ROWS, 1 << (rows - 1).bit_length())
        if size > CAPTURED_ROWS:  # of these only the last is kept, because no graph refers to it
            self._buffers = {n: b for n, b in self._buffers.items() if n in (CAPTURED_ROWS, size)}
        if size not in self._buffers:
            self._buffers[size] = Buffers.allocate(self.model, size)
        return self._buffers[size].first(rows)

    def _kernels(self, block_size):
        kernels = self.model.kernels
        return kernels.begin_decode(block_size), kernels.attention_prefill(block_size)

    def _logits(self, h, logits_at, record):
        """Return the logits [n, V] of some of the rows of h [T, D], the final norm."""
        m = self.model
        if logits_at is None:
            return None
        h = h[logits_at]  # [n, D]
        record().final_norm = h
        logits_r = ops.logits_partial(m.device.xp, h, m.weights.lm_head, **m.logit_options)  # [n, V_r]
        record().logits_partial = logits_r
        logits = m.comm.all_gather(logits_r, m.vocab_widths)  # [n, V]
        record().logits = logits
        return logits
