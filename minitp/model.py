"""The sharded transformer: one rank's forward pass, composed from `ops` and `comm`.

    token ids [T]
      -> embed: this rank's vocabulary rows                                        all-reduce
      -> per layer  x + attention: norm, q k v of this rank's heads, RoPE, cache,
                        scores, softmax, context, output projection                all-reduce
                    x + mlp: norm, gate and up columns, SwiGLU, down projection    all-reduce
      -> norm -> logits of this rank's vocabulary rows                             all-gather

Between two collectives (the right-hand column) every rank works alone. The residual stream `x` has the same
bits on all ranks.

Each block assigns its named arrays, the steps of `trace.names`, to an object `s`: after
`s = record("attn", 3)`, the line `s.q = q` names the queries of layer 3. By default `s` is a plain namespace,
and this is an ordinary assignment. With a `trace.record.Recorder` it also records q as `layers.3.attn.q`.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from minitp import moe, ops
from minitp.kv_cache import KVCache
from minitp.paged_cache import BlockPool
from minitp.rope import rotations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from minitp.paged_cache import PagedCache

    Array = Any  # numpy.ndarray, or cupy.ndarray on a GPU


def unrecorded(block=None, layer=None, sequence=None):
    """Return a plain namespace for a block's arrays: the `record` of a run that records nothing."""
    return SimpleNamespace()


class Model:
    """One rank of a tensor-parallel transformer.

    Parameters
    ----------
    config : Config
    plan : Plan
    weights : Weights
        This rank's weights, from `loading.weights.Loader`.
    comm : Comm
    device : Device
    kv_dtype : str
        The dtype in which caches store keys and values: auto (the compute dtype), float16 or int8.
    """

    fused = False  # True in a subclass that runs several steps as one kernel and cannot record all of them
    prefill_chunk = 512  # maximum number of prompt tokens in a pass

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
        # Rounded to the dtype as in Hugging Face's Gemma; that changes nothing in published Granite models.
        self.embedding_multiplier = float(device.dtype.type(config.embedding_multiplier))
        # Operations and options that differ between families.
        self.norm = ops.rms_norm_plus_one if config.norm_plus_one else ops.rms_norm
        self.activate = ops.swiglu if config.hidden_act == "silu" else ops.geglu
        self.routing = config.num_experts_per_tok, config.norm_topk_prob
        self.score_options = dict(scale=config.attention_multiplier, softcap=config.attn_logit_softcapping)
        self.logit_options = dict(softcap=config.final_logit_softcapping, scaling=config.logits_scaling)
        # The inverse frequencies, float32 [R/2], and the factor of each RoPE.
        self.rotations = {
            rope: (device.xp.asarray(frequencies, dtype=device.xp.float32), factor)
            for rope, (frequencies, factor) in rotations(config).items()
        }

    def connect(self):
        """Prepare the collectives of forward passes; all ranks call this after loading the model."""

    def new_cache(self, capacity=64):
        """Return an empty KV cache for one sequence of `capacity` positions; it grows if needed."""
        return KVCache(*self._cache_shape(), capacity=capacity, kv_dtype=self.kv_dtype)

    @contextmanager
    def sequence_cache(self, capacity):
        """Yield an empty cache for one sequence to a `with` block; the next sequence may reuse its memory."""
        yield self.new_cache(capacity)

    def new_pool(self, blocks, block_size=16):
        """Return a BlockPool for the caches of many sequences: `blocks` blocks of `block_size` positions."""
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

        See `forward_batch`, which takes several sequences, for the parameters.
        """
        return self.forward_batch([(token_ids, cache)], logits_at, record)

    def forward_batch(
        self,
        parts: list[tuple[Sequence[int], KVCache | PagedCache]],
        logits_at: slice | Array | None = slice(None),
        record: Callable = unrecorded,
    ) -> Array | None:
        """Run the next tokens of one or more sequences; prefill and decode both call this function.

        The tokens of all sequences are concatenated, so that every projection is one product of T rows.
        Only attention runs sequence by sequence, because each sequence has its own keys and values.

        Parameters
        ----------
        parts : list of (token_ids, cache)
            The next tokens of each sequence, int [n], and its KVCache. The tokens come after the
            `cache.length` positions of the cache, and are added to it. T is the sum of all n.
        logits_at : slice or int array or None
            The rows, among the T tokens, that get logits: slice(None) for all of them, slice(-1, None) for
            the last one, None to only fill the cache.
        record : callable
            record(block, layer, sequence) returns the object to which a block assigns this rank's part of
            each step; see `trace.record.Recorder`. `sequence` is the index in `parts` of the only sequence
            that the steps belong to; without it, they belong to all of them.

        Returns
        -------
        float32 [n, V] for the n rows of `logits_at`, the same on every rank; or None
        """
        xp, w = self.device.xp, self.weights
        token_ids = joined(xp, [xp.asarray(ids) for ids, _ in parts])  # [T]
        ctx = ForwardContext(xp, parts, self.rotations, self.config, record)

        s = record()
        s.tokens, s.positions = token_ids, ctx.positions  # [T] each
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
        """Return x + attention(norm(x)), [T, D] -> [T, D]; this rank computes its own heads."""
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
        qk = ops.apply_rope(xp, qk, *ctx.angles[self.config.ropes[i]])  # [H_r + K_r, T, d]
        s.q_rope, s.k_rope = qk[:heads], qk[heads:]  # [H_r, T, d], [K_r, T, d]
        sequences = ctx.sequences[self.config.windows[i]]
        contexts = [self._attend(i, s.q_rope, s.k_rope, s.v, sequence, ctx.record) for sequence in sequences]
        context = joined(xp, contexts)  # [T, H_r d]
        s.out_partial = ops.row_parallel(xp, context, layer.w_o)  # [T, D]
        return self._all_reduce_and_add(x, s, layer.b_o, layer.attn_post_norm)  # [T, D]

    def _attend(self, i, q, k, v, sequence, record):
        """Compute attention for one sequence's n tokens: q [H_r, T, d], k, v [K_r, T, d] -> [n, H_r d]."""
        xp, s = self.device.xp, record("attn", i, sequence.index)
        q, k, v = (x[:, sequence.tokens] for x in (q, k, v))  # [H_r, n, d], [K_r, n, d], [K_r, n, d]
        cached = sequence.cache.append(i, k, v, sequence.first_key)
        s.k_cache, s.v_cache = cached  # [K_r, S, d] each
        options = dict(mask=sequence.mask, **self.score_options)
        s.scores = ops.attention_scores(xp, q, s.k_cache, self.query_groups, **options)  # [H_r, n, S]
        s.probs = ops.softmax(xp, s.scores)  # [H_r, n, S]
        s.context = ops.attention_context(xp, s.probs, s.v_cache, self.query_groups)  # [n, H_r d]
        return s.context

    def _mlp(self, i, layer, x, ctx):
        """Return x + mlp(norm(x)), [T, D] -> [T, D]; this rank computes its own FFN columns."""
        s = ctx.record("mlp", i)
        s.norm = self._norm(x, layer.mlp_norm)  # [T, D]
        s.out_partial = (self._experts if layer.experts else self._dense)(layer, s)  # [T, D]
        return self._all_reduce_and_add(x, s, layer.b_down, layer.mlp_post_norm)  # [T, D]

    def _dense(self, layer, s):
        """Compute this rank's term of the dense block's output, [T, D]: gate and up, activation, down."""
        xp = self.device.xp
        gate_up = ops.column_parallel(xp, s.norm, layer.w_gate_up, layer.b_gate_up)  # [T, 2 F_r]
        half = gate_up.shape[1] // 2  # F_r
        s.gate, s.up = gate_up[:, :half], gate_up[:, half:]  # [T, F_r] each
        s.act = self.activate(xp, gate_up)  # [T, F_r]
        return ops.row_parallel(xp, s.act, layer.w_down)  # [T, D]

    def _experts(self, layer, s):
        """Compute this rank's term of a mixture of experts, [T, D]; all ranks choose the same experts."""
        xp = self.device.xp
        s.router = ops.column_parallel(xp, s.norm, layer.w_router)  # [T, E]
        chosen, weights = moe.route(xp, s.router, *self.routing)  # [T, X], [T, X]
        w_gate_up, w_down = zip(*((e.w_gate_up, e.w_down) for e in layer.experts), strict=True)
        s.experts = moe.experts_act(xp, s.norm, chosen, w_gate_up)  # [T, X, F_r]
        return moe.experts_partial(xp, s.experts, chosen, weights, w_down)  # [T, D]

    def _all_reduce_and_add(self, x, s, bias, post_norm):
        """Sum the terms of all ranks and add the sum to x [T, D]: the only communication of a block.

        The bias is added after the all-reduce, because it would be counted once per rank if it were part of
        each term. The norm that some families apply to the output also comes after it, because the norm of a
        sum is not the sum of the norms. Every rank computes both on the same bits.
        """
        out = self.comm.all_reduce(s.out_partial)  # [T, D]
        s.out = out if bias is None else out + bias  # [T, D]
        added = s.out  # [T, D]
        if post_norm is not None:
            s.post_norm = added = self._norm(s.out, post_norm)  # [T, D]
        s.residual = x + ops.scaled(self.device.xp, added, self.config.residual_multiplier)  # [T, D]
        return s.residual

    def _norm(self, x, weight):
        """Normalize x [T, D] with weight [D], or each head of x [n, T, d] with weight [d]."""
        return self.norm(self.device.xp, x, weight, self.config.rms_norm_eps)  # the shape of x


