"""The sharded transformer: one rank's share, composed from `ops` and `comm`.

    token ids [T]
      -> embed: this rank's vocabulary rows                                        all-reduce
      -> per layer  x + attention: norm, q k v of this rank's heads, RoPE, cache,
                        scores, softmax, context, output projection                all-reduce
                    x + mlp: norm, gate and up columns, SwiGLU, down projection    all-reduce
      -> norm -> logits of this rank's vocabulary rows                             all-gather

Between two collectives (the right-hand column) every rank works alone; `x`, the residual stream, is the same
bits on all ranks. Whoever wants to see the steps passes a `record`, which gets them by the names of `steps`.
"""

from contextlib import contextmanager

from minitp import ops
from minitp.errors import InputError
from minitp.kv_cache import BlockPool, KVCache
from minitp.weights import Loader

SCORES = 1 << 24  # [H_r, T, S] of a prefill pass, at most: 64 MB, and as much again for what comes of them


class Unrecorded:
    """The `record` of a run whose steps nobody wants to see."""

    def __call__(self, block=None, layer=None, /, **arrays):
        pass


class Model:
    """One rank of a tensor-parallel transformer.

    Parameters
    ----------
    config : Config
    plan : Plan
    weights : Weights
        This rank's, from `weights.Loader`.
    comm : Comm
    device : Device
    kv_dtype : str
        How its caches keep keys and values: auto (the compute dtype), float16 or int8.
    """

    fused = False  # whether several steps may be one operation, whose inner ones nobody sees
    prefill_chunk = 512  # prompt tokens a pass, at most

    def __init__(self, config, plan, weights, comm, device, kv_dtype="auto"):
        self.config = config
        self.plan = plan
        self.weights = weights
        self.comm = comm
        self.device = device
        self.kv_dtype = kv_dtype
        start, stop = plan.head_ranges[comm.share]
        kv_start, kv_stop = plan.kv_head_ranges[comm.share]
        self.heads, self.kv_heads = stop - start, kv_stop - kv_start  # H_r, K_r
        self.query_groups = plan.query_groups(comm.share)
        self.vocab_start = plan.vocab_ranges[comm.share][0]
        self.vocab_widths = [stop - start for start, stop in plan.vocab_ranges]
        # Rounded to the dtype as Hugging Face's Gemma does; Granite's published ones lose nothing by it.
        self.embedding_multiplier = float(device.dtype.type(config.embedding_multiplier))
        frequencies = ops.rope_inverse_frequencies(config.rope, config.head_dim)
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

    def forward(self, token_ids, cache, logits_at=None, record=Unrecorded()):  # noqa: B008  it has no state
        """Run the next tokens of one sequence, [T] int: `forward_batch` of that one alone."""
        return self.forward_batch([(token_ids, cache)], logits_at, record)

    def forward_batch(self, parts, logits_at=None, record=Unrecorded()):  # noqa: B008
        """Run the next tokens of some sequences; prefill and decode are this same function.

        The tokens of all sequences lie behind one another, so that every projection is one product of T rows.
        Only attention goes sequence by sequence, for each has keys of its own.

        Parameters
        ----------
        parts : list of (token_ids, cache)
            For each sequence its next tokens, int [n], and its KVCache. They follow the `cache.length` tokens
            of before, and are added to the cache. T is the sum of all n.
        logits_at : slice or int array or None
            Which of these T positions get logits: slice(-1, None) to generate, slice(None) for perplexity,
            None to only fill the cache.
        record : callable
            Gets this rank's part of each step, as it happens; see `trace.Recorder`. Of several sequences the
            steps between RoPE and the output projection come one sequence after another.

        Returns
        -------
        float32 [n, V], the same on every rank, or None
        """
        xp, w = self.device.xp, self.weights
        token_ids = joined(xp, [xp.asarray(ids) for ids, _ in parts])  # [T]
        step = Step(xp, parts, self.inverse_frequencies, self.config, record)

        partial = ops.embed_partial(xp, token_ids, w.embed, self.vocab_start)  # [T, D]
        partial = ops.scaled(xp, partial, self.embedding_multiplier)  # [T, D]
        record(embed_partial=partial)
        x = self.comm.all_reduce(partial)  # [T, D]
        record(embed=x)
        for i, layer in enumerate(w.layers):
            x = x + self._attention(i, layer, x, step)  # [T, D]
            record("attn", i, residual=x)
            x = x + self._mlp(i, layer, x, record)  # [T, D]
            record("mlp", i, residual=x)
        for ids, cache in parts:
            cache.advance(len(ids))
        if logits_at is None:
            return None
        x = self._norm(x[logits_at], w.final_norm)  # [n, D]
        record(final_norm=x)
        options = self.config.final_logit_softcapping, self.config.logits_scaling
        logits_r = ops.logits_partial(xp, x, w.lm_head, *options)  # [n, V_r]
        record(logits_partial=logits_r)
        logits = self.comm.all_gather(logits_r, self.vocab_widths)  # [n, V]
        record(logits=logits)
        return logits

    def _norm(self, x, weight):
        """[T, D] and [D] -> [T, D]"""
        norm = ops.rms_norm_plus_one if self.config.norm_plus_one else ops.rms_norm
        return norm(self.device.xp, x, weight, self.config.rms_norm_eps)

    def _attention(self, i, layer, x, step):
        """[T, D] -> [T, D]; this rank computes its own heads, the all-reduce adds up their outputs."""
        xp, record = self.device.xp, step.record
        h = self._norm(x, layer.attn_norm)  # [T, D]
        record("attn", i, norm=h)
        qkv = ops.column_parallel(xp, h, layer.w_qkv, layer.b_qkv)  # [T, (H_r + 2 K_r) d]
        qk, v = ops.split_heads(xp, qkv, self.heads, self.kv_heads)  # [H_r + K_r, T, d], [K_r, T, d]
        record("attn", i, q=qk[: self.heads], k=qk[self.heads :], v=v)
        if self.config.qk_norm:
            q = self._norm(qk[: self.heads], layer.q_norm)  # [H_r, T, d]
            k = self._norm(qk[self.heads :], layer.k_norm)  # [K_r, T, d]
            record("attn", i, q_norm=q, k_norm=k)
            qk = xp.concatenate((q, k))  # [H_r + K_r, T, d]
        qk = ops.apply_rope(xp, qk, step.cos, step.sin)  # [H_r + K_r, T, d]
        record("attn", i, q_rope=qk[: self.heads], k_rope=qk[self.heads :])
        sequences = step.sequences[self.config.windows[i]]
        contexts = [self._attend(i, qk[:, s.rows], v[:, s.rows], s, record) for s in sequences]
        context = joined(xp, contexts)  # [T, H_r d]
        partial = ops.row_parallel(xp, context, layer.w_o)  # [T, D]
        record("attn", i, out_partial=partial)
        out = self.comm.all_reduce(partial)  # [T, D]
        out = out if layer.b_o is None else out + layer.b_o  # [T, D]
        record("attn", i, out=out)
        if layer.attn_post_norm is not None:
            out = self._norm(out, layer.attn_post_norm)  # [T, D]
            record("attn", i, post_norm=out)
        # Behind the sum, once, and behind the bias, which counts no more: `out` is the same in all families.
        return ops.scaled(xp, out, self.config.residual_multiplier)  # [T, D]

    def _attend(self, i, qk, v, sequence, record):
        """One sequence's n tokens: qk [H_r + K_r, n, d] and v [K_r, n, d] -> context [n, H_r d]."""
        xp = self.device.xp
        q, k = qk[: self.heads], qk[self.heads :]  # [H_r, n, d], [K_r, n, d]
        k, v = sequence.cache.append(i, k, v, sequence.first_key)  # [K_r, W, d] each: all, or the window
        record("attn", i, k_cache=k, v_cache=v)
        options = sequence.mask, self.config.attention_multiplier, self.config.attn_logit_softcapping
        scores = ops.attention_scores(xp, q, k, self.query_groups, *options)  # [H_r, n, W]
        record("attn", i, scores=scores)
        probs = ops.softmax(xp, scores)  # [H_r, n, W]
        record("attn", i, probs=probs)
        context = ops.attention_context(xp, probs, v, self.query_groups)  # [n, H_r d]
        record("attn", i, context=context)
        return context

    def _mlp(self, i, layer, x, record):
        """[T, D] -> [T, D]; this rank computes its own FFN columns, the all-reduce adds up their outputs."""
        xp = self.device.xp
        h = self._norm(x, layer.mlp_norm)  # [T, D]
        record("mlp", i, norm=h)
        if layer.experts:
            partial = self._experts(i, layer, h, record)  # [T, D]
        else:
            gate_up = ops.column_parallel(xp, h, layer.w_gate_up, layer.b_gate_up)  # [T, 2 F_r]
            half = gate_up.shape[1] // 2  # F_r
            record("mlp", i, gate=gate_up[:, :half], up=gate_up[:, half:])
            activate = ops.swiglu if self.config.hidden_act == "silu" else ops.geglu
            act = activate(xp, gate_up)  # [T, F_r]
            record("mlp", i, act=act)
            partial = ops.row_parallel(xp, act, layer.w_down)  # [T, D]
        record("mlp", i, out_partial=partial)
        out = self.comm.all_reduce(partial)  # [T, D]
        out = out if layer.b_down is None else out + layer.b_down  # [T, D]
        record("mlp", i, out=out)
        if layer.mlp_post_norm is not None:
            out = self._norm(out, layer.mlp_post_norm)  # [T, D]
            record("mlp", i, post_norm=out)
        return ops.scaled(xp, out, self.config.residual_multiplier)  # [T, D]

    def _experts(self, i, layer, h, record):
        """[T, D] -> [T, D], to be summed; all route alike and hold their FFN columns of every expert."""
        xp = self.device.xp
        router = ops.column_parallel(xp, h, layer.w_router)  # [T, E]
        record("mlp", i, router=router)
        chosen, shares = ops.route(xp, router, self.config.num_experts_per_tok)  # [T, X], [T, X]
        acts = ops.experts_act(xp, h, chosen, [e.w_gate_up for e in layer.experts])  # [T, X, F_r]
        record("mlp", i, experts=acts)
        return ops.experts_partial(xp, acts, chosen, shares, [e.w_down for e in layer.experts])  # [T, D]


