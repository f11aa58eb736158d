"""The reads and products that a model's forward passes need, and the resulting limit on speed.

cpu_roofline    a pass takes at least as long as its bare matrix products, which are run and timed
gpu_roofline    a pass takes at least as long as reading its bytes, and as its products at cuBLAS's rate
"""

from itertools import pairwise

from minitp.estimate.work import expert_shares

ALL_REDUCE_BYTES = (4, 4 << 10, 64 << 10, 1 << 20)


class Roofline:
    """The limit on a model's speed that results from the bytes it reads and the products it computes.

    A pass is a pair (parts, logit_rows): `parts` has (tokens of this pass, keys that they read) for each
    sequence, and `logit_rows` is the number of positions that get logits.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model):
        self.model, self.dtype = model, model.device.dtype
        self.layers, self.lm_head = model.weights.layers, model.weights.lm_head

    def measure(self, prompt_tokens):
        """Measure all ranks at the same time; return a dict for JSON. Call this before the other methods."""
        raise NotImplementedError

    def seconds(self, passes):
        """Return the minimum time of a list of passes, one after another; all ranks call this."""
        raise NotImplementedError

    def collective_shares(self, rounds):
        """Return the share of a token's time that each rank spends in all-reduces, over all `rounds`."""
        raise NotImplementedError

    def products(self, layer, rows):
        """Return the (rows, matrix) of each product of a layer in a pass over `rows` tokens.

        In a mixture of experts, tokens are assumed to choose experts at random, so that all chosen experts
        get about the same number of rows.
        """
        if not layer.experts:
            return [(rows, w) for w in (layer.w_qkv, layer.w_o, layer.w_gate_up, layer.w_down)]
        _, touched = expert_shares(self.model.config, rows)
        pairs = rows * self.model.config.num_experts_per_tok  # of a token and an expert
        chosen = layer.experts[: min(pairs, round(touched * len(layer.experts)))]
        at = [pairs * n // len(chosen) for n in range(len(chosen) + 1)] if chosen else [0]
        products = [(rows, w) for w in (layer.w_qkv, layer.w_o, layer.w_router)]
        for expert, (start, stop) in zip(chosen, pairwise(at), strict=True):
            products += [(stop - start, expert.w_gate_up), (stop - start, expert.w_down)]
        return products

    def multiplied(self, rows=1, logit_rows=1):
        """Return the number of weight elements that this rank multiplies, each counted once per row."""
        layers = sum(n * w.size for layer in self.layers for n, w in self.products(layer, rows))
        return layers + logit_rows * self.lm_head.size

    def read(self, rows=1, logit_rows=1):
        """Return the number of weight elements that this rank must read, each once."""
        layers = sum(w.size for layer in self.layers for _, w in self.products(layer, rows))
        return layers + min(logit_rows, 1) * self.lm_head.size

    def cache_bytes(self, keys):
        """Return the bytes of `keys` positions in this rank's cache."""
        return keys * self.model.new_pool(1, 1).nbytes


def total_elements(comm, roofline, rows=1):
    """Return the number of weight elements that all ranks multiply for `rows` rows and one of logits."""
    return sum(comm.allgather_object(roofline.multiplied(rows)))


def token_bytes(comm, roofline, keys):
    """Return the bytes of weights, keys and values that all ranks together read for a token."""
    return total_elements(comm, roofline) * roofline.dtype.itemsize + sum(
        comm.allgather_object(roofline.cache_bytes(keys))
    )
