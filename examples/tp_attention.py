"""Attention on several ranks: each rank computes its own heads, and one all-reduce combines them.

    x [T, D], the same everywhere      rank 0      rank 1      rank 2      rank 3
    q, k, v = x @ w_qkv             |  heads    |  heads    |  heads    |  heads    |  columns of w_qkv
    RoPE                            |  q, k     |  q, k     |  q, k     |  q, k     |
    softmax(q k^T / sqrt(d)) v      |  own      |  own      |  own      |  own      |  no communication
    context_r @ w_o                 |  rows     |  rows     |  rows     |  rows     |  a partial sum each
                                          +===========+== all-reduce =+===========+    the sum, everywhere

Heads do not depend on each other, so attention is split by heads. In multi-head attention (MHA), each query
head has its own KV head. In grouped-query attention (GQA), several query heads share one, and a rank holds
the KV heads that its query heads read. This example runs both, with otherwise equal shapes.

    mpirun -n 4 python examples/tp_attention.py        (MODEL=tinyllama-1.1b for other shapes)
"""

from dataclasses import replace

import common

from minitp import ops
from minitp.loading.random_weights import RandomWeights
from minitp.oracle import ops as oracle_ops
from minitp.rope import rope_inverse_frequencies
from minitp.shard import make_plan


class Attention:
    """One rank's part of the attention of one layer; `layer` is "model.layers.0", for example."""

    def __init__(self, here, layer):
        self.here = here
        self.layer = f"{layer}.self_attn"
        config, plan, xp = here.source.config, here.source.plan, here.device.xp
        start, stop = plan.head_ranges[here.comm.rank]
        kv_start, kv_stop = plan.kv_head_ranges[here.comm.rank]
        self.heads, self.kv_heads = stop - start, kv_stop - kv_start  # H_r, K_r
        self.query_groups = plan.query_groups(here.comm.rank)  # per KV head, the query heads that read it
        # [D, (H_r + 2 K_r) d]: the columns of this rank's q heads, then of its k heads, then v
        self.w_qkv = here.matrix(*[f"{self.layer}.{part}_proj.weight" for part in "qkv"])
        self.w_o = here.matrix(f"{self.layer}.o_proj.weight")  # [H_r d, D]: the rows of this rank's heads
        frequencies = rope_inverse_frequencies(config.rope, config.head_dim)
        self.frequencies = xp.asarray(frequencies, dtype=xp.float32)  # [d/2]

    def __call__(self, x):
        """Compute attention, [T, D] -> [T, D]; both are the same on every rank."""
        xp, window = self.here.device.xp, self.here.source.config.sliding_window
        # 1. Column-parallel: this rank has all of x, and the columns of its own heads.
        qkv = ops.column_parallel(xp, x, self.w_qkv)  # [T, (H_r + 2 K_r) d]
        qk, v = ops.split_heads(xp, qkv, self.heads, self.kv_heads)  # [H_r + K_r, T, d], [K_r, T, d]
        # 2. RoPE rotates each q and k by an angle that depends on its position.
        positions = xp.arange(len(x))  # [T]
        cos, sin = ops.rope_cos_sin(xp, positions, self.frequencies)  # [T, d] each
        qk = ops.apply_rope(xp, qk, cos, sin)  # [H_r + K_r, T, d]
        q, k = qk[: self.heads], qk[self.heads :]  # [H_r, T, d], [K_r, T, d]
        # 3. For each head: weights of all tokens up to this one, and the weighted mean of their values.
        mask = ops.causal_mask(xp, positions, 0, len(x), window)  # [T, T]
        scores = ops.attention_scores(xp, q, k, self.query_groups, mask)  # [H_r, T, T]
        probs = ops.softmax(xp, scores)  # [H_r, T, T]
        context = ops.attention_context(xp, probs, v, self.query_groups)  # [T, H_r d]
        # 4. Row-parallel: context @ w_o is a sum over all heads. This is the part over this rank's heads.
        partial = ops.row_parallel(xp, context, self.w_o)  # [T, D]
        return self.here.comm.all_reduce(partial)  # [T, D]

    def expected(self, x):
        """Compute attention with the oracle, for all heads, in float64: [T, D] -> [T, D]."""
        config, positions = self.here.source.config, range(len(x))
        frequencies = oracle_ops.rope_inverse_frequencies(self.here.source.fields())  # [d/2]
        heads = {}
        for part in "qkv":
            y = oracle_ops.linear(x, self.here.whole(f"{self.layer}.{part}_proj.weight"))  # [T, n d]
            heads[part] = y.reshape(len(x), -1, config.head_dim).transpose(1, 0, 2)  # [n, T, d]
        q, k = (oracle_ops.rope(heads[part], positions, frequencies) for part in "qk")  # [H, T, d], [K, T, d]
        mask = oracle_ops.causal_mask(positions, positions, config.sliding_window)  # [T, T]
        context = oracle_ops.attention(q, k, heads["v"], mask)  # [T, H d]
        return oracle_ops.linear(context, self.here.whole(f"{self.layer}.o_proj.weight"))  # [T, D]


def example(here):
    """Run GQA with the model's own shapes, then MHA."""
    show(here, "grouped-query attention")
    here.say("")
    show(replace(here, source=multi_head(here.source)), "multi-head attention")


def show(here, kind):
    """Explain, check and time one kind of attention."""
    config, plan, rank = here.source.config, here.source.plan, here.comm.rank
    attention, x = Attention(here, "model.layers.0"), here.hidden_states()  # x [T, D]
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    here.say(f"{kind} of {here.source.name}: {H} query heads on {K} KV heads, d = {d}")
    here.say(f"  1. x {common.shape(x)} @ w_qkv: each rank has the columns of its own heads")
    query, kv = common.span(plan.head_ranges[rank]), common.span(plan.kv_head_ranges[rank])
    here.say_each(f"query heads {query}, KV heads {kv}: w_qkv {common.shape(attention.w_qkv)}")
    h_r, k_r, w_o = attention.heads, attention.kv_heads, attention.w_o
    here.say(f"  2. RoPE: rank 0 rotates q [{h_r}, {len(x)}, {d}] and k [{k_r}, {len(x)}, {d}]")
    here.say(f"  3. softmax(q k^T / sqrt(d)) v, head by head; on rank 0: context [{len(x)}, {h_r * d}]")
    here.say("  4. context @ w_o: each rank has the rows of its own heads and computes a partial sum")
    here.say(f"     rank 0: [{len(x)}, {h_r * d}] @ {common.shape(w_o)}")
    here.say(f"     all-reduce: {common.shape(x)}, the same on every rank")
    # Four consecutive sums: q k v, scores, context, output. The longest has D terms.
    on_host = here.device.to_host(x)  # [T, D]
    here.check(attention(x), lambda: attention.expected(on_host), terms=config.hidden_size, products=4)
    here.time(lambda: attention(x))


def multi_head(source):
    """Return the same model with one KV head for each query head."""
    config = replace(source.config, num_key_value_heads=source.config.num_attention_heads)
    plan = make_plan(config, source.plan.tp)
    shapes = {name: shard.shape for name, shard in plan.tensors.items()}
    return replace(source, config=config, plan=plan, tensors=RandomWeights(shapes))


if __name__ == "__main__":
    common.run(example)