class Step:
    """What all layers of one forward pass share: the angles of its positions and what each may see.

    `sequences` has a list of Sequence for each window that some layer has; most models have only one.
    """

    def __init__(self, xp, parts, inverse_frequencies, config, record):
        self.record = record
        self.sequences, start = {window: [] for window in config.windows}, 0
        for ids, cache in parts:
            for window, sequences in self.sequences.items():
                sequences.append(Sequence(xp, slice(start, start + len(ids)), cache, window))
            start += len(ids)
        positions = joined(xp, [s.positions for s in self.sequences[config.windows[0]]])  # [T]
        factor = config.rope.attention_factor
        self.cos, self.sin = ops.rope_cos_sin(xp, positions, inverse_frequencies, factor)  # [T, d] each


class Sequence:
    """One sequence's part of a forward pass: its rows among the T tokens, its cache and what they may see."""

    def __init__(self, xp, rows, cache, window):
        self.rows, self.cache = rows, cache
        past, total = cache.length, cache.length + rows.stop - rows.start
        self.positions = xp.arange(past, total)  # [n]
        # The oldest key that any query of this step sees; with a window the scores stay that small.
        self.first_key = 0 if window is None else max(0, past - window + 1)
        # A single query sees all keys from there on, so decoding needs no mask.
        self.mask = None
        if total - past > 1:
            self.mask = ops.causal_mask(xp, self.positions, self.first_key, total, window)  # [n, W]


