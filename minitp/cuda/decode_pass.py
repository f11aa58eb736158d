"""A decode pass with fused kernels: the next token of each sequence of a batch.

A pass launches these kernels, here for one sequence on one rank:

    begin_decode        embeds the token; computes its RoPE angles and its slot in the cache
    in each layer
      linear.qkv        norm, q k v, RoPE; writes k and v to the cache
      attention_decode  attention of all heads, split over the keys
      linear.residual   x += context @ w_o
      linear.swiglu     norm, gate and up, SwiGLU
      linear.residual   x += act @ w_down
    linear.logits       norm, logits
    sample              the next token of each row that has a lane; see lanes.py
    end_decode          adds 1 to the sequence's length

With several sequences or several ranks, rms_norm computes each norm in a separate launch before the product.
With several ranks, linear.store replaces linear.residual; an all-reduce follows, and the next rms_norm adds
the sum to x. The embeddings also go through an all-reduce, and the logits through an all-gather and
join_columns.

A family with norms after the blocks also uses linear.store and rms_norm, on a single rank too. With norms of
q and k heads, linear.store and heads replace linear.qkv. Sizes that are no multiple of 8 are padded with
zeros: x, h and so on are [B, D and padding].

In a mixture of experts, the launches listed in `experts` replace linear.swiglu and the linear.residual
after it.
"""

import numpy as np

from minitp import ops
from minitp.cuda.kernels.sample import RESULTS, results_needed
from minitp.cuda.loader import padded, rows_of
from minitp.model import unrecorded
from minitp.paged_cache import slot_mapping

PADDING = -1  # length of a row that only pads the batch
NO_LANE = -1  # lane of a row whose next token the host chooses
NOTHING_NEW = -1  # new block of a row whose block table has not changed


