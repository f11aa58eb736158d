"""The model built from fused kernels, which computes the same as `model.Model` in fewer launches."""

import dataclasses
from contextlib import contextmanager

import numpy as np

from minitp import ops
from minitp.cuda.decode_graph import DecodeGraph
from minitp.cuda.kernels import Kernels
from minitp.cuda.kernels.linear import MAX_TOKENS
from minitp.cuda.loader import padded
from minitp.model import Model, joined, unrecorded
from minitp.paged_cache import BlockPool, PagedCache
from minitp.util.format import counted

BLOCK_SIZE = 16
KEPT_BLOCKS = (
    64  # a kept pool has a multiple of this many blocks, so that a slightly longer sequence still fits
)
LARGEST_HEAD = 256


def unfit(config, plan, device, kv_dtype):
    """Return why a model cannot use the fused path, or None; the answer is the same on all ranks."""
    if device.dtype.itemsize != 2:
        return f"its kernels compute in 16 bits, not in {device.dtype.name}"
    if kv_dtype not in ("auto", device.dtype.name):
        return f"its kernels read a cache of {device.dtype.name}, not of {kv_dtype}"
    if config.head_dim % 8 or config.head_dim > LARGEST_HEAD or config.hidden_size % 8:
        return (
            f"head_dim {config.head_dim} and hidden_size {config.hidden_size} must be multiples of 8, and "
            f"head_dim at most {LARGEST_HEAD}"
        )
    for ranges, what in ((plan.ffn_ranges, "FFN columns"), (plan.vocab_ranges, "rows of the vocabulary")):
        if any(start == stop for start, stop in ranges):
            return f"{ranges[-1][1]} {what} are too few for {counted(plan.tp, 'rank')}"
    if config.rotary_dim != config.head_dim:
        return f"its kernels rotate whole heads, not {config.rotary_dim} of {config.head_dim} dimensions"
    if config.rope.attention_factor != 1:
        return f"its kernels have no RoPE attention factor, which {config.rope.rope_type} scaling needs"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "words" in field.metadata and value != field.default:
            return f"it has no kernels for {field.metadata['words'].format(value)}"
    if len(set(config.windows)) > 1:
        return "its kernels support only one sliding window for all layers"
    return None


