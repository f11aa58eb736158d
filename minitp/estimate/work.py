"""The work of a forward pass on one rank, counted from a model's config and its sharding plan."""

import math
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
EMBED, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers."


@dataclass(frozen=True)
class Pass:
    """A forward pass of `sequences`, each with `past` cached and `tokens` new tokens; the last has logits."""

    sequences: int
    tokens: int
    past: int

    def keys(self, window):
        """Return the number of positions of one sequence that are read, in the sliding window if any."""
        return min(self.past, (window or math.inf) - 1) + self.tokens

    def pairs(self, window):
        """Return the number of (query, key) pairs of one sequence, with causal attention."""
        window = window or self.past + self.tokens
        whole = min(self.tokens, max(0, window - self.past))  # tokens that attend to all earlier ones
        return whole * self.past + whole * (whole + 1) // 2 + (self.tokens - whole) * window


def elements(plan, rank):
    """Return the number of elements of each tensor on a rank.

    All layers have equal shapes, so they are counted together, under the names of layer 0.
    """
    counts = {}
    for name, shard in plan.tensors.items():
        if not name.startswith(LAYER):
            counts[name] = math.prod(shard.shape_on(rank))
        elif name.startswith(f"{LAYER}0."):
            counts[name] = math.prod(shard.shape_on(rank)) * plan.layers
    return counts


def weight_bytes(plan, rank, dtype):
    """Return the bytes of a rank's weights."""
    return sum(elements(plan, rank).values()) * ITEM_BYTES[dtype]


def cache_bytes(config, plan, rank, dtype):
    """Return the KV-cache bytes of one token on a rank: keys and values of its KV heads in all layers."""
    start, stop = plan.kv_head_ranges[rank]
    return 2 * config.num_hidden_layers * (stop - start) * config.head_dim * ITEM_BYTES[dtype]


def rank_work(config, plan, rank, work, dtype):
    """Return a pass's work on one rank: (bytes read, FLOPs) of the projections, and of attention.

    An untied embedding table is not counted, because a pass reads only the rows of its tokens.
    """
    counts = elements(plan, rank)
    head = counts[LM_HEAD if LM_HEAD in counts else EMBED]
    layers = {name: count for name, count in counts.items() if name.startswith(LAYER)}
    chosen, touched = expert_shares(config, work.sequences * work.tokens)
    experts = sum(count for name, count in layers.items() if ".experts." in name)
    read = (sum(layers.values()) - (1 - touched) * experts + counts[FINAL_NORM] + head) * ITEM_BYTES[dtype]
    products = sum(count for name, count in layers.items() if len(plan.tensors[name].shape) == 2)
    products -= (1 - chosen) * experts
    flops = 2 * work.sequences * (work.tokens * products + head)
    cached = sum(map(work.keys, config.windows)) * cache_bytes(config, plan, rank, dtype)
    cached *= work.sequences / config.num_hidden_layers
    start, stop = plan.head_ranges[rank]
    pairs = work.sequences * sum(map(work.pairs, config.windows))
    attention = 2 * 2 * pairs * (stop - start) * config.head_dim  # d for the score, d for the value
    return (read, flops), (cached, attention)


def expert_shares(config, tokens):
    """Return the fractions of the experts that one token uses and that `tokens` tokens use together.

    Tokens are assumed to choose at random and independently of each other.
    """
    if not config.num_local_experts:
        return 1.0, 1.0
    chosen = config.num_experts_per_tok / config.num_local_experts
    return chosen, 1 - (1 - chosen) ** tokens
