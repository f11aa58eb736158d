"""The bandwidth and matrix rate of this machine's cores, measured in about a second for `minitp plan`."""

import dataclasses
import math

import numpy as np

from minitp.bench.cpu_roofline import BareProducts, bandwidth, matrix_rate
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.estimate import hardware
from minitp.estimate.work import ITEM_BYTES, LAYER, elements
from minitp.loading.weights import Loader
from minitp.model import Model
from minitp.shard import make_plan
from minitp.util.environment import cores, memory

LEAST_BYTES = 256e6  # minimum size of the weights, larger than the caches; a small model may have less
MOST_BYTES = 1e9  # maximum size of one layer's weights
ROWS = 256  # rows of the products that measure arithmetic


class ConstantWeights:
    """A substitute for a Checkpoint with weights that cost nothing to read."""

    def read(self, name, index):
        """Return equal float32 numbers; products of them are no faster than others."""
        return np.full([s.stop - s.start for s in index], 0.01, np.float32)


def measure_cpu(config, dtype):
    """Return the Hardware of this machine, measured with the shapes of a model.

    A thread on each core computes the products of a rank. BLAS must use a single thread; otherwise there
    would be more threads than cores.

    Parameters
    ----------
    config : Config
    dtype : str
        Dtype of the weights.
    """
    ranks = min(cores(), config.num_attention_heads)
    part, plan = sample(config, dtype, ranks)
    device = open_device(dtype)

    def rank(comm):
        weights = Loader(plan, comm.shard_rank, ConstantWeights(), device).load()
        products = BareProducts(Model(part, plan, weights, comm, device))
        return bandwidth(comm, products), matrix_rate(comm, products, ROWS)

    bytes_per_s, flops_per_s = run_threads(ranks, rank)[0]
    flops_per_s *= cores() / ranks  # a model with fewer heads than cores still uses all cores at any TP
    return hardware.cpu(cores(), memory(), bytes_per_s, {dtype: flops_per_s})


def sample(config, dtype, ranks):
    """Return (Config, Plan) of a small part of the model, of which the first `ranks` ranks are run.

    The part has some of the model's layers and almost no vocabulary. If a single layer is too large, the plan
    is for a larger TP.
    """
    layer = dataclasses.replace(config, num_hidden_layers=1)
    tp = ranks
    while layer_bytes(layer, dtype, tp, ranks) > MOST_BYTES and 2 * tp <= config.num_attention_heads:
        tp *= 2
    layers = math.ceil(LEAST_BYTES / layer_bytes(layer, dtype, tp, ranks))
    layers = min(layers, config.num_hidden_layers)
    part = dataclasses.replace(config, num_hidden_layers=layers, vocab_size=tp)
    return part, make_plan(part, tp)


def layer_bytes(config, dtype, tp, ranks):
    """Return the bytes of the layers on the first `ranks` ranks of `tp`."""
    plan = make_plan(dataclasses.replace(config, vocab_size=tp), tp)
    counts = (elements(plan, rank) for rank in range(ranks))
    return sum(n for each in counts for name, n in each.items() if name.startswith(LAYER)) * ITEM_BYTES[dtype]
