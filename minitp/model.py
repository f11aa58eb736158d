"""The sharded transformer: one rank's share, composed from `ops` and `comm`.

    token ids [T]
      -> embed: this rank's vocabulary rows                                        all-reduce
      -> per layer  x + attention: norm, q k v of this rank's heads, RoPE, cache,
                        scores, softmax, context, output projection                all-reduce
                    x + mlp: norm, gate and up columns, SwiGLU, down projection    all-reduce
      -> norm -> logits of this rank's vocabulary rows                             all-gather

Between two collectives (the right-hand column) every rank works alone; `x`, the residual stream, is the same
bits on all ranks. The arrays of a block have names, those in `trace.names`, and are kept in a place `s` that
`record(block, layer)` gives: `s.q = ..` is an ordinary assignment to a plain namespace. Only if another
`record` is passed does its place also hand the array on (`trace.record.Recorder`).
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from minitp import moe, ops
from minitp.kv_cache import KVCache
from minitp.paged_cache import BlockPool
from minitp.rope import rope_inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minitp.paged_cache import PagedCache

    Array = Any  # numpy.ndarray, or cupy.ndarray on a GPU


def unrecorded(block=None, layer=None):
    """The `record` of a run whose steps nobody wants to see: a place for the arrays of a block."""
    return SimpleNamespace()


class Model:
    """One rank of a tensor-parallel transformer.

    Parameters
    ----------
    config : Config
    plan : Plan
    weights : Weights
        This rank's, from `loading.weights.Loader`.
    comm : Comm
    device : Device
    kv_dtype : str
        How its caches keep keys and values: auto (the compute dtype), float16 or int8.
    """

    fused = False  # True where several steps run as one kernel, so that the inner ones are not seen
    prefill_chunk = 512  # prompt tokens a pass, at most

    def __init__(self, config, plan, weights, comm, device, kv_dtype="auto"):
        self.config = config
        self.plan = plan
        self.weights = weights
        self.comm = comm
        self.device = device
        self.kv_dtype = kv_dtype
        start, stop = plan.head_ranges[comm.shard_rank]
        kv_start, kv_stop = plan.kv_head_ranges[comm.shard_rank]
        self.heads, self.kv_heads = stop - start, kv_stop - kv_start  # H_r, K_r
        self.query_groups = plan.query_groups(comm.shard_rank)
        self.vocab_start = plan.vocab_ranges[comm.shard_rank][0]
        self.vocab_widths = [stop - start for start, stop in plan.vocab_ranges]
        # Rounded to the dtype as Hugging Face's Gemma does; Granite's published ones lose nothing by it.
        self.embedding_multiplier = float(device.dtype.type(config.embedding_multiplier))
        # What else the families differ in.
        self.norm = ops.rms_norm_plus_one if config.norm_plus_one else ops.rms_norm
        self.activate = ops.swiglu if config.hidden_act == "silu" else ops.geglu
        self.score_options = dict(scale=config.attention_multiplier, softcap=config.attn_logit_softcapping)
        self.logit_options = dict(softcap=config.final_logit_softcapping, scaling=config.logits_scaling)
        frequencies = rope_inverse_frequencies(config.rope, config.head_dim)
        self.inverse_frequencies = device.xp.asarray(frequencies, dtype=device.xp.float32)  # [d/2]

    def connect(self):
        """What the ranks prepare together; all call it, when the model is loaded on all of them."""

    def new_cache(self, capacity=64):
        """An empty KV cache for one sequence, of `capacity` positions and more if need be."""
        return KVCache(*self._cache_shape(), capacity=capacity, kv_dtype=self.kv_dtype)

    @contextmanager
    def sequence_cache(self, capacity):
        """Lend an empty cache for one sequence to a `with` block; the next sequence may get its memory."""
        yield self.new_cache(capacity)

    def new_pool(self, blocks, block_size=16):
        """Memory for the paged caches of many sequences, `blocks` times `block_size` positions in all."""
        return BlockPool(*self._cache_shape(), blocks, block_size, kv_dtype=self.kv_dtype)

    def _cache_shape(self):
        device, c = self.device, self.config
        return device.xp, device.dtype, c.num_hidden_layers, self.kv_heads, c.head_dim

    def forward(
        self,
        token_ids: Sequence[int],
        cache: KVCache | PagedCache,
        logits_at: slice | Array | None = slice(None),
        record: Callable = unrecorded,
    ) -> Array | None:
        """Run the next tokens of one sequence, int [T], and return their logits, float32 [T, V].

        This is `forward_batch` for a single sequence; its parameters are explained there.
        """
        return self.forward_batch([(token_ids, cache)], logits_at, record)

    def forward_batch(
        self,
        parts: list[tuple[Sequence[int], KVCache | PagedCache]],
        logits_at: slice | Array | None = slice(None),
        record: Callable = unrecorded,
    ) -> Array | None:
        """Run the next tokens of some sequences; prefill and decode are this same function.

        The tokens of all sequences are concatenated, so that every projection is one product of T rows.
        Only attention goes sequence by sequence, for each has keys of its own.

        Parameters
        ----------
        parts : list of (token_ids, cache)
            For each sequence its next tokens, int [n], and its KVCache. They follow the `cache.length` tokens
            of before, and are added to the cache. T is the sum of all n.
        logits_at : slice or int array or None
            The positions among these T that get logits: slice(None) for all, slice(-1, None) to generate,
            None to only fill the cache.
        record : callable
            record(block, layer) -> an object, to which this rank's part of each step is assigned; see
            `trace.record.Recorder`. Of several sequences the steps of `_attend` come one after another.

        Returns
        -------
        float32 [n, V], the same on every rank, or None
        """
        xp, w = self.device.xp, self.weights
        token_ids = joined(xp, [xp.asarray(ids) for ids, _ in parts])  # [T]
        ctx = ForwardContext(xp, parts, self.inverse_frequencies, self.config, record)

        s = record()
        partial = ops.embed_partial(xp, token_ids, w.embed, self.vocab_start)  # [T, D]
        s.embed_partial = ops.scaled(xp, partial, self.embedding_multiplier)  # [T, D]
        s.embed = x = self.comm.all_reduce(s.embed_partial)  # [T, D]
        for i, layer in enumerate(w.layers):
            x = self._attention(i, layer, x, ctx)  # [T, D]
            x = self._mlp(i, layer, x, ctx)  # [T, D]
        for ids, cache in parts:
            cache.advance(len(ids))
        if logits_at is None:
            return None
        s.final_norm = self._norm(x[logits_at], w.final_norm)  # [n, D]
        s.logits_partial = ops.logits_partial(xp, s.final_norm, w.lm_head, **self.logit_options)  # [n, V_r]
        s.logits = self.comm.all_gather(s.logits_partial, self.vocab_widths)  # [n, V]
        return s.logits

    def _attention(self, i, layer, x, ctx):
        """x + attention of norm(x): [T, D] -> [T, D]. This rank computes its own heads."""
        xp, heads = self.device.xp, self.heads
        s = ctx.record("attn", i)
        s.norm = self._norm(x, layer.attn_norm)  # [T, D]
        qkv = ops.column_parallel(xp, s.norm, layer.w_qkv, layer.b_qkv)  # [T, (H_r + 2 K_r) d]
        qk, v = ops.split_heads(xp, qkv, heads, self.kv_heads)  # [H_r + K_r, T, d], [K_r, T, d]
        s.q, s.k, s.v = qk[:heads], qk[heads:], v  # [H_r, T, d], [K_r, T, d], [K_r, T, d]
        if layer.q_norm is not None:
            s.q_norm = self._norm(s.q, layer.q_norm)  # [H_r, T, d]
            s.k_norm = self._norm(s.k, layer.k_norm)  # [K_r, T, d]
            qk = xp.concatenate((s.q_norm, s.k_norm))  # [H_r + K_r, T, d]
        qk = ops.apply_rope(xp, qk, *ctx.angles(i))  # [H_r + K_r, T, d]
        s.q_rope, s.k_rope = qk[:heads], qk[heads:]  # [H_r, T, d], [K_r, T, d]
        sequences = ctx.sequences[self.config.windows[i]]
        contexts = [self._attend(i, s.q_rope, s.k_rope, s.v, one, ctx.record) for one in sequences]
        context = joined(xp, contexts)  # [T, H_r d]
        s.out_partial = ops.row_parallel(xp, context, layer.w_o)  # [T, D]
        return self._all_reduce_and_add(x, s, layer.b_o, layer.attn_post_norm)  # [T, D]

    def _attend(self, i, q, k, v, sequence, record):
        """Attention of one sequence's n tokens: of q [H_r, T, d], k, v [K_r, T, d] -> context [n, H_r d]."""
        xp, at, s = self.device.xp, sequence.tokens, record("attn", i)
        cached = sequence.cache.append(i, k[:, at], v[:, at], sequence.first_key)
        s.k_cache, s.v_cache = cached  # [K_r, S, d] each
        options = dict(mask=sequence.mask, **self.score_options)
        s.scores = ops.attention_scores(xp, q[:, at], s.k_cache, self.query_groups, **options)  # [H_r, n, S]
        s.probs = ops.softmax(xp, s.scores)  # [H_r, n, S]
        s.context = ops.attention_context(xp, s.probs, s.v_cache, self.query_groups)  # [n, H_r d]
        return s.context

    def _mlp(self, i, layer, x, ctx):
        """x + mlp of norm(x): [T, D] -> [T, D]. This rank computes its own FFN columns."""
        s = ctx.record("mlp", i)
        s.norm = self._norm(x, layer.mlp_norm)  # [T, D]
        s.out_partial = (self._experts if layer.experts else self._dense)(layer, s)  # [T, D]
        return self._all_reduce_and_add(x, s, layer.b_down, layer.mlp_post_norm)  # [T, D]

    def _dense(self, layer, s):
        """This rank's term of the block's output, [T, D]: gate and up, their product, down."""
        xp = self.device.xp
        gate_up = ops.column_parallel(xp, s.norm, layer.w_gate_up, layer.b_gate_up)  # [T, 2 F_r]
        half = gate_up.shape[1] // 2  # F_r
        s.gate, s.up = gate_up[:, :half], gate_up[:, half:]  # [T, F_r] each
        s.act = self.activate(xp, gate_up)  # [T, F_r]
        return ops.row_parallel(xp, s.act, layer.w_down)  # [T, D]

    def _experts(self, layer, s):
        """The same of a mixture: all ranks route alike, and hold their FFN columns of every expert."""
        xp = self.device.xp
        s.router = ops.column_parallel(xp, s.norm, layer.w_router)  # [T, E]
        chosen, shares = moe.route(xp, s.router, self.config.num_experts_per_tok)  # [T, X], [T, X]
        s.experts = moe.experts_act(xp, s.norm, chosen, [e.w_gate_up for e in layer.experts])  # [T, X, F_r]
        return moe.experts_partial(xp, s.experts, chosen, shares, [e.w_down for e in layer.experts])  # [T, D]

    def _all_reduce_and_add(self, x, s, bias, post_norm):
        """x [T, D] + the sum of all ranks' terms: here the ranks of a block meet, and nowhere else in it.

        The bias comes after the sum, because in each rank's term it would count once a rank. A norm of the
        sum, which some families have, is not the sum of norms; so it comes after, too, alike on all ranks.
        """
        out = self.comm.all_reduce(s.out_partial)  # [T, D]
        s.out = out if bias is None else out + bias  # [T, D]
        added = s.out  # [T, D]
        if post_norm is not None:
            s.post_norm = added = self._norm(s.out, post_norm)  # [T, D]
        s.residual = x + ops.scaled(self.device.xp, added, self.config.residual_multiplier)  # [T, D]
        return s.residual

    def _norm(self, x, weight):
        """[T, D] and [D] -> [T, D]; or of each head, [n, T, d] and [d] -> [n, T, d]."""
        return self.norm(self.device.xp, x, weight, self.config.rms_norm_eps)