class DecodePass:
    """A decode pass of `batch` rows over one pool; `run` launches its kernels.

    Parameters
    ----------
    model : FusedModel
    pool : BlockPool
    batch : int
        Number of rows, 1 to linear.MAX_TOKENS.
    most_blocks : int
        Maximum number of blocks of a sequence.

    Attributes
    ----------
    logits : float32 [B, V]
    results : float64 [RESULTS, B]
        The next tokens and their log-probabilities, from `sample`.
    head : int32 [6 B]
        What changes from pass to pass: draw (float64 [B]), token, lengths, lane and new_block [B each].
    rows : int
        Number of rows that `fill` has set; the others only pad the batch.
    """

    def __init__(self, model, pool, batch, most_blocks):
        self.model, self.pool, self.batch = model, pool, batch
        c, device = model.config, model.device
        self.comm = model.comm
        kernels, cupy = model.kernels, device.cupy
        self._begin = kernels.begin_decode(pool.block_size)
        self._attention = kernels.attention_decode(pool.block_size, batch, most_blocks * pool.block_size)

        def half(*shape):
            return cupy.zeros((batch, *shape), device.dtype)

        # Padding columns stay zero in all of these arrays.
        self.x, self.h = half(model.width), half(model.width)  # [B, D] each
        self.partial, self.out = half(model.width), half(model.width)  # [B, D] each
        self.qkv = half((model.heads + 2 * model.kv_heads) * c.head_dim if c.qk_norm else 0)
        self.q = half(model.heads, padded(c.head_dim))  # [B, H_r, d]
        self.context = half(padded(model.heads * c.head_dim))  # [B, H_r d]
        if model.experts is None:
            self.act = half(padded(model.weights.layers[0].w_down.shape[0]))  # [B, F_r]
        else:
            self.experts = model.experts.buffers(batch)
        # One launch can add up the ranks' terms and compute the norm, if no other operation is in between.
        self._has_plain_sums = c.residual_multiplier == 1 and not c.post_norms and not c.norm_plus_one
        self._has_plain_sums &= model.width == c.hidden_size
        widest, vocabulary = max(model.vocab_widths), sum(model.vocab_widths)
        self.logits_r = cupy.zeros((batch, widest), np.float32)  # [B, widest]
        self.gathered = cupy.empty((model.comm.size, batch, widest), np.float32)  # [ranks, B, widest]
        self.logits = cupy.empty((batch, -(-vocabulary // 4) * 4), np.float32)[:, :vocabulary]  # [B, V]

        # One array, so that one copy to the GPU is enough.
        self._state = cupy.zeros(batch * (6 + most_blocks), np.int32)
        self.head = self._state[: 6 * batch]
        self.draw, self.token, self.lengths, self.lane, self.new_block = parts_of(self.head, batch)
        self.block_table = self._state[6 * batch :].reshape(batch, most_blocks)  # [B, most_blocks]
        self.results = cupy.zeros((RESULTS, batch), np.float64)  # [RESULTS, B]
        self.slot, self.seen = (cupy.zeros(batch, np.int32) for _ in range(2))  # [B] each
        angles = len(model.rotations), batch, c.rotary_dim // 2
        self.cos, self.sin = (cupy.zeros(angles, np.float32) for _ in range(2))  # [ropes, B, R/2] each

    def fill(self, tokens, lengths, block_tables, lanes=()):
        """Set the inputs of the next pass: the next token, the length and the blocks of each sequence.

        The GPU chooses the next tokens of the first rows, those that `lanes` has a lane for.
        """
        state = np.zeros(self._state.shape, np.int32)
        rows = self.rows = len(tokens)
        _, token, length, lane, new_block = parts_of(state[: 6 * self.batch], self.batch)
        token[:rows], length[:rows], length[rows:] = tokens, lengths, PADDING
        lane[:], lane[: len(lanes)], new_block[:] = NO_LANE, lanes, NOTHING_NEW
        table = state[6 * self.batch :].reshape(self.block_table.shape)
        for row, blocks in enumerate(block_tables):
            table[row, : len(blocks)] = blocks
        self._state[...] = self.model.device.from_host(state)

    def results_of(self, params):
        """Return the rows of `results` that contain what these SamplingParams ask for: [n, B]."""
        return self.results[: results_needed(params, self.logits.shape[1])]

    def run(self, record=unrecorded):
        """Launch the pass kernel by kernel; `record` gets the steps that the explicit path has too."""
        m, w = self.model, self.model.weights
        self._embed(record)
        pending = None
        for i, layer in enumerate(w.layers):
            x, norm = self._normed(layer.attn_norm, pending, record, ("attn", i))
            self._qkv(i, layer, x, norm, record)
            attention = self._attention[m.config.windows[i]]
            attention(self.q, *self._cache(i), self.block_table, self.seen, self.context)
            if record is not unrecorded:
                self._record_attention(i, record)
            pending = self._add(self.context, layer.w_o, layer.b_o, layer.attn_post_norm, record, ("attn", i))
            x, norm = self._normed(layer.mlp_norm, pending, record, ("mlp", i))
            pending = (self._experts if layer.experts else self._dense)(i, layer, x, norm, record)
        self._logits(pending, record)
        lanes = self.pool.lanes
        m.kernels.sample(self.logits, self.lane, lanes.settings, self.draw, lanes.chosen, self.results)
        self._begin.end(self.lengths)

    def _embed(self, record):
        m = self.model
        s = record()
        s.tokens, s.positions = self.token, self.lengths  # [B] each
        inputs = self.token, self.lengths, self.block_table, m.rope_tables, rows_of(m, m.weights.embed.T)
        lanes = self.lane, self.pool.lanes.chosen, self.new_block
        self._begin(*inputs, self.x, self.slot, self.cos, self.sin, self.seen, lanes)
        s.embed_partial = m.without_padding(self.x)  # [B, D]
        if self.comm.size > 1:
            self.comm.reduce_into(self.x, self.x)
        s.embed = m.without_padding(self.x)  # [B, D]

    def _normed(self, weight, pending, record, block):
        """Return the input of the next product: (x, norm) if it fuses the norm, else (normed x, None).

        Parameters
        ----------
        weight : 16-bit [D]
        pending : (bias, post_norm, block) or None
            The result of the previous `_add`. If it is not None, `partial` contains this rank's term of a
            sum, which is added to x before the norm.
        record : callable
        block : tuple
            The arguments of `record` for this norm, such as ("attn", 3); empty for the final norm.
        """
        m, eps = self.model, self.model.config.rms_norm_eps
        if pending is not None:
            self._add_and_norm(weight, pending, record)
        elif self.comm.size == 1 and m.kernels.linear.norm_fits(*self.x.shape):
            return self.x, (weight, eps)
        else:
            m.kernels.rms_norm(self.x, weight, self.h, eps)
        setattr(record(*block), "norm" if block else "final_norm", m.without_padding(self.h))
        return self.h, None

    def _add_and_norm(self, weight, pending, record):
        """Add the sum of all ranks' `partial` to x, and compute h, the norm of x with this weight."""
        m, (bias, post_norm, block) = self.model, pending
        rms_norm, eps, out = m.kernels.rms_norm, m.config.rms_norm_eps, self.out
        has_sum = True
        if self._has_plain_sums:
            has_sum = self.comm.reduce_add_norm(
                rms_norm, self.partial, self.x, weight, self.h, eps, bias, out
            )
        else:
            if self.comm.size == 1:
                out = self.partial
            else:
                self.comm.reduce_into(self.partial, out)
            rms_norm(self.x, weight, self.h, eps, out, bias, post_norm, m.config.residual_multiplier)
        if has_sum and bias is None:
            record(*block).out = m.without_padding(out)
        record(*block).residual = m.without_padding(self.x)

    def _qkv(self, i, layer, x, norm, record):
        """Compute the queries, and write the keys and values to the cache."""
        m, c, w = self.model, self.model.config, rows_of(self.model, layer.w_qkv)
        rope = list(m.rotations).index(c.ropes[i])
        outputs = (self.q, *self._cache(i))
        tables = self.slot, self.cos[rope], self.sin[rope]
        if layer.q_norm is None:
            sizes = m.heads, m.kv_heads, c.head_dim, c.rotary_dim
            m.kernels.linear.qkv(x, w, *outputs, *tables, *sizes, layer.b_qkv, norm)
            return
        m.kernels.linear.store(x, w, self.qkv, layer.b_qkv, norm)
        qk, _ = ops.split_heads(m.device.xp, self.qkv, m.heads, m.kv_heads)  # [H_r + K_r, B, d]
        s = record("attn", i)
        s.q, s.k = qk[: m.heads], qk[m.heads :]  # [H_r, B, d], [K_r, B, d]
        m.kernels.heads(self.qkv, (layer.q_norm, layer.k_norm), *tables[1:], self.slot, *outputs)

    def _dense(self, i, layer, x, norm, record):
        """Compute layer i's dense feed-forward block; the result is that of `_add`."""
        m = self.model
        m.kernels.linear.swiglu(x, rows_of(m, layer.w_gate_up), self.act, layer.b_gate_up, norm)
        record("mlp", i).act = self.act[:, : layer.w_down.shape[0]]
        return self._add(self.act, layer.w_down, layer.b_down, layer.mlp_post_norm, record, ("mlp", i))

    def _experts(self, i, layer, x, norm, record):
        """Compute layer i's mixture of experts, which has no biases; the result is that of `_add`."""
        m = self.model
        m.experts.decode(i, x, norm, self.seen, self.experts, record)
        if self.comm.size == 1:
            self.experts.add_up(self.x, adds=True)
            record("mlp", i).residual = m.without_padding(self.x)
            return None
        self.experts.add_up(self.partial)
        record("mlp", i).out_partial = m.without_padding(self.partial)
        return None, None, ("mlp", i)

    def _add(self, y, w, bias, post_norm, record, block):
        """Compute x += y @ w + bias on a single rank without `post_norm`; else only partial = y @ w.

        The result is the `pending` of the next `_normed`, which adds the sum over all ranks to x.
        """
        m, linear = self.model, self.model.kernels.linear
        if self.comm.size == 1 and post_norm is None:
            linear.residual(y, rows_of(m, w), self.x, bias, m.config.residual_multiplier)
            record(*block).residual = m.without_padding(self.x)
            return None
        linear.store(y, rows_of(m, w), self.partial)
        record(*block).out_partial = m.without_padding(self.partial)
        return bias, post_norm, block

    def _logits(self, pending, record):
        m = self.model
        x, norm = self._normed(m.weights.final_norm, pending, record, ())
        if self.comm.size == 1:
            m.kernels.linear.logits(x, rows_of(m, m.weights.lm_head), self.logits, norm, **m.logit_options)
            record().logits_partial = self.logits
        else:
            logits_r = self.logits_r[:, : m.weights.lm_head.shape[1]]  # [B, V_r]
            m.kernels.linear.logits(x, rows_of(m, m.weights.lm_head), logits_r, norm, **m.logit_options)
            record().logits_partial = logits_r
            self.comm.gather_into(self.logits_r, self.gathered)
            m.kernels.join_columns(self.gathered, self.logits)
        record().logits = self.logits

    def _cache(self, i):
        """Return the keys and values of a layer for the whole pool: [K_r, slots, d and padding] each."""
        keys, values = self.pool.storage[i]
        return keys.values, values.values

    def _record_attention(self, i, record):
        """Record the inputs and the output of attention for each sequence."""
        lengths, size = self.model.device.to_host(self.seen), self.pool.block_size
        window, d = self.model.config.windows[i], self.model.config.head_dim
        columns = self.model.heads * d  # H_r d
        for row, length in enumerate(map(int, lengths[: self.rows])):
            first = max(0, length - (window or length))
            positions = self.model.device.xp.arange(first, length)  # [S]
            slots = slot_mapping(self.block_table[row], positions, size)  # [S]
            keys, values = (stored.gather(slots)[..., :d] for stored in self.pool.storage[i])  # [K_r, S, d]
            s = record("attn", i, row)
            s.q_rope = self.q[row : row + 1, :, :d].transpose(1, 0, 2)  # [H_r, 1, d]
            s.k_rope, s.v = keys[:, -1:], values[:, -1:]  # [K_r, 1, d] each
            s.k_cache, s.v_cache, s.context = keys, values, self.context[row : row + 1, :columns]


def parts_of(head, batch):
    """Return views of a head, int32 [6 B]: draw (float64 [B]), token, length, lane, new block [B each]."""
    ints = head[2 * batch :].reshape(4, batch)  # [4, B]
    return head[: 2 * batch].view(np.float64), *(ints[i] for i in range(4))
