"""A Llama with the modules, hooks and functions of Hugging Face transformers, in NumPy and without PyTorch.

Only what `minitp.probe` uses is here. The mathematics is that of the oracle.
"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

from minitp.oracle import ops


class FakeTensor:
    """An array with the methods of a tensor that the probe calls."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def detach(self):
        return self

    def contiguous(self):
        return self

    def to(self, device, copy):
        return FakeTensor(self.array.copy(), self.dtype)

    def numpy(self):
        return self.array

    def tolist(self):
        return self.array.tolist()

    def __getitem__(self, index):
        return FakeTensor(self.array[index], self.dtype)


class FakeHandle:
    """A hook's handle, which removes it."""

    def __init__(self, hooks, hook):
        self.remove = lambda: hooks.remove(hook)


class FakeModule:
    """A module with forward hooks; its children are the attributes that are modules."""

    def __init__(self):
        self.before, self.after = [], []

    def register_forward_pre_hook(self, hook, with_kwargs=False):
        self.before.append((hook, with_kwargs))
        return FakeHandle(self.before, self.before[-1])

    def register_forward_hook(self, hook):
        self.after.append(hook)
        return FakeHandle(self.after, hook)

    def __call__(self, *args, **kwargs):
        for hook, with_kwargs in self.before:
            hook(self, args, kwargs) if with_kwargs else hook(self, args)
        output = self.forward(*args, **kwargs)
        for hook in self.after:
            hook(self, args, output)
        return output

    def named_modules(self, path="", remove_duplicate=False):
        yield path, self
        for name, child in vars(self).items():
            children = {name: child} if isinstance(child, FakeModule) else {}
            if isinstance(child, list) and child and isinstance(child[0], FakeModule):
                children = {f"{name}.{number}": one for number, one in enumerate(child)}
            for part, module in children.items():
                yield from module.named_modules(f"{path}.{part}".lstrip("."))


class FakeLinear(FakeModule):
    """A projection: [1, T, in] -> [1, T, out]."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return FakeTensor(ops.linear(x.array[0], self.weight)[None].astype(np.float32))


class FakeNorm(FakeModule):
    """A module of RMSNorm: [1, T, D] -> [1, T, D]."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x):
        return FakeTensor(ops.rms_norm(x.array, self.weight, self.eps).astype(np.float32))


def apply_rotary_pos_emb(q, k, positions, frequencies):
    """Rotate q [1, H, T, d] and k [1, K, T, d]."""
    turned = (ops.rope(x.array[0], positions, frequencies)[None].astype(np.float32) for x in (q, k))
    return tuple(map(FakeTensor, turned))


def eager_attention_forward(module, query, key, value, mask):
    """Return the context [1, T, H, d] and the probabilities [1, H, T, S]."""
    group = query.shape[1] // key.shape[1]
    k, v = (np.repeat(x.array[0], group, axis=0) for x in (key, value))  # [H, S, d] each
    probs = ops.softmax(ops.scores(query.array[0], k, mask, np.sqrt(k.shape[-1])))  # [H, T, S]
    context = ops.context(probs, v).reshape(len(mask), -1, k.shape[-1])  # [T, H, d]
    return FakeTensor(context[None].astype(np.float32)), FakeTensor(probs[None].astype(np.float32))


