"""What a model's passes cannot do without, and so what they take at least; the same for CPUs and GPUs.

cpu_limits    a pass takes at least as long as its bare matrix products, which are run
gpu_limits    a pass takes at least as long as reading its bytes, and as its products at cuBLAS's rate
"""

ALL_REDUCE_BYTES = (4, 4 << 10, 64 << 10, 1 << 20)


class Roofline:
    """What a model reads and multiplies, and the limit that follows from it.

    A pass is a pair (parts, logit_rows): `parts` are (tokens of this pass, keys that they read) of each
    sequence, and `logit_rows` positions get logits.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model):
        self.model, self.dtype = model, model.device.dtype
        layers, self.lm_head = model.weights.layers, model.weights.lm_head
        self.layers = [(w.w_qkv, w.w_o, w.w_gate_up, w.w_down) for w in layers]

    def measure(self, prompt_tokens):
        """Of all ranks together, at the same time: a dict for JSON. Comes before all others."""
        raise NotImplementedError

    def seconds(self, passes):
        """What a list of passes takes at least, one after another; all ranks call it."""
        raise NotImplementedError

    def collective_shares(self, runs):
        """Of each rank's time for a token, the share that all-reduces take; of all `runs`."""
        raise NotImplementedError

    def weight_elements(self, rows=1, logit_rows=1):
        """That this rank multiplies by, each counted as often as it has rows."""
        layers = sum(m.size for matrices in self.layers for m in matrices)
        return rows * layers + logit_rows * self.lm_head.size

    def cache_bytes(self, keys):
        """That a token reads in the cache of this rank."""
        return keys * self.model.new_pool(1, 1).nbytes


def total_elements(comm, limits, rows=1):
    """Elements that a pass multiplies `rows` rows by, and one row for logits, on all ranks together."""
    return sum(comm.allgather_object(limits.weight_elements(rows)))


def token_bytes(comm, limits, keys):
    """Weights and keys and values that a token reads on all ranks together."""
    return total_elements(comm, limits) * limits.dtype.itemsize + sum(
        comm.allgather_object(limits.cache_bytes(keys))
    )
