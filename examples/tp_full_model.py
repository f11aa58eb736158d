"""A whole model on several ranks, from token ids to logits.

    token ids [T]                      rank 0      rank 1      rank 2      rank 3
    embedding                       |  rows     |  rows     |  rows     |  rows     |  of the vocabulary
                                          +===========+== all-reduce =+===========+  x [T, D] everywhere
    LAYERS blocks                   |  a part of each block; two all-reduces each   |  tp_transformer_block.py
    norm                            |  all of x |  all of x |  all of x |  all of x |  the same on all ranks
    x @ lm_head                     |  columns  |  columns  |  columns  |  columns  |  of the vocabulary
                                          +===========+== all-gather =+===========+  logits [T, V] everywhere

The vocabulary is split too. A rank looks up the tokens whose rows it has and uses zeros for the others, so in
the sum over all ranks only one term of each row is not zero. At the end, every rank computes the logits of
its own part of the vocabulary. These are not terms of a sum: an all-gather concatenates them.

    LAYERS=2 mpirun -n 4 python examples/tp_full_model.py        (MODEL=tinyllama-1.1b for other shapes)
"""

import common
from tp_transformer_block import Block

from minitp import ops
from minitp.loading.weights import EMBED, FINAL_NORM, LM_HEAD, shard_nbytes
from minitp.oracle import Oracle


class FullModel:
    """One rank's part of a model."""

    def __init__(self, here):
        self.here = here
        plan = here.source.plan
        self.first_row = plan.vocab_ranges[here.comm.rank][0]
        self.widths = [stop - start for start, stop in plan.vocab_ranges]  # V_r of each rank
        self.embed = here.part(EMBED)  # [V_r, D]
        # A model with tied embeddings has no lm_head of its own.
        self.lm_head = here.matrix(LM_HEAD) if LM_HEAD in plan.tensors else self.embed.T  # [D, V_r]
        self.final_norm = here.part(FINAL_NORM)  # [D]
        self.blocks = [Block(here, f"model.layers.{i}") for i in range(plan.layers)]

    def __call__(self, token_ids):
        """Run a forward pass, int [T] -> logits float32 [T, V], the same on every rank."""
        xp, comm = self.here.device.xp, self.here.comm
        # 1. Vocab-parallel lookup: zero for the tokens of other ranks, so the sum is the embedding.
        rows = ops.embed_partial(xp, xp.asarray(token_ids), self.embed, self.first_row)  # [T, D]
        x = comm.all_reduce(rows)  # [T, D]
        # 2. The layers.
        for block in self.blocks:
            x = block(x)  # [T, D]
        # 3. The final norm, the same on all ranks.
        x = ops.rms_norm(xp, x, self.final_norm, self.here.source.config.rms_norm_eps)  # [T, D]
        # 4. Column-parallel logits, whose columns are then concatenated.
        logits_r = ops.logits_partial(xp, x, self.lm_head)  # [T, V_r]
        return comm.all_gather(logits_r, self.widths)  # [T, V]


def example(here):
    """Explain, check and time the model."""
    config, plan, rank = here.source.config, here.source.plan, here.comm.rank
    model, ids = FullModel(here), here.token_ids()  # int [T]
    here.say(f"{here.source.name}, {plan.layers} of its layers, on {len(ids)} random tokens")
    here.say("  1. embedding: each rank looks up the tokens whose rows it has")
    start, stop = plan.vocab_ranges[rank]
    found = sum(start <= token < stop for token in ids)
    here.say_each(f"rows {common.span((start, stop))}: {common.shape(model.embed)}, {found} of the tokens")
    here.say(f"     all-reduce: x [{len(ids)}, {config.hidden_size}]")
    here.say(f"  2. {plan.layers} x (attention, all-reduce, feed-forward block, all-reduce)")
    here.say("  3. norm, the same on all ranks")
    here.say("  4. x @ lm_head: each rank computes the logits of its own part of the vocabulary")
    here.say_each(f"lm_head {common.shape(model.lm_head)}, logits [{len(ids)}, {stop - start}]")
    here.say(f"     all-gather: logits [{len(ids)}, {config.vocab_size}]")
    here.say("weights held")
    here.say_each(f"{shard_nbytes(plan, rank, here.device) / 1e6:.1f} MB")
    reference = Oracle(here.source.fields(), here.whole, plan.layers)
    # Six consecutive sums per layer, and the logits. The longest has F terms.
    terms = config.intermediate_size
    here.check(model(ids), lambda: reference.logits(ids), terms, products=6 * plan.layers + 1)
    here.time(lambda: model(ids))


if __name__ == "__main__":
    common.run(example)
