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

from minitp import ops
from minitp.kv_cache import KVCache
from minitp.weights import Loader

PREFILL_CHUNK = 512  # prompt tokens a pass, at most
SCORES = (
    1 << 24
)  # scores [H_r, T, S] of a prefill pass, at most: 64 MB, and as much again for what comes of them


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
    """

    def __init__(self, config, plan, weights, comm, device):
        self.config = config
        self.plan = plan
        self.weights = weights
        self.comm = comm
        self.device = device
        start, stop = plan.head_ranges[comm.rank]
        kv_start, kv_stop = plan.kv_head_ranges[comm.rank]
        self.heads, self.kv_heads = stop - start, kv_stop - kv_start  # H_r, K_r
        self.query_groups = plan.query_groups(comm.rank)
        self.vocab_start = plan.vocab_ranges[comm.rank][0]
        self.vocab_widths = [stop - start for start, stop in plan.vocab_ranges]
        frequencies = ops.rope_inverse_frequencies(config.rope, config.head_dim)
        self.inverse_frequencies = device.xp.asarray(frequencies, dtype=device.xp.float32)  # [d/2]

    def new_cache(self, capacity=64):
        """An empty KV cache for one sequence, of `capacity` positions and more if need be."""
        device, c = self.device, self.config
        return KVCache(device.xp, device.dtype, c.num_hidden_layers, self.kv_heads, c.head_dim, capacity)

    def forward(self, token_ids, cache, logits_at=None, record=Unrecorded()):  # noqa: B008  it has no state
        """Run the next tokens of a sequence; prefill and decode are this same function.

        Parameters
        ----------
        token_ids : int [T]
            They follow the `cache.length` tokens of before, and are added to the cache.
        cache : KVCache
        logits_at : slice or int array or None
            Which of these T positions get logits: slice(-1, None) to generate, slice(None) for perplexity,
            None to only fill the cache.
        record : callable
            Gets this rank's part of each step, as it happens; see `trace.Recorder`.

        Returns
        -------
        float32 [n, V], the same on every rank, or None
        """
        xp, w = self.device.xp, self.weights
        token_ids = xp.asarray(token_ids)  # [T]
        past, total = cache.length, cache.length + token_ids.shape[0]
        positions = xp.arange(past, total)  # [T]
        step = Step(xp, positions, past, total, self.inverse_frequencies, self.config.sliding_window, record)

        partial = ops.embed_partial(xp, token_ids, w.embed, self.vocab_start)  # [T, D]
        x = self.comm.all_reduce(partial)  # [T, D]
        record(embed_partial=partial, embed=x)
        for i, layer in enumerate(w.layers):
            x = x + self._attention(i, layer, x, step, cache)  # [T, D]
            record("attn", i, residual=x)
            x = x + self._mlp(i, layer, x, record)  # [T, D]
            record("mlp", i, residual=x)
        cache.advance(token_ids.shape[0])
        if logits_at is None:
            return None
        x = ops.rms_norm(xp, x[logits_at], w.final_norm, self.config.rms_norm_eps)  # [n, D]
        logits_r = ops.logits_partial(xp, x, w.lm_head)  # [n, V_r]
        logits = self.comm.all_gather(logits_r, self.vocab_widths)  # [n, V]
        record(final_norm=x, logits_partial=logits_r, logits=logits)
        return logits

    def _attention(self, i, layer, x, step, cache):
        """[T, D] -> [T, D]; this rank computes its own heads, the all-reduce adds up their outputs."""
        xp, record = self.device.xp, step.record
        h = ops.rms_norm(xp, x, layer.attn_norm, self.config.rms_norm_eps)  # [T, D]
        qkv = ops.column_parallel(xp, h, layer.w_qkv, layer.b_qkv)  # [T, (H_r + 2 K_r) d]
        qk, v = ops.split_heads(xp, qkv, self.heads, self.kv_heads)  # [H_r + K_r, T, d], [K_r, T, d]
        record("attn", i, norm=h, q=qk[: self.heads], k=qk[self.heads :], v=v)
        qk = ops.apply_rope(xp, qk, step.cos, step.sin)  # [H_r + K_r, T, d]
        q, k = qk[: self.heads], qk[self.heads :]  # [H_r, T, d], [K_r, T, d]
        record("attn", i, q_rope=q, k_rope=k)
        k, v = cache.append(i, k, v)  # [K_r, S, d] each, all positions so far
        k, v = k[:, step.first_key :], v[:, step.first_key :]  # [K_r, W, d] each: those in the window, W <= S
        scores = ops.attention_scores(xp, q, k, self.query_groups, step.mask)  # [H_r, T, W]
        probs = ops.softmax(xp, scores)  # [H_r, T, W]
        context = ops.attention_context(xp, probs, v, self.query_groups)  # [T, H_r d]
        record("attn", i, k_cache=k, v_cache=v, scores=scores, probs=probs, context=context)
        partial = ops.row_parallel(xp, context, layer.w_o)  # [T, D]
        out = self.comm.all_reduce(partial)  # [T, D]
        out = out if layer.b_o is None else out + layer.b_o  # [T, D]
        record("attn", i, out_partial=partial, out=out)
        return out

    def _mlp(self, i, layer, x, record):
        """[T, D] -> [T, D]; this rank computes its own FFN columns, the all-reduce adds up their outputs."""
        xp = self.device.xp
        h = ops.rms_norm(xp, x, layer.mlp_norm, self.config.rms_norm_eps)  # [T, D]
        gate_up = ops.column_parallel(xp, h, layer.w_gate_up, layer.b_gate_up)  # [T, 2 F_r]
        half = gate_up.shape[1] // 2  # F_r
        record("mlp", i, norm=h, gate=gate_up[:, :half], up=gate_up[:, half:])
        act = ops.swiglu(xp, gate_up)  # [T, F_r]
        partial = ops.row_parallel(xp, act, layer.w_down)  # [T, D]
        out = self.comm.all_reduce(partial)  # [T, D]
        out = out if layer.b_down is None else out + layer.b_down  # [T, D]
        record("mlp", i, act=act, out_partial=partial, out=out)
        return out


class Step:
    """What all layers of one forward pass share: the angles of its positions and what each may see."""

    def __init__(self, xp, positions, past, total, inverse_frequencies, window, record):
        self.record = record
        self.cos, self.sin = ops.rope_cos_sin(xp, positions, inverse_frequencies)  # [T, d] each
        # The oldest key that any query of this step sees; with a window the scores stay that small.
        self.first_key = 0 if window is None else max(0, past - window + 1)
        # A single query sees all keys from there on, so decoding needs no mask.
        self.mask = None
        if total - past > 1:
            self.mask = ops.causal_mask(xp, positions, self.first_key, total, window)  # [T, W]


def load_model(source, comm, device, progress=lambda nbytes: None):
    """This rank's Model of a ModelSource; `progress` gets the bytes of each array loaded."""
    weights = Loader(source.plan, comm.rank, source.tensors, device, progress).load()
    return Model(source.config, source.plan, weights, comm, device)


def prefill(model, cache, token_ids, chunk=PREFILL_CHUNK):
    """Run a prompt through the model in passes of at most `chunk` tokens; return the last logits [V]."""
    heads = max(stop - start for start, stop in model.plan.head_ranges)  # of the rank that has most
    window = model.config.sliding_window or len(token_ids)
    start = 0
    while True:
        keys = min(start, window) + chunk
        stop = start + min(chunk, max(1, SCORES // (heads * keys)))
        if stop >= len(token_ids):
            return model.forward(token_ids[start:], cache, logits_at=slice(-1, None))[0]
        model.forward(token_ids[start:stop], cache)
        start = stop