class ForwardContext:
    """The state that all layers of a forward pass share: RoPE angles, and each sequence's cache and mask.

    `sequences` maps each window that occurs in the model to a list of SequenceSlice, one per sequence, and
    `angles` each RoPE to its cosines and sines, [T, R] each; most models have one window and one RoPE.
    """

    def __init__(self, xp, parts, rotations, config, record):
        self.record = record
        self.sequences, start = {window: [] for window in config.windows}, 0
        for index, (ids, cache) in enumerate(parts):
            for window, sequences in self.sequences.items():
                sequences.append(SequenceSlice(xp, index, slice(start, start + len(ids)), cache, window))
            start += len(ids)
        self.positions = joined(xp, [s.positions for s in self.sequences[config.windows[0]]])  # [T]
        self.angles = {rope: ops.rope_cos_sin(xp, self.positions, *each) for rope, each in rotations.items()}


class SequenceSlice:
    """One sequence's part of a forward pass: its index, its rows among the T tokens, its cache and mask."""

    def __init__(self, xp, index, tokens, cache, window):
        self.index, self.tokens, self.cache = index, tokens, cache
        past, total = cache.length, cache.length + tokens.stop - tokens.start
        self.positions = xp.arange(past, total)  # [n]
        # The oldest key that a query of this pass sees; keys before it, outside the window, are not read.
        self.first_key = 0 if window is None else max(0, past - window + 1)
        # A single query sees all keys from first_key on, so decoding needs no mask.
        self.mask = None
        if total - past > 1:
            self.mask = ops.causal_mask(xp, self.positions, self.first_key, total, window)  # [n, S]


def joined(xp, arrays):
    """Concatenate arrays [n, ..] to [T, ..]; a single array is returned as it is."""
    return arrays[0] if len(arrays) == 1 else xp.concatenate(arrays)  # [T, ..]
