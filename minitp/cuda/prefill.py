"""The prefill of the fused model: passes over prompts, with cuBLAS for the products."""

import numpy as np

from minitp import ops
from minitp.cuda.loader import padded
from minitp.model import joined, unrecorded


class Prefill:
    """A pass over many tokens of some sequences, with cuBLAS for the products and kernels for the rest.

    Parameters
    ----------
    model : FusedModel
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, parts, logits_at, record):
        """Return the logits [n, V] of the rows `logits_at`, or None if that is None."""
        m = self.model
        xp, w, kernels, c = m.device.xp, m.weights, m.kernels, m.config
        prompt = Prompt(m, parts)
        s = record()
        s.tokens, s.positions = prompt.token_ids, prompt.positions  # [T] each
        partial = ops.embed_partial(xp, prompt.token_ids, w.embed, m.vocab_start)  # [T, D]
        s.embed_partial = partial
        s.embed = x = self._sum(partial)  # [T, D]
        h = m.device.cupy.empty(x.shape, x.dtype)  # [T, D]
        experts = None if m.experts is None else m.experts.buffers(len(x))
        addend = bias = None
        for i, layer in enumerate(w.layers):
            kernels.rms_norm(x, layer.attn_norm, h, c.rms_norm_eps, addend, bias)
            if i > 0:
                record("mlp", i - 1).residual = x
            record("attn", i).norm = h
            context = self._attention(i, layer, h, prompt, record)  # [T, H_r d]
            addend, bias = self._partial("attn", i, context, layer.w_o, layer.b_o, record)
            kernels.rms_norm(x, layer.mlp_norm, h, c.rms_norm_eps, addend, bias)
            record("attn", i).residual = x
            record("mlp", i).norm = h
            if experts is None:
                act = self._activations(i, layer, h, record)  # [T, F_r]
                addend, bias = self._partial("mlp", i, act, layer.w_down, layer.b_down, record)
            else:
                partial = m.experts.prefill(i, h, experts, record)  # [T, D]
                addend, bias = self._summed("mlp", i, partial, None, record)
        kernels.rms_norm(x, w.final_norm, h, c.rms_norm_eps, addend, bias)
        record("mlp", len(w.layers) - 1).residual = x
        if logits_at is None:
            return None
        h = h[logits_at]  # [n, D]
        record().final_norm = h
        logits_r = ops.logits_partial(xp, h, w.lm_head)  # [n, V_r]
        record().logits_partial = logits_r
        logits = m.comm.all_gather(logits_r, m.vocab_widths)  # [n, V]
        record().logits = logits
        return logits

    def _columns(self, h, w, bias):
        """Compute ops.column_parallel; without a bias, cuBLAS rounds the sums itself, which saves memory."""
        if bias is None:
            return self.model.device.xp.matmul(h, w)  # [T, n_r]
        return ops.column_parallel(self.model.device.xp, h, w, bias)  # [T, n_r]

    def _attention(self, i, layer, h, prompt, record):
        """Return the context [T, H_r d] of this rank's heads for h [T, D]; write k and v to the caches."""
        m = self.model
        xp, width = m.device.xp, m.heads * m.config.head_dim
        qkv = self._columns(h, layer.w_qkv, layer.b_qkv)  # [T, (H_r + 2 K_r) d]
        qk, v = ops.split_heads(xp, qkv, m.heads, m.kv_heads)  # [H_r + K_r, T, d], [K_r, T, d]
        s = record("attn", i)
        s.q, s.k, s.v = qk[: m.heads], qk[m.heads :], v  # [H_r, T, d], [K_r, T, d], [K_r, T, d]
        keys, values = (stored.values for stored in prompt.pool.storage[i])  # [K_r, slots, d] each
        m.kernels.cache_write(qkv, prompt.cos, prompt.sin, prompt.slots, keys, values)
        context = m.device.cupy.empty((len(h), width), h.dtype)  # [T, H_r d]
        for sequence in prompt.sequences:
            at = sequence.tokens
            prompt.attention(qkv[at, :width], keys, values, sequence.table, sequence.past, context[at])
        if record is not unrecorded:
            self._record_attention(i, qk, prompt, record)
            record("attn", i).context = context
        return context

    def _record_attention(self, i, qk, prompt, record):
        """Record the queries and keys after RoPE and the inputs of attention of each sequence."""
        window = self.model.config.windows[0]
        for index, sequence in enumerate(prompt.sequences):
            first = 0 if window is None else max(0, sequence.past - window + 1)
            slots = sequence.slots[first:]  # [S]
            keys, values = (stored.gather(slots) for stored in prompt.pool.storage[i])  # [K_r, S, d] each
            new = len(keys[0]) - (sequence.tokens.stop - sequence.tokens.start)
            s = record("attn", i, index)
            s.q_rope = qk[: self.model.heads, sequence.tokens]  # [H_r, n, d]
            s.k_rope = keys[:, new:]  # [K_r, n, d]
            s.k_cache, s.v_cache = keys, values

    def _activations(self, i, layer, h, record):
        """Return this rank's columns between gate, up and down, [T, F_r], for h [T, D]."""
        m, s = self.model, record("mlp", i)
        gate_up = self._columns(h, layer.w_gate_up, layer.b_gate_up)  # [T, 2 F_r]
        columns = layer.w_down.shape[0]  # F_r
        s.gate, s.up = gate_up[:, :columns], gate_up[:, columns:]  # [T, F_r] each
        act = m.device.cupy.empty((len(h), padded(columns)), h.dtype)  # [T, F_r or more]
        m.kernels.swiglu(gate_up, act)
        s.act = act[:, :columns]  # [T, F_r]
        return s.act

    def _partial(self, block, i, y, w, bias, record):
        """Compute this rank's term y @ w of a block's output; the result is that of `_summed`."""
        partial = self.model.device.xp.matmul(y, w)  # [T, D]: like ops.row_parallel, rounded by cuBLAS
        return self._summed(block, i, partial, bias, record)

    def _summed(self, block, i, partial, bias, record):
        """Return what the next rms_norm adds to the residual stream: (sum over all ranks [T, D], bias)."""
        record(block, i).out_partial = partial
        out = self._sum(partial)  # [T, D]
        if bias is None:
            record(block, i).out = out
        return out, bias

    def _sum(self, partial):
        comm = self.model.comm
        return partial if comm.size == 1 else comm.all_reduce(partial)


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