def host_logits(model, logits):
    """Logits as a NumPy array, which also waits for a GPU; RankError if a collective has failed on it."""
    host = model.device.to_host(logits)
    model.comm.check()
    return host


def joined(xp, arrays):
    """The arrays [n, ..] behind one another; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else xp.concatenate(arrays)


def load_model(source, comm, device, progress=lambda nbytes: None, kv_dtype="auto", path="auto"):
    """This rank's Model of a ModelSource.

    Parameters
    ----------
    source : ModelSource
    comm : Comm
    device : Device
    progress : callable
        Gets the bytes of each array loaded.
    kv_dtype : str
        As --kv-dtype.
    path : str
        explicit: through `ops`; fused: through the kernels of `cuda`, on a GPU; auto: fused where it can be.

    Raises
    ------
    InputError
        if the path cannot be had.
    """
    given = source.plan, comm.share, source.tensors, device, progress
    if not device.is_gpu:
        if path == "fused":
            raise InputError("--path fused is made of kernels for GPUs; leave it out, or give --device cuda")
        return Model(source.config, source.plan, Loader(*given).load(), comm, device, kv_dtype)
    from minitp.cuda.fused import FusedModel, unfit
    from minitp.cuda.loader import GpuLoader

    reason = unfit(source.config, source.plan, device, kv_dtype)
    if path == "fused" and reason is not None:
        raise InputError(f"--path fused: {reason}; use --path explicit")
    kind = Model if path == "explicit" or reason is not None else FusedModel
    return kind(source.config, source.plan, GpuLoader(*given).load(), comm, device, kv_dtype)


def prefill(model, cache, token_ids, chunk=None):
    """Run a prompt through in passes of at most `chunk` tokens; return the last logits [V], on the host."""
    for start, stop in chunks(model, len(token_ids), chunk):
        last = stop == len(token_ids)
        logits = model.forward(token_ids[start:stop], cache, logits_at=slice(-1, None) if last else None)
    return host_logits(model, logits)[0]


def chunks(model, tokens, chunk=None):
    """(start, stop) of the passes in which a prompt goes through the model."""
    start = 0
    while start < tokens:
        stop = min(tokens, start + largest_pass(model, start, chunk))
        yield start, stop
        start = stop


def largest_pass(model, past, chunk=None):
    """How many tokens of a sequence a pass may take behind `past` of them: few enough SCORES, if it has any.

    `chunk` is the most of them; None: the model's own.
    """
    chunk = model.prefill_chunk if chunk is None else chunk
    if model.fused:
        return chunk
    heads = max(stop - start for start, stop in model.plan.head_ranges)  # of the rank that has most
    keys = max(min(past, window or past) for window in model.config.windows) + chunk
    return min(chunk, max(1, SCORES // (heads * keys)))
