"""Two replica groups of ranks: each group has a whole block, and an all-reduce over [[0, 1], [2, 3]].

    group 0:  x [T, D]                         group 1:  another x [T, D]
    rank 0            rank 1                   rank 2            rank 3
    |  columns, rows  |  columns, rows  |      |  columns, rows  |  columns, rows  |   of the same weights
    +=========== all-reduce ============+      +=========== all-reduce ============+

Tensor parallelism divides the work for one input, and every layer waits for its sums. Replicas (data
parallelism) divide the inputs: a group has all weights, so it needs twice the memory of a split over four
ranks, but it never waits for the other group. `minitp serve --replicas 2` sends each request to one group.

    mpirun -n 4 python examples/tp_replica_groups.py        (MODEL=tinyllama-1.1b for other shapes)
"""

import common
from tp_ffn import FeedForward

GROUPS = 2


def example(here):
    """Explain, check and time the block in both groups."""
    comm, everyone = here.comm, here.comm.all_groups
    group = everyone.rank // comm.size
    ffn, x = FeedForward(here, "model.layers.0"), here.hidden_states(seed=group)  # x [T, D]
    here.say(f"feed-forward block of {here.source.name} in {GROUPS} groups of {common.size(comm)}")
    here.say("  1. each group has its own x, and all columns and rows of the weights")
    columns = common.span(here.source.plan.ffn_ranges[comm.rank])
    here.say_each(f"group {group}, rank {comm.rank} there: columns {columns}, x[0, 0] = {x[0, 0]:.3f}")
    y = ffn(x)  # [T, D]
    groups = [list(range(g * comm.size, (g + 1) * comm.size)) for g in range(GROUPS)]
    here.say(f"  2. the all-reduce over {groups}: each rank gets the sum of its own group")
    here.say_each(f"y[0, 0] = {y[0, 0]:.6f}")
    here.check(y, lambda: ffn.expected(x), terms=here.source.config.intermediate_size, products=2)
    here.time(lambda: ffn(x))


if __name__ == "__main__":
    common.run(example, GROUPS)
