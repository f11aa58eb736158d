"""A Llama with the modules and the cache of mlx-lm, in NumPy: arrays of NumPy stand for those of MLX.

The mathematics is that of the oracle.
"""

from dataclasses import make_dataclass

import numpy as np
from safetensors.numpy import load_file

from minitp.oracle import ops
from minitp.util.files import read_json


class MlxFake:
    """A module without hooks; its children are the attributes that are modules, or lists of them."""

    def named_modules(self, path=""):
        found = [(path, self)]
        for name, child in vars(self).items():
            children = child if isinstance(child, list) else [child]
            for number, module in enumerate(children):
                if isinstance(module, MlxFake):
                    part = f"{name}.{number}" if isinstance(child, list) else name
                    found += module.named_modules(f"{path}.{part}".lstrip("."))
        return found


class MlxLinear(MlxFake):
    """A projection: [1, T, in] -> [1, T, out]."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return ops.linear(x, self.weight).astype(np.float32)


class MlxNorm(MlxFake):
    """A module of RMSNorm: [1, T, D] -> [1, T, D]."""

    def __init__(self, weight, eps):
        self.weight, self.eps = weight, eps

    def __call__(self, x):
        return ops.rms_norm(x, self.weight, self.eps).astype(np.float32)


class MlxRope(MlxFake):
    """RoPE from a position on: [1, n, T, d] -> [1, n, T, d]."""

    def __init__(self, frequencies):
        self.frequencies = frequencies

    def __call__(self, x, offset=0):
        return ops.rope(x, offset + np.arange(x.shape[2]), self.frequencies).astype(np.float32)


class KVCache:
    """The keys and values of a layer, [1, K, S, d]."""

    def __init__(self):
        self.offset, self.arrays = 0, None

    def update_and_fetch(self, keys, values):
        pairs = zip(self.arrays, (keys, values), strict=True) if self.arrays else ((keys,), (values,))
        self.arrays = [np.concatenate(pair, axis=2) for pair in pairs]
        self.offset = self.arrays[0].shape[2]
        return tuple(self.arrays)


class RotatingKVCache(KVCache):
    """A cache of the last `max_size` positions."""

    def __init__(self, max_size):
        super().__init__()
        self.max_size = max_size


class MlxAttention(MlxFake):
    """Attention, whose scores are not arrays of their own."""

    def __init__(self, tensors, prefix, head_dim, frequencies):
        for part in "qkvo":
            setattr(self, f"{part}_proj", MlxLinear(tensors[f"{prefix}.{part}_proj.weight"]))
        self.rope, self.head_dim = MlxRope(frequencies), head_dim
        self.root, self.repeat, self.ahead = np.sqrt(head_dim), np.repeat, 0

    def __call__(self, x, cache):
        count, offset = x.shape[1], cache.offset if cache else 0
        q, k, v = (
            y.reshape(1, count, -1, self.head_dim).transpose(0, 2, 1, 3)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache:
            k, v = cache.update_and_fetch(k, v)
        group = q.shape[1] // k.shape[1]
        positions = offset + np.arange(count) + self.ahead
        mask = ops.causal_mask(positions, np.arange(k.shape[2]), None)  # [T, S]
        scores = ops.scores(q[0], self.repeat(k[0], group, axis=0), mask, self.root)  # [H, T, S]
        context = ops.context(ops.softmax(scores), self.repeat(v[0], group, axis=0))  # [T, H d]
        return self.o_proj(context.astype(np.float32)[None])


class MlxMLP(MlxFake):
    """A feed-forward block with SwiGLU."""

    def __init__(self, tensors, prefix):
        for part in ("gate", "up", "down"):
            setattr(self, f"{part}_proj", MlxLinear(tensors[f"{prefix}.{part}_proj.weight"]))

    def __call__(self, x):
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)).astype(np.float32))


class MlxLayer(MlxFake):
    """A layer."""

    def __init__(self, model, tensors, prefix):
        eps, norm = model.args.rms_norm_eps, "post_attention_layernorm"
        self.input_layernorm = MlxNorm(tensors[f"{prefix}.input_layernorm.weight"], eps)
        self.self_attn = MlxAttention(tensors, f"{prefix}.self_attn", model.args.head_dim, model.frequencies)
        self.post_attention_layernorm = MlxNorm(tensors[f"{prefix}.{norm}.weight"], eps)
        self.mlp = MlxMLP(tensors, f"{prefix}.mlp")

    def __call__(self, x, cache):
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MlxBody(MlxFake):
    """The model without its output matrix."""

    def __init__(self, model, tensors):
        self.table = tensors["model.embed_tokens.weight"]
        numbers = range(model.args.num_hidden_layers)
        self.layers = [MlxLayer(model, tensors, f"model.layers.{i}") for i in numbers]
        self.norm = MlxNorm(tensors["model.norm.weight"], model.args.rms_norm_eps)

    def __call__(self, inputs, cache):
        x = self.table[inputs]
        for layer, layer_cache in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x = layer(x, layer_cache)
        return self.norm(x)


class MlxLlama(MlxFake):
    """A causal language model read from a directory with one file of float32 weights."""

    def __init__(self, directory):
        fields, tensors = read_json(directory / "config.json"), load_file(directory / "model.safetensors")
        self.args = make_dataclass("ModelArgs", fields)(**fields)
        self.frequencies = ops.rope_inverse_frequencies(fields)
        self.model = MlxBody(self, tensors)
        self.lm_head = MlxLinear(tensors["lm_head.weight"])

    def __call__(self, inputs, cache=None):
        return self.lm_head(self.model(inputs, cache))

    def make_cache(self, kind=KVCache, *sizes):
        return [kind(*sizes) for _ in self.model.layers]
