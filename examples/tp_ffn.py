"""The feed-forward block of a layer on several ranks: split by columns, then by rows, with one all-reduce.

    x [T, D], the same everywhere      rank 0      rank 1      rank 2      rank 3
    gate, up = x @ w_gate_up        |  columns  |  columns  |  columns  |  columns  |  [T, 2 F_r] each
    act = silu(gate) * up           |  own      |  own      |  own      |  own      |  [T, F_r]
    act_r @ w_down                  |  rows     |  rows     |  rows     |  rows     |  a partial sum each
                                          +===========+== all-reduce =+===========+    the sum, everywhere

SwiGLU is an elementwise function, so a rank needs only the columns that it has computed itself, and its
rows of w_down are multiplied by exactly these columns. If the split were the other way around (rows first),
the ranks would need another all-reduce before SwiGLU, because a nonlinear function of a sum is not the sum of
the functions.

    mpirun -n 4 python examples/tp_ffn.py        (MODEL=tinyllama-1.1b for other shapes)

For comparison, an earlier implementation reported 744 ms for this block on four H100 NVLs, and 228 ms for
TinyLlama's (MODEL=tinyllama-1.1b).
"""

import common

from minitp import ops
from minitp.oracle import ops as oracle_ops


class FeedForward:
    """One rank's part of the feed-forward block of one layer; `layer` is "model.layers.0", for example."""

    def __init__(self, here, layer):
        self.here = here
        self.layer = f"{layer}.mlp"
        # [D, 2 F_r]: this rank's columns of w_gate, then the same columns of w_up
        self.w_gate_up = here.matrix(f"{self.layer}.gate_proj.weight", f"{self.layer}.up_proj.weight")
        self.w_down = here.matrix(f"{self.layer}.down_proj.weight")  # [F_r, D]: the corresponding rows

    def __call__(self, x):
        """Compute the block, [T, D] -> [T, D]; both are the same on every rank."""
        xp = self.here.device.xp
        # 1. Column-parallel: this rank has all of x, and its own columns of w_gate and w_up.
        gate_up = ops.column_parallel(xp, x, self.w_gate_up)  # [T, 2 F_r]
        # 2. Elementwise, so this rank's own columns are enough.
        act = ops.swiglu(xp, gate_up)  # [T, F_r]
        # 3. Row-parallel: act @ w_down is a sum over F columns. This is the part over this rank's columns.
        partial = ops.row_parallel(xp, act, self.w_down)  # [T, D]
        # 4. The only communication.
        return self.here.comm.all_reduce(partial)  # [T, D]

    def expected(self, x):
        """Compute the block with the oracle, with whole matrices in float64: [T, D] -> [T, D]."""
        gate = oracle_ops.linear(x, self.here.whole(f"{self.layer}.gate_proj.weight"))  # [T, F]
        up = oracle_ops.linear(x, self.here.whole(f"{self.layer}.up_proj.weight"))  # [T, F]
        act = oracle_ops.swiglu(gate, up)  # [T, F]
        return oracle_ops.linear(act, self.here.whole(f"{self.layer}.down_proj.weight"))  # [T, D]


def example(here):
    """Explain, check and time the block."""
    config, plan = here.source.config, here.source.plan
    ffn, x = FeedForward(here, "model.layers.0"), here.hidden_states()  # x [T, D]
    here.say(f"feed-forward block of {here.source.name}: D = {x.shape[1]}, F = {config.intermediate_size}")
    here.say(f"  1. x {common.shape(x)} @ w_gate_up: each rank has some of the F columns of both")
    columns = common.span(plan.ffn_ranges[here.comm.rank])
    here.say_each(
        f"columns {columns}: w_gate_up {common.shape(ffn.w_gate_up)}, w_down {common.shape(ffn.w_down)}"
    )
    here.say(f"  2. silu(gate) * up on rank 0: act [{len(x)}, {len(ffn.w_down)}]")
    here.say("  3. act @ w_down: each rank has the same rows of w_down and computes a partial sum")
    here.say(f"  4. the all-reduce adds them up: {common.shape(x)}, the same on every rank")
    # Two consecutive sums. The longer one has F terms.
    on_host = here.device.to_host(x)  # [T, D]
    here.check(ffn(x), lambda: ffn.expected(on_host), terms=config.intermediate_size, products=2)
    here.time(lambda: ffn(x))


if __name__ == "__main__":
    common.run(example)
