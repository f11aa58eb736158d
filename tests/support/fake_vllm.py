"""A Llama with the modules and signatures of vLLM, in NumPy and without PyTorch.

The tokens lie on the first axis. Projections return (output, bias), and a norm that gets a residual stream
returns the norm of the sum and the sum. The mathematics is that of the oracle.
"""

from types import SimpleNamespace

import numpy as np
from fake_transformers import FakeModule, FakeTensor
from safetensors.numpy import load_file

from minitp.oracle import ops
from minitp.util.files import read_json


def tensor(array):
    """Return a FakeTensor in float32."""
    return FakeTensor(array.astype(np.float32))


class VllmLinear(FakeModule):
    """A projection: [T, in] -> [T, out], None."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = np.concatenate(weights)  # [out, in]

    def forward(self, x):
        return tensor(ops.linear(x.array, self.weight)), None


class VllmNorm(FakeModule):
    """A norm that adds its input to the residual stream first: [T, D], [T, D] -> [T, D], [T, D]."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x, residual=None):
        if residual is None:
            return tensor(ops.rms_norm(x.array, self.weight, self.eps))
        residual.array += x.array  # in place, as in vLLM's kernels
        return tensor(ops.rms_norm(residual.array, self.weight, self.eps)), residual


class VllmAttn(FakeModule):
    """Attention with a paged cache: q [T, H d], k and v [T, K d] -> [T, H d]."""

    def __init__(self, head_dim):
        super().__init__()
        self.head_dim, self.cache = head_dim, []

    def forward(self, q, k, v):
        q, *new = (x.array.reshape(len(x.array), -1, self.head_dim).transpose(1, 0, 2) for x in (q, k, v))
        self.cache.append(new)
        k, v = (np.concatenate(parts, axis=1) for parts in zip(*self.cache, strict=True))  # [K, S, d] each
        k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))  # [H, S, d] each
        count, stop = q.shape[1], k.shape[1]
        mask = ops.causal_mask(np.arange(stop - count, stop), np.arange(stop), None)  # [T, S]
        probs = ops.softmax(ops.scores(q, k, mask, np.sqrt(self.head_dim)))  # [H, T, S]
        return tensor(ops.context(probs, v))


class VllmAttention(FakeModule):
    """The projections, RoPE and attention."""

    def __init__(self, tensors, prefix, sizes, frequencies):
        super().__init__()
        self.qkv_proj = VllmLinear(*[tensors[f"{prefix}.{part}_proj.weight"] for part in "qkv"])
        self.o_proj = VllmLinear(tensors[f"{prefix}.o_proj.weight"])
        self.attn, self.sizes, self.frequencies = VllmAttn(sizes["d"]), sizes, frequencies

    def forward(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        head_dim, width = self.sizes["d"], self.sizes["H"] * self.sizes["d"]
        q, k, v = np.split(qkv.array, [width, width + self.sizes["K"] * head_dim], axis=-1)
        heads = [x.reshape(len(x), -1, head_dim).transpose(1, 0, 2) for x in (q, k)]
        rotated = [ops.rope(x, positions.array, self.frequencies).transpose(1, 0, 2) for x in heads]
        q, k = (tensor(x.reshape(len(x), -1)) for x in rotated)
        return self.o_proj(self.attn(q, k, tensor(v)))[0]


class VllmMLP(FakeModule):
    """A feed-forward block with SwiGLU."""

    def __init__(self, tensors, prefix):
        super().__init__()
        self.gate_up_proj = VllmLinear(*[tensors[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up")])
        self.down_proj = VllmLinear(tensors[f"{prefix}.down_proj.weight"])

    def forward(self, x):
        gate, up = np.split(self.gate_up_proj(x)[0].array, 2, axis=-1)
        return self.down_proj(tensor(ops.swiglu(gate, up)))[0]


class VllmLayer(FakeModule):
    """A layer, which returns the block's output and the residual stream before it is added."""

    def __init__(self, model, tensors, prefix):
        super().__init__()
        names = ("input_layernorm", "post_attention_layernorm")
        self.input_layernorm, self.post_attention_layernorm = (
            VllmNorm(tensors[f"{prefix}.{name}.weight"], model.eps) for name in names
        )
        self.self_attn = VllmAttention(tensors, f"{prefix}.self_attn", model.sizes, model.frequencies)
        self.mlp = VllmMLP(tensors, f"{prefix}.mlp")

    def forward(self, positions, hidden_states, residual):
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class VllmBody(FakeModule):
    """The model without its output matrix."""

    def __init__(self, model, tensors):
        super().__init__()
        self.table = tensors["model.embed_tokens.weight"]
        self.layers = [VllmLayer(model, tensors, f"model.layers.{i}") for i in range(model.num_layers)]
        self.norm = VllmNorm(tensors["model.norm.weight"], model.eps)

    def forward(self, input_ids, positions):
        x, residual = tensor(self.table[input_ids.array]), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]


class VllmLogits(FakeModule):
    """The output matrix, as a module that gets it."""

    def forward(self, weight, hidden_states):
        return tensor(ops.linear(hidden_states.array, weight))


class VllmLlama(FakeModule):
    """A causal language model read from a directory with one file of float32 weights."""

    def __init__(self, directory):
        super().__init__()
        fields, tensors = read_json(directory / "config.json"), load_file(directory / "model.safetensors")
        self.config = SimpleNamespace(to_dict=lambda: dict(fields))
        self.eps, self.num_layers = fields["rms_norm_eps"], fields["num_hidden_layers"]
        heads = fields["num_attention_heads"]
        self.sizes = {"H": heads, "K": fields["num_key_value_heads"], "d": fields["head_dim"]}
        self.frequencies = ops.rope_inverse_frequencies(fields)
        self.model, self.head = VllmBody(self, tensors), tensors["lm_head.weight"]
        self.logits_processor = VllmLogits()

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.head, hidden_states)

    def run(self, token_ids, start):
        """Run the model on tokens from a position on, and compute the logits of the last one."""
        positions = np.arange(start, start + len(token_ids))
        hidden = self(input_ids=FakeTensor(np.array(token_ids)), positions=FakeTensor(positions))
        return self.compute_logits(hidden[-1:])
