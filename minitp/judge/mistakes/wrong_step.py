"""A wrong step, with the inputs and weights from which its mistakes are computed."""

import numpy as np

from minitp.trace.names import full_name


class WrongStep:
    """A wrong step on a rank, with access to its inputs and weights.

    Attributes
    ----------
    case : Case
        The steps of the rank.
    cases : list of Case
        Those of all ranks.
    reference : Oracle
    block : str
        "attn", "mlp" or "" outside the layers.
    step : str
        The step's name within its block.
    """

    def __init__(self, cases, rank, pass_, layer, step):
        self.case, self.cases, self.pass_, self.layer = cases[rank], cases, pass_, layer
        self.reference = self.case.reference
        self.block, _, self.step = step.rpartition(".")

    def of_step(self, step):
        """Return the WrongStep of another step of this block."""
        return WrongStep(self.cases, self.rank, self.pass_, self.layer, f"{self.block}.{step}")

    def of_block(self, block):
        """Return this step in another block."""
        return WrongStep(self.cases, self.rank, self.pass_, self.layer, f"{block}.{self.step}")

    def s(self, step, block=None):
        """Return a recorded step of this layer in float64, or the value that follows from its inputs."""
        prefix = self.block if block is None else block
        return self.of_layer(self.layer, f"{prefix}.{step}" if prefix else step)

    def is_recorded(self, step):
        """Return whether a step of this block was recorded."""
        return full_name(self.pass_.name, self.layer, f"{self.block}.{step}") in self.case.steps

    def outside(self, step):
        """Return a step outside the layers, as `s` does."""
        return self.of_layer(None, step)

    def of_layer(self, layer, step):
        """Return a step of any layer, as `s` does."""
        array = self.case.recorded(self.pass_.name, layer, step)
        return np.asarray(getattr(array, "value", array), np.float64)

    def last_stream(self):
        """Return the residual stream after the last layer."""
        return self.of_layer(self.case.plan.layers - 1, "mlp.residual")  # [T, D]

    def w(self, name, layer=None, rank=None):
        """Return a rank's part of a tensor of this layer in float64; None if the model has none.

        The rank and the layer may be others than those of the step.
        """
        name, weights = self.tensor_name(name, layer), self.case.weights
        if name not in weights.plan.tensors:
            return None
        tensor = weights[name] if rank is None else weights.of_rank(name, rank)
        return tensor.astype(np.float64)

    def whole(self, name):
        """Return a whole tensor of this layer in float64; None if the model has none."""
        name, weights = self.tensor_name(name), self.case.weights
        return weights.whole(name).astype(np.float64) if name in weights.plan.tensors else None

    def outside_w(self, name):
        """Return a tensor outside the layers in float64."""
        return self.case.weights[name].astype(np.float64)

    def tensor_name(self, name, layer=None):
        """Return the checkpoint's name of a tensor of this layer or another one, or outside the layers."""
        layer = self.layer if layer is None else layer
        return name if layer is None else f"model.layers.{layer}.{name}"

    def of_ranks(self, step, block=None):
        """Return a recorded step of this layer in float64 from each rank, as `s` does."""
        return [
            WrongStep(self.cases, rank, self.pass_, self.layer, f"{self.block}.{self.step}").s(step, block)
            for rank in range(len(self.cases))
        ]

    @property
    def rank(self):
        return self.case.rank

    @property
    def other_ranks(self):
        return [rank for rank in range(len(self.cases)) if rank != self.rank]

    def right(self):
        """Return the expected value of this step, if it is the one that is blamed."""
        step = f"{self.block}.{self.step}" if self.block else self.step
        return self.case.right[full_name(self.pass_.name, self.layer, step)]

    def stream(self):
        """Return the residual stream before this block."""
        if self.block == "mlp":
            return self.s("residual", "attn")  # [T, D]
        return self.layer_input()

    def layer_input(self, layer=None):
        """Return the residual stream before a layer, by default this one."""
        layer = self.layer if layer is None else layer
        return self.of_layer(layer - 1, "mlp.residual") if layer else self.outside("embed")  # [T, D]

    @property
    def positions(self):
        return self.outside("positions").astype(int)  # [T]

    @property
    def other_layers(self):
        return [i for i in range(self.case.plan.layers) if i != self.layer]