class FakeAttention(FakeModule):
    """Attention with a cache of keys and values."""

    def __init__(self, model, tensors, prefix):
        super().__init__()
        for part in "qkvo":
            setattr(self, f"{part}_proj", FakeLinear(tensors[f"{prefix}.{part}_proj.weight"]))
        self.cache, self.sizes, self.frequencies = None, model.sizes, model.frequencies

    def forward(self, hidden_states, positions):
        head_dim = self.sizes["d"]
        q, k, v = (
            FakeTensor(x.array.reshape(1, x.shape[1], -1, head_dim).transpose(0, 2, 1, 3))
            for x in (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        q, k = apply_rotary_pos_emb(q, k, positions, self.frequencies)
        new = k.array, v.array
        joined = zip(self.cache or (new[0][:, :, :0], new[1][:, :, :0]), new, strict=True)
        self.cache = [np.concatenate(pair, axis=2) for pair in joined]  # [1, K, S, d] each
        keys = np.arange(self.cache[0].shape[2])
        mask = ops.causal_mask(positions, keys, None)  # [T, S]
        context, _ = eager_attention_forward(self, q, *map(FakeTensor, self.cache), mask)
        return self.o_proj(FakeTensor(context.array.reshape(1, len(positions), -1))), None


class FakeMLP(FakeModule):
    """A feed-forward block with SwiGLU."""

    def __init__(self, tensors, prefix):
        super().__init__()
        for part in ("gate", "up", "down"):
            setattr(self, f"{part}_proj", FakeLinear(tensors[f"{prefix}.{part}_proj.weight"]))

    def forward(self, x):
        act = ops.swiglu(self.gate_proj(x).array, self.up_proj(x).array)
        return self.down_proj(FakeTensor(act.astype(np.float32)))


class FakeLayer(FakeModule):
    """A layer, whose result is a tensor, as in recent versions of transformers."""

    def __init__(self, model, tensors, prefix):
        super().__init__()
        self.input_layernorm = FakeNorm(tensors[f"{prefix}.input_layernorm.weight"], model.eps)
        self.self_attn = FakeAttention(model, tensors, f"{prefix}.self_attn")
        after = tensors[f"{prefix}.post_attention_layernorm.weight"]
        self.post_attention_layernorm = FakeNorm(after, model.eps)
        self.mlp = FakeMLP(tensors, f"{prefix}.mlp")

    def forward(self, hidden_states, position_ids):
        out, _ = self.self_attn(self.input_layernorm(hidden_states), positions=position_ids.array[0])
        x = FakeTensor(hidden_states.array + out.array)
        return FakeTensor(x.array + self.mlp(self.post_attention_layernorm(x)).array)


class FakeBody(FakeModule):
    """The model without its output matrix."""

    def __init__(self, model, tensors):
        super().__init__()
        self.table = tensors["model.embed_tokens.weight"]
        self.layers = [FakeLayer(model, tensors, f"model.layers.{i}") for i in range(model.num_layers)]
        self.norm = FakeNorm(tensors["model.norm.weight"], model.eps)
        self.seen = 0

    def forward(self, input_ids):
        ids = input_ids.array[0]
        positions = FakeTensor(np.arange(self.seen, self.seen + len(ids))[None], "torch.int64")
        self.seen += len(ids)
        x = FakeTensor(self.table[ids][None])
        for layer in self.layers:
            x = layer(x, position_ids=positions)
        return self.norm(x)


class FakeLlama(FakeModule):
    """A causal language model read from a directory with float32 weights."""

    def __init__(self, directory):
        super().__init__()
        fields = json.loads((directory / "config.json").read_text())
        files = sorted(directory.glob("*.safetensors"))
        tensors = dict(itertools.chain(*(load_file(file).items() for file in files)))
        self.config = SimpleNamespace(_attn_implementation="sdpa", to_dict=lambda: dict(fields))
        self.eps, self.num_layers = fields["rms_norm_eps"], fields["num_hidden_layers"]
        heads = fields["num_attention_heads"]
        self.sizes = {"d": fields.get("head_dim") or fields["hidden_size"] // heads}
        self.frequencies = ops.rope_inverse_frequencies(fields)
        self.model = FakeBody(self, tensors)
        self.lm_head = FakeLinear(tensors["lm_head.weight"])

    def set_attn_implementation(self, name):
        self.config._attn_implementation = name

    def forward(self, input_ids, logits_to_keep=0, **_):
        x = self.model(input_ids).array[:, -logits_to_keep:]  # [1, n, D]; 0 keeps all positions
        return SimpleNamespace(logits=self.lm_head(FakeTensor(x)))