class ForwardContext:
    """What all layers of one forward pass share: the angles of its positions and what each may see.

    `sequences` has a list of SequenceSlice for each window that some layer has; most models have only one.
    """

    def __init__(self, xp, parts, inverse_frequencies, config, record):
        self.record = record
        self.sequences, start = {window: [] for window in config.windows}, 0
        for ids, cache in parts:
            for window, sequences in self.sequences.items():
                sequences.append(SequenceSlice(xp, slice(start, start + len(ids)), cache, window))
            start += len(ids)
        positions = joined(xp, [s.positions for s in self.sequences[config.windows[0]]])  # [T]
        factor = config.rope.attention_factor
        self.cos, self.sin = ops.rope_cos_sin(xp, positions, inverse_frequencies, factor)  # [T, d] each
        self.layers_without_rope = config.layers_without_rope
        if self.layers_without_rope:
            still = xp.zeros(self.cos.shape, dtype=self.cos.dtype)  # [T, d]
            self.no_angles = still + 1, still  # [T, d] each

    def angles(self, layer):
        """Cosines and sines of a layer's RoPE, [T, d] each; in one that has none nothing is turned."""
        return self.no_angles if layer in self.layers_without_rope else (self.cos, self.sin)  # [T, d] each


class SequenceSlice:
    """One sequence's part of a forward pass: its rows among the T tokens, its cache and what they may see."""

    def __init__(self, xp, tokens, cache, window):
        self.tokens, self.cache = tokens, cache
        past, total = cache.length, cache.length + tokens.stop - tokens.start
        self.positions = xp.arange(past, total)  # [n]
        # The oldest key that any query of this pass sees; with a window the scores stay that small.
        self.first_key = 0 if window is None else max(0, past - window + 1)
        # A single query sees all keys from there on, so decoding needs no mask.
        self.mask = None
        if total - past > 1:
            self.mask = ops.causal_mask(xp, self.positions, self.first_key, total, window)  # [n, S]


def joined(xp, arrays):
    """Concatenate arrays [n, ..]; a single one is returned as it is."""
    return arrays[0] if len(arrays) == 1 else xp.concatenate(arrays)
