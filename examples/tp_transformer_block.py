"""A whole layer on several ranks: attention, the feed-forward block, and two all-reduces.

    x [T, D], the same everywhere      rank 0      rank 1      rank 2      rank 3
    norm                            |  all of x |  all of x |  all of x |  all of x |  the same on all ranks
    attention                       |  heads    |  heads    |  heads    |  heads    |  see tp_attention.py
                                          +===========+== all-reduce =+===========+
    x = x + attention               |  all of x |  all of x |  all of x |  all of x |  the same on all ranks
    norm                            |  all of x |  all of x |  all of x |  all of x |
    feed-forward block              |  columns  |  columns  |  columns  |  columns  |  see tp_ffn.py
                                          +===========+== all-reduce =+===========+
    x = x + feed-forward block      |  all of x |  all of x |  all of x |  all of x |  the same on all ranks

The residual stream `x` is bit for bit the same on every rank, because an all-reduce gives all ranks the same
sum. So norms and additions need no communication: every rank computes all of them. Each costs about T D
operations, compared with T D F / ranks for a product, which is less than the communication to split them.

    mpirun -n 4 python examples/tp_transformer_block.py        (MODEL=tinyllama-1.1b for other shapes)
"""

import common
from tp_attention import Attention
from tp_ffn import FeedForward

from minitp import ops
from minitp.oracle import ops as oracle_ops


class Block:
    """One rank's part of one layer; `layer` is "model.layers.0", for example."""

    def __init__(self, here, layer):
        self.here = here
        self.norms = [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
        self.attention_norm, self.ffn_norm = (here.part(name) for name in self.norms)  # [D] each, not split
        self.attention = Attention(here, layer)
        self.ffn = FeedForward(here, layer)

    def __call__(self, x):
        """Compute the layer, [T, D] -> [T, D]; both are the same on every rank."""
        xp, eps = self.here.device.xp, self.here.source.config.rms_norm_eps
        # 1. and 2.
        h = ops.rms_norm(xp, x, self.attention_norm, eps)  # [T, D]
        x = x + self.attention(h)  # [T, D]; includes the first all-reduce
        # 3. and 4.
        h = ops.rms_norm(xp, x, self.ffn_norm, eps)  # [T, D]
        return x + self.ffn(h)  # [T, D]; includes the second all-reduce

    def expected(self, x):
        """Compute the layer with the oracle, in float64: [T, D] -> [T, D]."""
        eps = self.here.source.config.rms_norm_eps
        attention_norm, ffn_norm = (self.here.whole(name) for name in self.norms)  # [D] each
        x = x + self.attention.expected(oracle_ops.rms_norm(x, attention_norm, eps))  # [T, D]
        return x + self.ffn.expected(oracle_ops.rms_norm(x, ffn_norm, eps))  # [T, D]


def example(here):
    """Explain, check and time the layer."""
    block, x = Block(here, "model.layers.0"), here.hidden_states()  # x [T, D]
    attention, ffn = block.attention, block.ffn
    matrices = [attention.w_qkv, attention.w_o, ffn.w_gate_up, ffn.w_down]
    nbytes = sum(w.nbytes for w in [*matrices, block.attention_norm, block.ffn_norm])
    here.say(f"one layer of {here.source.name}: w_qkv, w_o, w_gate_up, w_down, and two norms")
    here.say_each(f"{', '.join(map(common.shape, matrices))}: {nbytes / 1e6:.1f} MB")
    here.say(f"  1. norm of all {common.shape(x)}, the same on all ranks")
    here.say("  2. attention over the rank's own heads; all-reduce; x = x + the sum, the same on all ranks")
    here.say("  3. norm again")
    here.say("  4. feed-forward block over the rank's own columns; all-reduce; x = x + the sum")
    on_host = here.device.to_host(x)  # [T, D]
    # Six consecutive sums: q k v, scores, context, output, gate and up, down. The longest has F terms.
    terms = here.source.config.intermediate_size
    here.check(block(x), lambda: block.expected(on_host), terms, products=6)
    here.time(lambda: block(x))


if __name__ == "__main__":
    common.run(example)