class Pool(BlockPool):
    """A BlockPool with the decode graphs that have been captured for it."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.blocks = self.storage[0][0].capacity // self.block_size
        self.graphs = {}  # batch -> DecodeGraph


class FusedModel(Model):
    """One rank of a tensor-parallel transformer on a GPU, in 16 bits; the fused counterpart of Model.

    Passes with one token per sequence use a captured graph (`decode_graph`); other passes (prompts) use
    cuBLAS for the products and kernels for the rest. All caches are paged.
    """

    fused = True
    prefill_chunk = 2048  # cuBLAS needs many rows to be fast, and attention stores no scores in memory

    def __init__(self, *parts, **options):
        super().__init__(*parts, **options)
        self.kernels = Kernels(self)
        self.inverse_frequencies = self.rotations[self.config.rope][0]  # [d/2]
        self._kept_pool = None  # the pool of the last sequence_cache

    def connect(self):
        self.comm.reserve(self.kernels.compiler, self.config.hidden_size)

    def new_cache(self, capacity=64):
        """Return an empty cache for one sequence of up to `capacity` positions."""
        blocks = -(-capacity // BLOCK_SIZE)
        return PagedCache(self.new_pool(blocks, BLOCK_SIZE), list(range(blocks)))

    @contextmanager
    def sequence_cache(self, capacity):
        """Yield a cache like Model.sequence_cache; keep its pool and captured graph for the next sequence.

        A capture takes about as long as twenty tokens. All ranks enter and leave this context together, so
        either all of them capture a graph or none does.
        """
        pool, self._kept_pool = self._kept_pool, None  # a second sequence at the same time gets its own pool
        blocks = -(-capacity // BLOCK_SIZE)
        if pool is not None and pool.blocks < blocks:
            pool.graphs.clear()  # graphs refer to the pool, which must be freed before a new one is allocated
            pool = None
        if pool is None:
            pool = self.new_pool(-(-blocks // KEPT_BLOCKS) * KEPT_BLOCKS)
        try:
            yield PagedCache(pool, list(range(blocks)))
        finally:
            self._kept_pool = pool

    def new_pool(self, blocks, block_size=BLOCK_SIZE):
        return Pool(*self._cache_shape(), blocks, block_size)

    def forward_batch(self, parts, logits_at=slice(None), record=unrecorded):
        """Run a pass over some sequences like Model.forward_batch; `record` gets the steps of this path."""
        one_each = all(len(ids) == 1 for ids, _ in parts)
        if one_each and len(parts) <= MAX_TOKENS and logits_at is not None:
            logits = self._decode(parts, record)[logits_at]
        else:
            logits = self._prefill(parts, logits_at, record)
        for ids, cache in parts:
            cache.advance(len(ids))
        return logits

    def decode_ahead(self, cache, token, params, draws):
        """Yield the tokens that follow `token`, running the GPU one token ahead of the host.

        Parameters
        ----------
        cache : PagedCache
            The sequence's cache, with room for all these tokens.
        token : int
        params : SamplingParams
        draws : float64 [n]
            Uniform random numbers in [0, 1), one for each token to generate.
        """
        graph, ahead = self.decode_graph(cache.pool, 1), TokensAhead(self.device)
        graph.fill([token], [cache.length], [cache.block_table])
        graph.choose(params)
        for count, draw in enumerate(draws):
            if params.temperature > 0:
                graph.draw.fill(draw)
            graph.launch()
            cache.advance(1)
            ahead.copy(graph.token)
            if count > 0:
                yield self._token(ahead)
        if len(draws):
            yield self._token(ahead)

    def _token(self, ahead):
        token = ahead.read()
        self.comm.check()
        return token

    def decode_graph(self, pool, sequences):
        """Return a pool's DecodeGraph for `sequences`, rounded up to a power of two to save captures."""
        batch = 1
        while batch < sequences:
            batch *= 2
        if batch not in pool.graphs:
            context = min(self.config.max_position_embeddings, pool.blocks * pool.block_size)
            pool.graphs[batch] = DecodeGraph(self, pool, batch, -(-context // pool.block_size))
        return pool.graphs[batch]

    def _decode(self, parts, record):
        """Return the logits [n, V] of one token of each of n sequences; the next pass overwrites them."""
        tokens, caches = [int(ids[0]) for ids, _ in parts], [cache for _, cache in parts]
        graph = self.decode_graph(caches[0].pool, len(parts))
        graph.fill(tokens, [cache.length for cache in caches], [cache.block_table for cache in caches])
        if record is unrecorded:
            graph.launch()
        else:
            graph.run(record)
        return graph.logits[: len(parts)]

    def _prefill(self, parts, logits_at, record):
        """Return the logits [n, V] of the rows `logits_at`, or None if that is None."""
        xp, w, kernels, c = self.device.xp, self.weights, self.kernels, self.config
        prompt = Prompt(self, parts)
        s = record()
        s.tokens, s.positions = prompt.token_ids, prompt.positions  # [T] each
        partial = ops.embed_partial(xp, prompt.token_ids, w.embed, self.vocab_start)  # [T, D]
        s.embed_partial = partial
        s.embed = x = self._sum(partial)  # [T, D]
        h = self.device.cupy.empty(x.shape, x.dtype)  # [T, D]
        addend = bias = None
        for i, layer in enumerate(w.layers):
            kernels.rms_norm(x, layer.attn_norm, h, c.rms_norm_eps, addend, bias)
            if i > 0:
                record("mlp", i - 1).residual = x
            record("attn", i).norm = h
            context = self._prefill_attention(i, layer, h, prompt, record)  # [T, H_r d]
            addend, bias = self._partial("attn", i, context, layer.w_o, layer.b_o, record)
            kernels.rms_norm(x, layer.mlp_norm, h, c.rms_norm_eps, addend, bias)
            record("attn", i).residual = x
            record("mlp", i).norm = h
            gate_up = self._columns(h, layer.w_gate_up, layer.b_gate_up)  # [T, 2 F_r]
            columns = layer.w_down.shape[0]  # F_r
            s = record("mlp", i)
            s.gate, s.up = gate_up[:, :columns], gate_up[:, columns:]  # [T, F_r] each
            act = self.device.cupy.empty((len(x), padded(columns)), x.dtype)  # [T, F_r or more]
            kernels.swiglu(gate_up, act)
            s.act = act[:, :columns]  # [T, F_r]
            addend, bias = self._partial("mlp", i, act[:, :columns], layer.w_down, layer.b_down, record)
        kernels.rms_norm(x, w.final_norm, h, c.rms_norm_eps, addend, bias)
        record("mlp", len(w.layers) - 1).residual = x
        if logits_at is None:
            return None
        h = h[logits_at]  # [n, D]
        record().final_norm = h
        logits_r = ops.logits_partial(xp, h, w.lm_head)  # [n, V_r]
        record().logits_partial = logits_r
        logits = self.comm.all_gather(logits_r, self.vocab_widths)  # [n, V]
        record().logits = logits
        return logits

    def _columns(self, h, w, bias):
        """Compute ops.column_parallel; without a bias, cuBLAS rounds the sums itself, which saves memory."""
        if bias is None:
            return self.device.xp.matmul(h, w)  # [T, n_r]
        return ops.column_parallel(self.device.xp, h, w, bias)  # [T, n_r]

    def _prefill_attention(self, i, layer, h, prompt, record):
        """Return the context [T, H_r d] of this rank's heads for h [T, D]; write k and v to the caches."""
        xp, width = self.device.xp, self.heads * self.config.head_dim
        qkv = self._columns(h, layer.w_qkv, layer.b_qkv)  # [T, (H_r + 2 K_r) d]
        qk, v = ops.split_heads(xp, qkv, self.heads, self.kv_heads)  # [H_r + K_r, T, d], [K_r, T, d]
        s = record("attn", i)
        s.q, s.k, s.v = qk[: self.heads], qk[self.heads :], v  # [H_r, T, d], [K_r, T, d], [K_r, T, d]
        keys, values = (stored.values for stored in prompt.pool.storage[i])  # [K_r, slots, d] each
        self.kernels.cache_write(qkv, prompt.cos, prompt.sin, prompt.slots, keys, values)
        context = self.device.cupy.empty((len(h), width), h.dtype)  # [T, H_r d]
        for sequence in prompt.sequences:
            at = sequence.tokens
            prompt.attention(qkv[at, :width], keys, values, sequence.table, sequence.past, context[at])
        if record is not unrecorded:
            self._record_attention(i, qk, prompt, record)
            record("attn", i).context = context
        return context

    def _record_attention(self, i, qk, prompt, record):
        """Record the queries and keys after RoPE and the inputs of attention of each sequence."""
        window = self.config.windows[0]
        for index, sequence in enumerate(prompt.sequences):
            first = 0 if window is None else max(0, sequence.past - window + 1)
            slots = sequence.slots[first:]  # [S]
            keys, values = (stored.gather(slots) for stored in prompt.pool.storage[i])  # [K_r, S, d] each
            new = len(keys[0]) - (sequence.tokens.stop - sequence.tokens.start)
            s = record("attn", i, index)
            s.q_rope, s.k_rope = qk[: self.heads, sequence.tokens], keys[:, new:]  # [H_r, n, d], [K_r, n, d]
            s.k_cache, s.v_cache = keys, values

    def _partial(self, block, i, y, w, bias, record):
        """Return what the next rms_norm adds to the residual stream: (sum over all ranks [T, D], bias)."""
        partial = self.device.xp.matmul(y, w)  # [T, D]: like ops.row_parallel, rounded by cuBLAS
        record(block, i).out_partial = partial
        out = self._sum(partial)  # [T, D]
        if bias is None:
            record(block, i).out = out
        return out, bias

    def _sum(self, partial):
        return partial if self.comm.size == 1 else self.comm.all_reduce(partial)


class TokensAhead:
    """Buffers for tokens on their way to the host: two of pinned memory, used alternately."""

    def __init__(self, gpu):
        import cupyx

        self._gpu, self._copied, self._read = gpu, 0, 0
        self._buffers = [cupyx.empty_pinned(1, np.int32) for _ in range(2)]
        self._events = [gpu.cupy.cuda.Event(disable_timing=True) for _ in range(2)]

    def copy(self, token):
        """Queue a copy of a token, int32 [1], to the host, after all work already on the stream."""
        runtime, turn = self._gpu.cupy.cuda.runtime, self._copied % 2
        buffer, kind = self._buffers[turn], runtime.memcpyDeviceToHost
        runtime.memcpyAsync(buffer.ctypes.data, token.data.ptr, 4, kind, self._gpu.stream.ptr)
        self._events[turn].record(self._gpu.stream)
        self._copied += 1

    def read(self):
        """Wait for the oldest token that has not been read, and return it."""
        turn = self._read % 2
        self._events[turn].synchronize()
        self._read += 1
        return int(self._buffers[turn][0])


class Prompt:
    """The inputs that all layers of a prefill share: tokens, RoPE angles and cache slots."""

    def __init__(self, model, parts):
        xp, self.pool = model.device.xp, parts[0][1].pool
        self.token_ids = joined(xp, [xp.asarray(ids) for ids, _ in parts])  # [T]
        self.sequences, start = [], 0
        for ids, cache in parts:
            self.sequences.append(PromptSequence(xp, slice(start, start + len(ids)), cache))
            start += len(ids)
        self.positions = joined(xp, [xp.arange(s.past, len(s.slots)) for s in self.sequences])  # [T]
        self.slots = joined(xp, [s.slots[s.past :] for s in self.sequences]).astype(np.int32)  # [T]
        cos, sin = ops.rope_cos_sin(xp, self.positions, model.inverse_frequencies)  # [T, d] each
        half = cos.shape[1] // 2
        contiguous = model.device.cupy.ascontiguousarray
        self.cos, self.sin = contiguous(cos[:, half:]), contiguous(sin[:, half:])  # [T, d/2] each
        self.attention = model.kernels.attention_prefill(self.pool.block_size)


class PromptSequence:
    """One sequence of a prefill: its slice of the T tokens, and the pool's slots for its positions."""

    def __init__(self, xp, tokens, cache):
        self.tokens, self.past = tokens, cache.length
        self.slots = cache.slots(0, self.past + tokens.stop - tokens.start)  # [past + n]
        self.table = xp.asarray(cache.block_table, dtype=np.int32)  # [blocks]
