"""A pass of the fused model over the tokens of one or more prompts.

A pass launches these kernels, here on one rank:

    begin_decode          embeds the tokens; computes their RoPE angles and their slots in the cache
    in each layer
      rms_norm            x += the output of the block before; norm
      product             q, k and v
      cache_write         RoPE; writes k and v to the cache
      attention_prefill   attention of all heads of all sequences
      product             context @ w_o
      rms_norm            x += the output of attention; norm
      product             gate and up
      swiglu
      product             act @ w_down
    rms_norm              the final norm

The kernel `heads` replaces cache_write if heads have norms, padding, or dimensions that RoPE does not rotate.
With several ranks, an all-reduce follows the embedding and the products with w_o and w_down. The logits of
the rows that need them are computed afterwards.

All memory is allocated in advance, and all that changes from pass to pass is read from GPU memory. The
products are `linear.store` or, for many tokens, cuBLAS.
"""

from contextlib import nullcontext

import numpy as np

from minitp import ops
from minitp.cuda.comm import LocalComm, captured, in_turn
from minitp.cuda.loader import padded, rows_of
from minitp.model import unrecorded

PADDING = -1  # position of a row that only pads the pass


class Buffers:
    """The arrays of a pass over T tokens, whose columns of padding stay zero.

    x, h, partial and out are [T, D and padding], q [T, H_r, d and padding] (only for the kernel `heads`), cos
    and sin [ropes, T, R/2], slot and seen [T]; qkv, context, gate_up and act have a row per token, too.
    """

    def __init__(self, arrays):
        vars(self).update(arrays)

    @classmethod
    def allocate(cls, model, rows):
        c, cupy, w_down = model.config, model.device.cupy, model.weights.layers[0].w_down
        columns = 0 if w_down is None else w_down.shape[0]  # F_r
        widths = dict.fromkeys(("x", "h", "partial", "out"), model.width)
        widths |= {"qkv": (model.heads + 2 * model.kv_heads) * c.head_dim}
        widths |= {
            "context": padded(model.heads * c.head_dim),
            "gate_up": 2 * columns,
            "act": padded(columns),
        }
        arrays = {name: cupy.zeros((rows, width), model.device.dtype) for name, width in widths.items()}
        q_heads = 0 if model.kernels.heads is None else model.heads
        arrays["q"] = cupy.zeros((rows, q_heads, padded(c.head_dim)), model.device.dtype)
        angles = len(model.rotations), rows, c.rotary_dim // 2
        arrays |= {name: cupy.zeros(angles, np.float32) for name in ("cos", "sin")}
        return cls(arrays | {name: cupy.zeros(rows, np.int32) for name in ("slot", "seen")})

    def first(self, rows):
        """Return the Buffers of the first rows, contiguous in memory."""
        arrays = {name: array[:rows] for name, array in vars(self).items()}
        for name in ("cos", "sin"):
            flat, (ropes, _, half) = getattr(self, name).reshape(-1), getattr(self, name).shape
            arrays[name] = flat[: ropes * rows * half].reshape(ropes, rows, half)  # [ropes, T, R/2]
        return Buffers(arrays)


