"""The common mistakes in a mixture: an expert's weights, the choice of the experts, and their shares.

The output of a mixture is the sum of its experts' outputs, times their shares. So a mistake in one expert is
found in that sum: it changes only the tokens that use the expert.
"""

import numpy as np

from minitp.judge.mistakes.ranks import of_joined
from minitp.judge.mistakes.shares import dispatch_mistakes, share_mistakes
from minitp.oracle import ops

MOST = 16  # in a larger mixture, an expert is not compared with all others


def expert_mistakes(wrong):
    """Try mistakes in the output of a mixture."""
    mixture = Mixture(wrong)
    yield from share_mistakes(mixture)
    yield from dispatch_mistakes(mixture)
    yield from order_mistakes(mixture)
    yield from activation_mistakes(mixture)
    suspects = mixture.suspects()
    for expert in suspects:
        yield from one_expert_mistakes(mixture, expert)


class Mixture:
    """A mixture of experts in a layer, with the inputs that the engine really had.

    Attributes
    ----------
    x : float64 array [T, D]
    router : float64 array [T, E]
        The router's logits.
    shares : float64 array [T, E]
        The right share of each expert, 0 for most.
    """

    def __init__(self, wrong):
        self.wrong, self.reference = wrong, wrong.reference
        self.x, self.router = wrong.s("norm"), wrong.s("router")  # [T, D], [T, E]
        self.count, self.normalized = self.reference.experts_per_token, self.reference.normalizes_shares
        self.shares = ops.route(self.router, self.count, self.normalized)  # [T, E]
        self._outputs = {}

    @property
    def experts(self):
        return range(self.router.shape[1])

    def weights(self, expert, layer=None):
        """Return gate, up and down of an expert, [out, in] each."""
        block = f"{self.reference.expert_block}.experts.{expert}"
        return [self.wrong.w(f"{block}.{part}.weight", layer) for part in self.reference.expert_parts]

    def output(self, expert):
        """Return the right output of an expert for all tokens, [T, D]."""
        if expert not in self._outputs:
            self._outputs[expert] = self.output_with(*self.weights(expert))
        return self._outputs[expert]

    def output_of(self, x, expert):
        """Return the output of an expert for other inputs: [n, D] -> [n, D]."""
        gate, up, down = self.weights(expert)
        return ops.linear(ops.swiglu(ops.linear(x, gate), ops.linear(x, up)), down)

    def output_with(self, gate, up, down, activate=ops.swiglu):
        """Return the output of an expert with these weights for all tokens, [T, D]."""
        return ops.linear(activate(ops.linear(self.x, gate), ops.linear(self.x, up)), down)

    def of_joined(self, expert):
        """Return gate and up of an expert, [F_r, D] each, if they are split over the ranks as one matrix."""
        block, (gate, up, _) = f"{self.reference.expert_block}.experts.{expert}", self.reference.expert_parts
        return [of_joined(self.wrong, f"{block}.{part}", "weight") for part in (gate, up)]

    def total(self, shares, output=None):
        """Return the sum of the experts' outputs with some shares [T, E]: [T, D].

        `output` is a function that gives the output of an expert, by default the right one.
        """
        found = np.zeros_like(self.x)  # [T, D]
        for expert in self.experts:
            if shares[:, expert].any():
                found += shares[:, expert, None] * (output or self.output)(expert)
        return found

    def suspects(self):
        """Return the experts that all wrong tokens use, one of which may be the only wrong one."""
        found, expected = self.wrong.s(self.wrong.step), self.wrong.right()  # [T, D] each
        if found.shape != expected.shape:
            return []
        errors, sizes = (np.linalg.norm(each, axis=-1) for each in (found - expected, expected))  # [T] each
        wrong = errors > 1e-2 * sizes  # [T]
        return [e for e in self.experts if wrong.any() and (self.shares[wrong, e] > 0).all()]


def order_mistakes(mixture):
    """Try the weights of the experts in another order."""
    last = len(mixture.experts) - 1
    for text, order in (
        ("the experts are in the reverse order", lambda e: last - e),
        ("each expert has the weights of the next one", lambda e: (e + 1) % (last + 1)),
        ("each expert has the weights of the one before", lambda e: (e - 1) % (last + 1)),
    ):
        yield text, mixture.total(mixture.shares, lambda e, order=order: mixture.output(order(e)))
    for layer in mixture.wrong.other_layers:
        yield (
            f"the experts are those of layer {layer}",
            mixture.total(mixture.shares, lambda e, i=layer: mixture.output_with(*mixture.weights(e, i))),
        )


def activation_mistakes(mixture):
    """Try mistakes that all experts have in common."""

    def all_with(activate):
        return mixture.total(mixture.shares, lambda e: mixture.output_with(*mixture.weights(e), activate))

    yield "gate and up are exchanged in all experts", all_with(lambda gate, up: ops.swiglu(up, gate))
    yield "gelu in place of silu in all experts", all_with(ops.geglu)
    yield "up is left out in all experts", all_with(lambda gate, up: ops.swiglu(gate, np.ones_like(up)))
    yield "no activation in all experts: gate * up", all_with(np.multiply)
    if mixture.wrong.other_ranks and mixture.of_joined(0)[0] is not None:
        text = "gate and up of each expert are joined and split as a whole, not part by part"

        def output(expert):
            _, _, down = mixture.weights(expert)
            return mixture.output_with(*mixture.of_joined(expert), down)

        yield text, mixture.total(mixture.shares, output)


def one_expert_mistakes(mixture, expert):
    """Try mistakes in a single expert."""
    rest = mixture.total(np.where(np.arange(mixture.shares.shape[1]) == expert, 0, mixture.shares))  # [T, D]
    share = mixture.shares[:, expert, None]  # [T, 1]

    def with_output(output):
        return rest + share * output  # [T, D]

    yield f"expert {expert} is left out", rest
    yield f"expert {expert} is counted twice", with_output(2 * mixture.output(expert))
    gate, up, down = mixture.weights(expert)
    yield f"gate and up of expert {expert} are exchanged", with_output(mixture.output_with(up, gate, down))
    for layer in mixture.wrong.other_layers:
        output = mixture.output_with(*mixture.weights(expert, layer))
        yield f"expert {expert} is that of layer {layer}", with_output(output)
    for other in mixture.experts if len(mixture.experts) <= MOST else ():
        if other == expert:
            continue
        yield f"expert {expert} has the weights of expert {other}", with_output(mixture.output(other))
        for i, part in enumerate(("gate", "up", "down")):
            mixed = [gate, up, down]
            mixed[i] = mixture.weights(other)[i]
            text = f"expert {expert} has the {part} matrix of expert {other}"
            yield text, with_output(mixture.output_with(*mixed))
