"""The prefill of the fused model: passes over prompts, with cuBLAS for the products."""

import numpy as np

from minitp import ops
from minitp.cuda.loader import padded, rows_of
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
        w, c, prompt = m.weights, m.config, Prompt(m, parts)
        padded_x = self._embed(prompt, record)  # [T, D and padding]
        padded_h = m.device.cupy.empty(padded_x.shape, padded_x.dtype)  # [T, D and padding]
        x, h = m.without_padding(padded_x), m.without_padding(padded_h)  # [T, D] each

        def norm(weight, *added):
            m.kernels.rms_norm(padded_x, weight, padded_h, c.rms_norm_eps, *added)

        experts = None if m.experts is None else m.experts.buffers(len(x))
        added = ()
        for i, layer in enumerate(w.layers):
            norm(layer.attn_norm, *added)
            if i > 0:
                record("mlp", i - 1).residual = x
            record("attn", i).norm = h
            context = self._attention(i, layer, h, prompt, record)  # [T, H_r d]
            added = self._partial("attn", i, context, layer.w_o, layer.b_o, record)
            norm(layer.mlp_norm, *added, layer.attn_post_norm, c.residual_multiplier)
            record("attn", i).residual = x
            record("mlp", i).norm = h
            if experts is None:
                act = self._activations(i, layer, h, record)  # [T, F_r]
                added = self._partial("mlp", i, act, layer.w_down, layer.b_down, record)
            else:
                partial = m.experts.prefill(i, h, experts, record)  # [T, D and padding]
                added = self._summed("mlp", i, partial, None, record)
            added = *added, layer.mlp_post_norm, c.residual_multiplier
        norm(w.final_norm, *added)
        record("mlp", len(w.layers) - 1).residual = x
        return None if logits_at is None else self._logits(h[logits_at], record)  # [n, V]

    def _embed(self, prompt, record):
        """Return the embeddings of all tokens, [T, D and padding]."""
        m, s = self.model, record()
        s.tokens, s.positions = prompt.token_ids, prompt.positions  # [T] each
        table = rows_of(m, m.weights.embed.T)  # [V_r, D and padding]
        partial = ops.embed_partial(m.device.xp, prompt.token_ids, table, m.vocab_start)  # [T, D and padding]
        partial = ops.scaled(m.device.xp, partial, m.embedding_multiplier)  # [T, D and padding]
        s.embed_partial = m.without_padding(partial)  # [T, D]
        x = self._sum(partial)  # [T, D and padding]
        s.embed = m.without_padding(x)  # [T, D]
        return x

    def _logits(self, h, record):
        """Return the logits [n, V] for h [n, D]."""
        m, s = self.model, record()
        s.final_norm = h
        logits_r = ops.logits_partial(m.device.xp, h, m.weights.lm_head, **m.logit_options)  # [n, V_r]
        s.logits_partial = logits_r
        s.logits = m.comm.all_gather(logits_r, m.vocab_widths)  # [n, V]
        return s.logits

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
        caches = [stored.values for stored in prompt.pool.storage[i]]  # [K_r, slots, d and padding] each
        q = self._rotate_and_store(i, layer, qkv, prompt, caches)  # [T, H_r (d and padding)]
        context = m.device.cupy.empty((len(h), width), h.dtype)  # [T, H_r d]
        attention = prompt.attention[m.config.windows[i]]
        for sequence in prompt.sequences:
            at = sequence.tokens
            attention(q[at], *caches, sequence.table, sequence.past, context[at])
        if record is not unrecorded:
            self._record_attention(i, q, prompt, record)
            record("attn", i).context = context
        return context

    def _rotate_and_store(self, i, layer, qkv, prompt, caches):
        """Return the queries [T, H_r (d and padding)] after RoPE; write keys and values to the caches."""
        m, angles = self.model, prompt.angles[self.model.config.ropes[i]]
        if m.kernels.heads is None:
            m.kernels.cache_write(qkv, *angles, prompt.slots, *caches)  # rotates the queries in place
            return qkv[:, : m.heads * m.config.head_dim]
        q = m.device.cupy.zeros(
            (len(qkv), m.heads, caches[0].shape[-1]), qkv.dtype
        )  # [T, H_r, d and padding]
        m.kernels.heads(qkv, (layer.q_norm, layer.k_norm), *angles, prompt.slots, q, *caches)
        return q.reshape(len(q), -1)

    def _record_attention(self, i, q, prompt, record):
        """Record the queries and keys after RoPE and the inputs of attention of each sequence."""
        window, d = self.model.config.windows[i], self.model.config.head_dim
        by_head = q.reshape(len(q), self.model.heads, -1)[:, :, :d].transpose(1, 0, 2)  # [H_r, T, d]
        for index, sequence in enumerate(prompt.sequences):
            first = 0 if window is None else max(0, sequence.past - window + 1)
            slots = sequence.slots[first:]  # [S]
            keys, values = (x.gather(slots)[..., :d] for x in prompt.pool.storage[i])  # [K_r, S, d] each
            new = len(keys[0]) - (sequence.tokens.stop - sequence.tokens.start)
            s = record("attn", i, index)
            s.q_rope = by_head[:, sequence.tokens]  # [H_r, n, d]
            s.k_rope = keys[:, new:]  # [K_r, n, d]
            s.k_cache, s.v_cache = keys, values

    def _partial(self, block, i, y, w, bias, record):
        """Compute this rank's term y @ w of a block's output; the result is that of `_summed`."""
        m = self.model
        partial = m.device.xp.matmul(y, w)  # [T, D]: like ops.row_parallel, rounded by cuBLAS
        if m.width > m.config.hidden_size:
            product, partial = partial, m.device.cupy.zeros((len(y), m.width), y.dtype)  # [T, D and padding]
            partial[:, : m.config.hidden_size] = product
        return self._summed(block, i, partial, bias, record)

    def _summed(self, block, i, partial, bias, record):
        """Return what the next rms_norm adds to x: (sum over all ranks [T, D and padding], bias)."""
        m = self.model
        record(block, i).out_partial = m.without_padding(partial)
        out = self._sum(partial)  # [T, D and padding]
        if bias is None:
            record(block, i).out = m.without_padding(out)
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
        half, contiguous = model.config.rotary_dim // 2, model.device.cupy.ascontiguousarray
        self.angles = {}  # RoPE -> its cosines and sines, [T, R/2] each
        for rope, rotation in model.rotations.items():
            tables = ops.rope_cos_sin(xp, self.positions, *rotation)  # [T, R] each
            self.angles[rope] = [contiguous(table[:, half:]) for table in tables]
        self.attention = model.kernels.attention_prefill(self.pool.block_size)


class PromptSequence:
    """One sequence of a prefill: its slice of the T tokens, and the pool's slots for its positions."""

    def __init__(self, xp, tokens, cache):
        self.tokens, self.past = tokens, cache.length
        self.slots = cache.slots(0, self.past + tokens.stop - tokens.start)  # [past + n]
        self.table = xp.asarray(cache.block_table, dtype=np.int32)  # [blocks]
