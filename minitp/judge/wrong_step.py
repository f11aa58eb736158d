"""A wrong step, with the inputs and weights from which its mistakes are computed."""

import numpy as np


class WrongStep:
    """A wrong step, with access to its inputs and weights.

    Attributes
    ----------
    reference : Oracle
    block : str
        "attn", "mlp" or "" outside the layers.
    step : str
        The step's name within its block.
    """

    def __init__(self, case, pass_, layer, step):
        self.case, self.pass_, self.layer = case, pass_, layer
        self.reference = case.reference
        self.block, _, self.step = step.rpartition(".")

    def s(self, step, block=None):
        """Return a recorded step of this layer in float64, or the value that follows from its inputs."""
        prefix = self.block if block is None else block
        return self.of_layer(self.layer, f"{prefix}.{step}" if prefix else step)

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

    def w(self, name, layer=None):
        """Return a tensor of this layer, or of another one, in float64; None if the model has none."""
        layer = self.layer if layer is None else layer
        tensor = self.case.weights.get(name if layer is None else f"model.layers.{layer}.{name}")
        return None if tensor is None else tensor.astype(np.float64)

    def right(self):
        """Return the expected value of this step, computed again."""
        replay, parts = self.case.replay, {"attn": "attention", "mlp": "mlp"}
        if self.block:
            steps = getattr(replay, parts[self.block])(self.layer, self.pass_)
        else:
            steps = [*replay.before(self.pass_), *replay.after(self.pass_)]
        name = f"{self.block}.{self.step}" if self.block else self.step
        return next((expected.value for step, expected, _ in steps if step == name), None)

    def stream(self):
        """Return the residual stream before this block."""
        if self.block == "mlp":
            return self.s("residual", "attn")  # [T, D]
        if self.layer == 0:
            return self.outside("embed")  # [T, D]
        return self.of_layer(self.layer - 1, "mlp.residual")  # [T, D]

    @property
    def positions(self):
        return self.outside("positions").astype(int)  # [T]

    @property
    def other_layers(self):
        return [i for i in range(self.case.plan.layers) if i != self.layer]