class PromptPass:
    """A pass over up to `rows` tokens of up to `sequences` sequences of one pool.

    Parameters
    ----------
    prefill : Prefill
    pool : BlockPool
    rows, sequences : int
    blocks : int
        Maximum number of blocks of all sequences together.
    longest : int
        Maximum number of tokens of a sequence.
    cublas : bool
        Let cuBLAS compute the products, for any number of rows; then the pass cannot be captured.
    captures : bool
        Capture the pass when it is launched first, for later ones.
    """

    def __init__(self, prefill, pool, rows, sequences, blocks, longest, cublas=False, captures=False):
        self.model, self.comm = prefill.model, prefill.model.comm
        self.pool, self.rows, self._longest, self._cublas = pool, rows, longest, cublas
        self._graph, self._captures, self._launching = None, captures, self.comm.launching
        self.buffers = prefill.buffers(rows)
        self._begin, self._attention = prefill.kernels(pool.block_size)
        c, ropes = self.model.config, list(self.model.rotations)
        self._ropes = [ropes.index(rope) for rope in c.ropes]  # of each layer
        self._queries = self.buffers.q.reshape(rows, -1)  # [T, H_r (d and padding)]
        self._experts = None if self.model.experts is None else self.model.experts.buffers(rows)
        # One array, so that one copy to the GPU is enough.
        self._tables = 3 * rows + 4 * sequences  # start of the block tables
        self._state = self.model.device.cupy.zeros(self._tables + blocks, np.int32)
        self.token, self.position, self._table_start = self._state[: 3 * rows].reshape(3, rows)  # [T] each
        self._sequences = self._state[3 * rows : self._tables].reshape(sequences, 4)  # see attention_prefill
        self._block_tables = self._state[self._tables :]  # [blocks]

    def fill(self, parts):
        """Set the inputs: the next tokens of each sequence, and its PagedCache."""
        self.parts, row, blocks, size = parts, 0, [], self.pool.block_size
        state = np.zeros(self._tables, np.int32)
        token, position, table_start = state[: 3 * self.rows].reshape(3, -1)  # [T] each
        sequences = state[3 * self.rows :].reshape(-1, 4)  # [S, 4]
        position[:] = PADDING
        for number, (ids, kv_cache) in enumerate(parts):
            past, stop, rows = kv_cache.length, kv_cache.length + len(ids), slice(row, row + len(ids))
            kv_cache.check_room(stop)
            token[rows], position[rows], table_start[rows] = ids, np.arange(past, stop), len(blocks)
            sequences[number] = row, len(ids), past, len(blocks)
            blocks += kv_cache.block_table[: -(-stop // size)]
            row += len(ids)
        state = np.concatenate((state, np.array(blocks, np.int32)))  # [3 T + 4 S + blocks in use]
        self._state[: len(state)] = self.model.device.from_host(state)

    def launch(self):
        """Run the pass as a graph; the first time launch by launch, and capture it while the GPU works."""
        if self._graph is not None:
            with self.comm.launching():
                self._graph.launch(self.model.device.stream)
            return
        if self._captures and self.comm.size > 1:
            self._compile()
        self.run()
        if self._captures:
            self._graph = self._captured()

    def _compile(self):
        """Compile all kernels by a pass over padding without sums, like DecodeGraph: no rank waits in one."""
        comm, launching, state = self.comm, self._launching, self._state.copy()
        self.comm, self._launching = LocalComm(comm, self.model.device), nullcontext
        self.position.fill(PADDING)
        self._sequences.fill(0)
        in_turn(comm, self.run)
        self.comm, self._launching = comm, launching
        self._state[...] = state

    def _captured(self):
        self._launching = nullcontext
        return captured(self.model.device, self.run)

    def run(self, record=unrecorded):
        """Launch the pass kernel by kernel; `record` gets the steps."""
        m, b = self.model, self.buffers
        x, h = m.without_padding(b.x), m.without_padding(b.h)  # [T, D] each
        multiplier = m.config.residual_multiplier
        self._embed(record)
        added = ()
        for i, layer in enumerate(m.weights.layers):
            self._norm(layer.attn_norm, added)
            if i > 0:
                record("mlp", i - 1).residual = x
            record("attn", i).norm = h
            self._attend(i, layer, record)
            added = *self._summed("attn", i, layer.b_o, record), layer.attn_post_norm, multiplier
            self._norm(layer.mlp_norm, added)
            record("attn", i).residual = x
            record("mlp", i).norm = h
            self._feed_forward(i, layer, record)
            added = *self._summed("mlp", i, layer.b_down, record), layer.mlp_post_norm, multiplier
        self._norm(m.weights.final_norm, added)
        record("mlp", len(m.weights.layers) - 1).residual = x

    def _embed(self, record):
        m, b, s = self.model, self.buffers, record()
        s.tokens, s.positions = self.token, self.position  # [T] each
        table = rows_of(m, m.weights.embed.T)  # [V_r, D and padding]
        inputs = self.token, self.position, self._block_tables, m.rope_tables, table
        self._begin(*inputs, b.x, b.slot, b.cos, b.sin, b.seen, table_starts=self._table_start)
        s.embed_partial = m.without_padding(b.x)  # [T, D]
        s.embed = m.without_padding(self._sum(b.x, b.x))  # [T, D]

    def _norm(self, weight, added):
        b, eps = self.buffers, self.model.config.rms_norm_eps
        self.model.kernels.rms_norm(b.x, weight, b.h, eps, *added)

    def _attend(self, i, layer, record):
        """Compute this rank's term of the output of attention; write k and v to the caches."""
        m, b = self.model, self.buffers
        self._multiply(b.h, layer.w_qkv, b.qkv, layer.b_qkv)
        if record is not unrecorded:
            self._record_qkv(i, record)
        caches = [stored.values for stored in self.pool.storage[i]]  # [K_r, slots, d and padding] each
        rope = self._ropes[i]
        if m.kernels.heads is None:
            q = b.qkv  # rotated in place; only its first columns are read
            m.kernels.cache_write(q, b.cos[rope], b.sin[rope], b.slot, *caches)
        else:
            norms, q = (layer.q_norm, layer.k_norm), self._queries  # [T, H_r (d and padding)]
            m.kernels.heads(b.qkv, norms, b.cos[rope], b.sin[rope], b.slot, b.q, *caches)
        sequences = self._block_tables, self._sequences, self._longest
        self._attention[m.config.windows[i]](q, *caches, *sequences, b.context)
        if record is not unrecorded:
            self._record_attention(i, q, record)
            record("attn", i).context = b.context[:, : m.heads * m.config.head_dim]
        self._multiply(b.context, layer.w_o, b.partial)

    def _feed_forward(self, i, layer, record):
        """Compute this rank's term of the output of the mlp, or of the experts, for h."""
        b, experts = self.buffers, self.model.experts
        if experts is None:
            self._activations(i, layer, record)
            self._multiply(b.act, layer.w_down, b.partial)
            return
        if self._cublas:
            experts.prefill(i, self.model.without_padding(b.h), self._experts, record)
        else:
            experts.decode(i, b.h, None, b.seen, self._experts, record)
        self._experts.add_up(b.partial)

    def _activations(self, i, layer, record):
        """Compute silu(gate) * up for h, or with the family's other activation."""
        b, columns = self.buffers, layer.w_down.shape[0]  # F_r
        self._multiply(b.h, layer.w_gate_up, b.gate_up, layer.b_gate_up)
        self.model.kernels.swiglu(b.gate_up, b.act)
        if record is not unrecorded:
            s = record("mlp", i)
            s.gate, s.up = b.gate_up[:, :columns], b.gate_up[:, columns:]  # [T, F_r] each
            s.act = b.act[:, :columns]  # [T, F_r]

    def _summed(self, block, i, bias, record):
        """Return what the next rms_norm adds to x: (sum over all ranks [T, D and padding], bias)."""
        m, b = self.model, self.buffers
        record(block, i).out_partial = m.without_padding(b.partial)
        out = self._sum(b.partial, b.out)  # [T, D and padding]
        if bias is None:
            record(block, i).out = m.without_padding(out)
        return out, bias

    def _multiply(self, y, w, out, bias=None):
        """Compute out = y @ w + bias, rounded once; `y` and `out` may have columns of padding."""
        m = self.model
        if not self._cublas:
            m.kernels.linear.store(y, rows_of(m, w), out, bias)
            return
        y, out = _columns(y, w.shape[0]), _columns(out, w.shape[1])  # [T, in], [T, out]
        if bias is None:
            m.device.xp.matmul_into(y, w, out)  # rounded by cuBLAS
        else:
            out[...] = ops.column_parallel(m.device.xp, y, w, bias)  # [T, out]

    def _sum(self, partial, out):
        """Return the sum of all ranks' `partial`, which may be `out`."""
        if self.comm.size == 1:
            return partial
        with self._launching():
            self.comm.reduce_into(partial, out)
        return out

    def _record_qkv(self, i, record):
        """Record the projections before RoPE."""
        m, s = self.model, record("attn", i)
        qk, v = ops.split_heads(m.device.xp, self.buffers.qkv, m.heads, m.kv_heads)  # .., [K_r, T, d]
        s.q, s.k, s.v = qk[: m.heads], qk[m.heads :], v  # [H_r, T, d], [K_r, T, d], [K_r, T, d]

    def _record_attention(self, i, q, record):
        """Record the queries and keys after RoPE and the inputs of attention of each sequence."""
        heads, d, window, row = self.model.heads, self.model.config.head_dim, self.model.config.windows[i], 0
        width = heads * self.pool.storage[i][0].values.shape[-1]  # H_r (d and padding)
        by_head = q[:, :width].reshape(len(q), heads, -1)[:, :, :d].transpose(1, 0, 2)  # [H_r, T, d]
        for index, (ids, kv_cache) in enumerate(self.parts):
            new, past = len(ids), kv_cache.length
            first = 0 if window is None else max(0, past - window + 1)
            slots = kv_cache.slots(first, past + new)  # [S]
            keys, values = (x.gather(slots)[..., :d] for x in self.pool.storage[i])  # [K_r, S, d] each
            s = record("attn", i, index)
            s.q_rope = by_head[:, row : row + new]  # [H_r, n, d]
            s.k_rope = keys[:, -new:]  # [K_r, n, d]
            s.k_cache, s.v_cache = keys, values
            row += new


def _columns(x, count):
    """Return the first columns of x, without the cost of a view if there are no others."""
    return x if x.shape[1] == count else x[:, :count]
