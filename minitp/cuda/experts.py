"""The mixture of experts of a fused model; the counterpart of `moe`.

The pairs of a token and one of its experts are rows, sorted by expert. Up to 64 rows of an expert share each
load of its weights, and the weights of an expert that no token has chosen are not read. Few tokens launch

    linear.store      the router's logits
    route             each token's experts and their weights; the rows of each expert
    expert_swiglu     gate and up, SwiGLU
    expert_down       the output of each row, in float32
    expert_sum        the weighted sum of each token's outputs

and many tokens per expert go to cuBLAS instead of the two products, expert by expert.
"""

import numpy as np

from minitp.cuda.kernels.expert_linear import ExpertMatrices
from minitp.cuda.kernels.route import new_routing
from minitp.cuda.loader import padded, rows_of
from minitp.model import unrecorded

# With this many rows per expert or more, cuBLAS is faster, although the host must know each expert's rows.
CUBLAS_ROWS = 32


class FusedExperts:
    """The experts of all layers of a FusedModel.

    Parameters
    ----------
    model : FusedModel
    """

    def __init__(self, model):
        self.model = model
        cupy, layers = model.device.cupy, model.weights.layers

        def matrices(experts, name):
            return ExpertMatrices.of(cupy, [rows_of(model, getattr(expert, name)) for expert in experts])

        self.gate_up = [matrices(layer.experts, "w_gate_up") for layer in layers]  # [2 F_r, D] each
        self.down = [matrices(layer.experts, "w_down") for layer in layers]  # [D, F_r or more] each
        self.columns = layers[0].experts[0].w_down.shape[0]  # F_r

    def buffers(self, tokens):
        """Return the ExpertBuffers for the experts of T = `tokens` tokens, in all layers."""
        return ExpertBuffers(self, tokens)

    def decode(self, i, x, norm, seen, buffers, record):
        """Compute the outputs of layer i's experts for up to 64 tokens; `buffers.add_up` completes them.

        `x` [B, D] and `norm` are the input as in `Linear`, and `seen`, int32 [B], is 0 for padding.
        """
        m, b = self.model, buffers
        m.kernels.linear.store(x, rows_of(m, m.weights.layers[i].w_router), b.router, norm=norm)
        m.kernels.route(b.router, b.routing, seen)
        self._grouped(i, x, b, norm)
        b.record(i, record)

    def prefill(self, i, h, buffers, record):
        """Compute the outputs of layer i's experts for h [T, D]; `buffers.add_up` completes them.

        The rows of h must be followed by their padding in memory.
        """
        m, b = self.model, buffers
        m.device.xp.matmul_into(h, m.weights.layers[i].w_router, b.router)  # rounded by cuBLAS
        m.kernels.route(b.router, b.routing)
        if len(b.y) < CUBLAS_ROWS * b.router.shape[1]:
            self._grouped(i, h, b)
        else:
            self._one_by_one(i, h, b)
        b.record(i, record)

    def _grouped(self, i, x, buffers, norm=None):
        """Compute y with a launch for each product of all experts: x [T, D] -> y [T X, D]."""
        b, linear = buffers, self.model.kernels.expert_linear
        linear.swiglu(x, self.gate_up[i], b.routing, b.act, norm)
        linear.down(b.act, self.down[i], b.routing, b.y)

    def _one_by_one(self, i, x, buffers):
        """Compute y with cuBLAS, expert by expert; the host reads the number of rows of each."""
        m, b, experts = self.model, buffers, self.model.weights.layers[i].experts
        chosen = m.device.to_host(b.routing.chosen)  # [T, X]
        stops = np.cumsum(np.bincount(chosen.reshape(-1), minlength=len(experts))).tolist()  # [E]
        rows = [slice(*ends) for ends in zip([0, *stops], stops, strict=False)]  # of each expert
        x = x[b.routing.token_of]  # [T X, D]
        gate_up = m.device.cupy.empty((len(x), 2 * self.columns), x.dtype)  # [T X, 2 F_r]
        for at, expert in zip(rows, experts, strict=True):
            if at.stop > at.start:
                m.device.xp.matmul_into(x[at], expert.w_gate_up, gate_up[at])  # [n, 2 F_r]
        m.kernels.swiglu(gate_up, b.act)
        for at, expert in zip(rows, experts, strict=True):
            if at.stop > at.start:
                m.device.xp.matmul_into(b.act[at, : self.columns], expert.w_down, b.y[at])  # [n, D]


class ExpertBuffers:
    """The arrays of a pass over T tokens through the experts; all layers use the same ones.

    Parameters
    ----------
    experts : FusedExperts
    tokens : int
    """

    def __init__(self, experts, tokens):
        self._experts, model = experts, experts.model
        c, cupy, dtype = model.config, model.device.cupy, model.device.dtype
        rows = tokens * c.num_experts_per_tok  # T X
        self.router = cupy.zeros((tokens, c.num_local_experts), dtype)  # [T, E]
        self.routing = new_routing(cupy, tokens, c.num_local_experts, c.num_experts_per_tok)
        self.act = cupy.zeros(
            (rows, padded(experts.columns)), dtype
        )  # [T X, F_r or more]: padding stays zero
        self.y = cupy.empty((rows, c.hidden_size), np.float32)  # [T X, D]

    def add_up(self, out, adds=False):
        """Write the weighted sums of `y` to `out` [T, D]; with `adds`, add them to it."""
        self._experts.model.kernels.expert_sum(self.y, self.routing, out, adds)

    def record(self, i, record):
        """Record the steps of layer i that the explicit path has too."""
        if record is not unrecorded:
            s = record("mlp", i)
            s.router = self.router  # [T, E]
            s.experts = self.act[self.routing.position][:, :, : self._experts.columns]  # [T, X, F_r]
