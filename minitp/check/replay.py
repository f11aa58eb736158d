"""The replay of a run: the oracle's operations, step by step, on the inputs that a rank recorded.

There is one method for each part of a forward pass. Each yields (step, Expected, inputs). For a replicated
step, `inputs` is a list of the arrays from which the step is computed, and ranks with the same inputs must
have the same bits. The list is empty if the step is computed from arrays of all ranks or comes from rank 0.
For other steps, `inputs` is None.
"""

import numpy as np

from minitp.check import expected
from minitp.check.passes import UNWRITTEN
from minitp.check.tolerance import NotRecorded, concatenated
from minitp.oracle import ops as oracle_ops
from minitp.trace.names import BLOCK_TABLE


class Replay:
    """The expected values of one rank's steps.

    Parameters
    ----------
    reference : Oracle
        An oracle of the model. Only its settings from config.json are used: eps, windows, RoPE frequencies,
        head counts.
    plan : Plan
    comm : Comm
        A communicator that gathers the arrays of all ranks, so all ranks must call the methods in the same
        order.
    weights : dict of str to array
        This rank's slices by checkpoint name, [out, in] as in the file.
    recorded : callable
        A function recorded(pass name, layer, step) that returns this rank's array, or a NotRecorded.
    sequences : list of list of int
        The token ids that each sequence should have.
    kv_dtype : str
        The dtype of the cache: auto, float16 or int8.
    sums : Float32Sums or TensorCoreSums
        The way in which this rank's device adds up products that stay in float32.
    rounds_each : bool
        Whether an all-reduce of 16-bit terms rounds after each addition; minitp's does not.
    """

    def __init__(
        self, reference, plan, comm, weights, recorded, sequences, kv_dtype, sums, rounds_each=False
    ):
        self.reference, self.plan, self.comm = reference, plan, comm
        self.weights, self.recorded = weights, recorded
        self.sequences, self.kv_dtype, self.sums = sequences, kv_dtype, sums
        self.rounds_each = rounds_each
        heads_per_kv = reference.heads // reference.kv_heads
        first_kv = plan.kv_head_ranges[comm.rank][0]
        self.kv_of_head = [h // heads_per_kv - first_kv for h in range(*plan.head_ranges[comm.rank])]  # [H_r]

    def before(self, pass_):
        """Yield the expected values of the inputs of a RecordedPass and of its embedding steps."""
        name, start, stop = pass_.name, pass_.start, pass_.stop
        yield "tokens", expected.exactly(np.array(self.sequences[pass_.sequence][start:stop])), []  # [T]
        yield "positions", expected.exactly(np.arange(start, stop)), []  # [T]
        if pass_.block_table:
            yield BLOCK_TABLE, expected.exactly(np.array(pass_.block_table)), []  # [B]
        first, last = self.plan.vocab_ranges[self.comm.rank]
        table = self.weights["model.embed_tokens.weight"]  # [V_r, D]
        rows = np.zeros((stop - start, table.shape[1]), table.dtype)  # [T, D]
        for t, token in enumerate(self.recorded(name, None, "tokens")):
            if first <= token < last:
                rows[t] = table[token - first]
        if self.reference.embedding_scale == 1:
            yield "embed_partial", expected.exactly(rows), None
        else:
            yield "embed_partial", expected.scaled(rows, self.reference.embedding_scale), None
        parts = self.comm.allgather_object(self.recorded(name, None, "embed_partial"))  # [T, D] of each rank
        yield "embed", expected.total(parts, rounds_each=self.rounds_each), []

    def attention(self, i, pass_):
        """Yield the expected values of the steps of layer i's attention block."""
        name = pass_.name
        s, w = self._steps(name, i, "attn"), self._weights(i, "self_attn")
        x = self._stream(name, i)  # [T, D]
        norm = self._gain(f"model.layers.{i}.input_layernorm.weight")  # [D]
        yield "attn.norm", expected.rms_norm(x, norm, self.reference.eps), [x, norm]
        for part in "qkv":
            y = expected.linear(s("norm"), w(f"{part}_proj.weight"), w(f"{part}_proj.bias"))  # [T, n * d]
            yield f"attn.{part}", y.as_heads(self.reference.head_dim), None  # [n, T, d]
        positions = self.recorded(name, None, "positions")  # [T]
        for part in "qk":
            before_rope = part
            if self.reference.norms_heads:
                norm = self._gain(f"model.layers.{i}.self_attn.{part}_norm.weight")  # [d]
                before_rope = f"{part}_norm"
                yield f"attn.{before_rope}", expected.rms_norm(s(part), norm, self.reference.eps), None
            rotation = self.reference.rotations[i]  # [d/2], one number
            rotated = expected.rope(s(before_rope), positions, *rotation)  # [n, T, d]
            if not self.reference.turns[i]:  # a layer without RoPE
                rotated = expected.exactly(s(before_rope))  # [n, T, d]
            yield f"attn.{part}_rope", rotated, None
        yield from self._cache(i, pass_)
        k, v = (s(part)[self.kv_of_head] for part in ("k_cache", "v_cache"))  # [H_r, S, d] each
        keys = np.arange(pass_.stop - k.shape[1], pass_.stop)  # [S]
        mask = oracle_ops.causal_mask(positions, keys, self.reference.windows[i])  # [T, S]
        root, cap = self.reference.score_root, self.reference.score_cap
        yield "attn.scores", expected.scores(s("q_rope"), k, mask, root, cap, self.sums), None
        yield "attn.probs", expected.softmax(s("scores")), None
        yield "attn.context", expected.context(s("probs"), v), None
        yield "attn.out_partial", expected.linear(s("context"), w("o_proj.weight")), None
        yield from self._sum(name, i, "attn", x, w("o_proj.bias"))

    def _cache(self, i, pass_):
        """Yield the expected cache: the keys and values of the passes that wrote it, within the window."""
        start, stop, window = pass_.start, pass_.stop, self.reference.windows[i]
        seen = stop if window is None else min(stop, stop - start + window - 1)  # keys that the queries see
        for step, source in (("attn.k_cache", "attn.k_rope"), ("attn.v_cache", "attn.v")):
            # A run may read more keys than its queries see; they are compared, too.
            length = max(seen, self.recorded(pass_.name, i, step).shape[1])
            origins = (*pass_.cached, *pass_.origins)[-length:]
            arrays = {name: self.recorded(name, i, source) for name, _ in origins if name}  # [K_r, n, d] each
            arrays[UNWRITTEN[0]] = np.full(arrays[pass_.name].shape, np.nan, arrays[pass_.name].dtype)
            written = [arrays[name][:, row : row + 1] for name, row in origins]  # [K_r, 1, d] each
            written = concatenated(written, axis=1)  # [K_r, S, d]
            yield step, expected.stored(written, self.kv_dtype), None

    def mlp(self, i, pass_):
        """Yield the expected values of the steps of layer i's feed-forward block."""
        name = pass_.name
        bias = self.weights.get(f"model.layers.{i}.mlp.down_proj.bias")  # [D], or None
        x = self.recorded(name, i, "attn.residual")  # [T, D]
        norm = self._gain(f"model.layers.{i}.{self.reference.mlp_norm}.weight")  # [D]
        yield "mlp.norm", expected.rms_norm(x, norm, self.reference.eps), [x, norm]
        if self.reference.experts:
            yield from self._experts(name, i)
        else:
            yield from self._dense(name, i)
        yield from self._sum(name, i, "mlp", x, bias)

    def _dense(self, name, i):
        """Yield the expected values from `gate` to `out_partial` of a dense feed-forward block."""
        s, w = self._steps(name, i, "mlp"), self._weights(i, "mlp")
        for part in ("gate", "up"):
            y = expected.linear(s("norm"), w(f"{part}_proj.weight"), w(f"{part}_proj.bias"))  # [T, F_r]
            yield f"mlp.{part}", y, None
        activate = {"silu": expected.swiglu, "gelu_pytorch_tanh": expected.geglu}[self.reference.activation]
        yield "mlp.act", activate(s("gate"), s("up")), None
        yield "mlp.out_partial", expected.linear(s("act"), w("down_proj.weight")), None

    def _experts(self, name, i):
        """Yield the expected values from `router` to `out_partial`, for this rank's choice of experts."""
        s, w = self._steps(name, i, "mlp"), self._weights(i, self.reference.expert_block)
        gate = w("gate.weight")  # [E, D]
        yield "mlp.router", expected.linear(s("norm"), gate), [s("norm"), gate]
        parts, numbers = self.reference.expert_parts, range(self.reference.experts)
        gates, ups, downs = ([w(f"experts.{e}.{part}.weight") for e in numbers] for part in parts)
        routing = self.reference.experts_per_token, self.reference.normalizes_shares
        chosen = oracle_ops.choose_experts(s("router"), routing[0])  # [T, E]
        yield "mlp.experts", expected.experts_act(s("norm"), chosen, gates, ups), None
        summed = expected.experts_sum(s("experts"), s("router"), *routing, downs)  # [T, D]
        yield "mlp.out_partial", summed, None

    def after(self, pass_):
        """Yield the expected values of the last norm and of the logits, if the pass has any."""
        if pass_.logit_rows == 0:
            return
        name = pass_.name
        x = self._stream(name, self.plan.layers)[-pass_.logit_rows :]  # [n, D]
        norm = self._gain("model.norm.weight")  # [D]
        yield "final_norm", expected.rms_norm(x, norm, self.reference.eps), [x, norm]
        w = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])  # [V_r, D]
        x = self.recorded(name, None, "final_norm")  # [n, D]
        logits_r = expected.linear(x, w, dtype=np.float32, sums=self.sums)  # [n, V_r]
        logits_r = logits_r.divided(self.reference.logits_divisor)  # [n, V_r]
        if self.reference.logits_cap is not None:
            uncapped = logits_r.not_recorded(np.float32)  # [n, V_r]
            logits_r = expected.soft_cap(uncapped, self.reference.logits_cap)  # [n, V_r]
        yield "logits_partial", logits_r, None
        parts = self.comm.allgather_object(
            self.recorded(name, None, "logits_partial")
        )  # [n, V_r] of each rank
        if any(isinstance(part, NotRecorded) for part in parts):
            yield "logits", expected.concatenated(self.comm.allgather_object(logits_r)), []
            return
        if len(set(map(len, parts))) > 1:  # a rank that has other rows of logits is already blamed
            return
        yield "logits", expected.exactly(np.concatenate(parts, axis=-1)), []

    def _sum(self, name, i, block, x, bias):
        """Yield the expected values of the steps from the all-reduce to the residual."""
        own = self.recorded(name, i, f"{block}.out_partial")  # [T, D]
        parts = self.comm.allgather_object(own)  # [T, D] of each rank
        total = expected.total(parts, bias, self.rounds_each)  # [T, D]
        yield f"{block}.out", total, [] if bias is None else [bias]
        out = self.recorded(name, i, f"{block}.out")  # [T, D]
        if self.reference.post_norms:
            norm = self._gain(f"model.layers.{i}.{self.reference.post_norms[block]}.weight")  # [D]
            yield f"{block}.post_norm", expected.rms_norm(out, norm, self.reference.eps), [out, norm]
            out = self.recorded(name, i, f"{block}.post_norm")  # [T, D]
        yield f"{block}.residual", expected.add(x, out, self.reference.residual_scale), [x, out]

    def _gain(self, name):
        """Return the weights of a norm as it applies them, [D]; Gemma's are 1 + the tensor in the file."""
        weight = self.weights[name]  # [D]
        return weight if self.reference.norm_offset == 0 else weight.astype(np.float64) + 1

    def _stream(self, name, i):
        """Return the residual stream before layer i: [T, D]."""
        return self.recorded(name, None, "embed") if i == 0 else self.recorded(name, i - 1, "mlp.residual")

    def _steps(self, name, i, block):
        """Return a function that gives this rank's array of a step of this block, as in s("norm")."""
        return lambda step: self.recorded(name, i, f"{block}.{step}")

    def _weights(self, i, block):
        """Return a function that gives a weight of this block, or None, as in w("q_proj.bias")."""
        return lambda part: self.weights.get(f"model.layers.{i}.{block}.{part}")
