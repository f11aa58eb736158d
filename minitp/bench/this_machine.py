"""This machine as an `estimate.hardware.Hardware`: what its cores read and compute, measured in a second."""

import dataclasses
import math

import numpy as np

from minitp.bench.cpu_roofline import BareProducts, bandwidth, matrix_rate
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.estimate import hardware
from minitp.estimate.estimate import ITEM_BYTES, LAYER, elements
from minitp.loading.weights import Loader
from minitp.model import Model
from minitp.shard import make_plan
from minitp.util.environment import cores, memory

LEAST_BYTES = 256e6  # of weights: beyond the caches, unless the model itself is smaller
MOST_BYTES = 1e9
ROWS = 256  # of the products that measure arithmetic


class Constant:
    """Stands where a Checkpoint stands: weights that cost nothing to read."""

    def read(self, name, index):
        """float32, all the same: products take no less time for it."""
        return np.full([s.stop - s.start for s in index], 0.01, np.float32)


def measure_cpu(config, dtype):
    """The Hardware of this machine, for models of this shape.

    A thread on each core makes the products of a rank, in the model's own shapes. BLAS must not use threads
    of its own, or they come on top.

    Parameters
    ----------
    config : Config
    dtype : str
        That of the weights.
    """
    ranks = min(cores(), config.num_attention_heads)
    part, plan = sample(config, dtype, ranks)
    device = open_device(dtype)

    def rank(comm):
        weights = Loader(plan, comm.shard_rank, Constant(), device).load()
        products = BareProducts(Model(part, plan, weights, comm, device))
        return bandwidth(comm, products), matrix_rate(comm, products, ROWS)

    bytes_per_s, flops_per_s = run_threads(ranks, rank)[0]
    flops_per_s *= cores() / ranks  # of a model with fewer heads than cores; it uses them all at any TP
    return hardware.cpu(cores(), memory(), bytes_per_s, {dtype: flops_per_s})


def sample(config, dtype, ranks):
    """A part of the model that is quickly made: (Config, Plan), of whose ranks the first `ranks` are to run.

    Some of its layers and no vocabulary; if a single layer is too much, the shares of ranks of a larger TP.
    """
    one = dataclasses.replace(config, num_hidden_layers=1)
    shares = ranks
    while held(one, dtype, shares, ranks) > MOST_BYTES and 2 * shares <= config.num_attention_heads:
        shares *= 2
    layers = math.ceil(LEAST_BYTES / held(one, dtype, shares, ranks))
    layers = min(layers, config.num_hidden_layers)
    part = dataclasses.replace(config, num_hidden_layers=layers, vocab_size=shares)
    return part, make_plan(part, shares)


def held(config, dtype, shares, ranks):
    """Bytes of the layers on the first `ranks` ranks of TP=`shares`."""
    plan = make_plan(dataclasses.replace(config, vocab_size=shares), shares)
    counts = (elements(plan, rank) for rank in range(ranks))
    return sum(n for each in counts for name, n in each.items() if name.startswith(LAYER)) * ITEM_BYTES[dtype]
