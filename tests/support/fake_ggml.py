"""A stand-in for ggml: tensors, three functions of its library, and the arrays of a recording as a graph."""

import ctypes

import numpy as np

from minitp.compare.heads import interleaved
from minitp.probe.ggml import DTYPES, GgmlTensor

OPERATIONS = ["NONE", "GET_ROWS", "MUL", "MUL_MAT", "RESHAPE", "ROPE", "SOFT_MAX", "CONT", "ADD", "GLU"]
PADDING = 3  # positions of the cache that have not been written
TYPES = {np.dtype(dtype): number for number, dtype in DTYPES.items()}


class FakeGgml:
    """The functions of ggml's library that the probe calls."""

    def __init__(self):
        self.ggml_get_name = lambda address: GgmlTensor.from_address(address).name
        self.ggml_op_name = lambda number: OPERATIONS[number].encode()
        self.ggml_backend_tensor_get = lambda tensor, data, offset, size: ctypes.memmove(
            data, GgmlTensor.from_address(tensor).data + offset, size
        )


class FakeGraph:
    """The tensors of llama.cpp's forward passes with the arrays of a recording, in order.

    Parameters
    ----------
    arrays : dict of str to array
        The steps of a recording of a model of the architecture llama, whose heads are interleaved in ggml.
    types : dict of str to int, optional
        The ggml types of tensors, by name, if they are not those of the arrays.
    """

    def __init__(self, arrays, types=None):
        self.arrays, self.types, self.kept = arrays, types or {}, []

    def tensor(self, name, array, operation="NONE", sources=(), parameters=()):
        """Return a GgmlTensor."""
        array = np.ascontiguousarray(array)
        kind = self.types.get(name, TYPES[array.dtype])
        tensor = GgmlTensor(type=kind, op=OPERATIONS.index(operation), name=name.encode())
        for axis in range(4):
            has_axis = axis < array.ndim
            tensor.ne[axis] = array.shape[-1 - axis] if has_axis else 1
            tensor.nb[axis] = array.strides[-1 - axis] if has_axis else array.nbytes
        tensor.data = array.ctypes.data
        for number, source in enumerate(sources):
            tensor.src[number] = ctypes.addressof(source)
        for number, value in enumerate(parameters):
            tensor.op_params[number] = value
        self.kept += [array, tensor]
        return tensor

    def passes(self, names, layers):
        """Yield the tensors that some passes compute."""
        for name in names:
            yield from self.before(name)
            for layer in range(layers):
                yield from self.attention(name, layer)
                yield from self.mlp(name, layer)
            yield from self.after(name)

    def before(self, pass_name):
        """Yield the tensors before the layers."""
        tokens = self.tensor("inp_tokens", self.arrays[f"{pass_name}/tokens"].astype(np.int32))
        embed = self.arrays[f"{pass_name}/embed"]  # [T, D]
        table = self.tensor("token_embd.weight", embed)
        yield self.tensor("embd", embed, "GET_ROWS", [table, tokens])

    def attention(self, pass_name, i):
        """Yield the tensors of the attention block of layer i."""
        s = {step: self.arrays.get(f"{pass_name}/layers.{i}.attn.{step}") for step in STEPS}
        positions = self.tensor("inp_pos", self.arrays[f"{pass_name}/positions"].astype(np.int32))
        yield self.tensor(f"attn_norm-{i}", s["norm"], "MUL")
        for part in "qkv":
            heads = s[part] if part == "v" else interleaved(s[part])  # [n, T, d]
            rows = heads.transpose(1, 0, 2)  # [T, n, d]
            name, weight = f"{part.upper()}cur-{i}", self.tensor(f"blk.{i}.attn_{part}.weight", s["norm"])
            flat = self.tensor(name, rows.reshape(len(rows), -1), "MUL_MAT", [weight])
            yield flat
            yield self.tensor(name, rows, "RESHAPE", [flat])
            if part != "v":
                rotated = interleaved(s[f"{part}_rope"]).transpose(1, 0, 2)  # [T, n, d]
                yield self.tensor(name, rotated, "ROPE", [flat, positions], [0, rotated.shape[-1], 0])
        k = self.tensor(f"cache_k_l{i} (view)", padded(interleaved(s["k_cache"]), 1))
        yield self.tensor(f"kq-{i}", padded(s["probs"], 2), "MUL_MAT", [k])
        yield self.tensor(f"kq_soft_max-{i}", padded(s["probs"], 2), "SOFT_MAX")
        v = self.tensor(f"cache_v_l{i} (view)", padded(s["v_cache"].transpose(0, 2, 1), 2))
        yield self.tensor(f"kqv-{i}", s["context"], "MUL_MAT", [v])
        yield self.tensor(f"kqv_out-{i}", s["context"], "CONT")
        weight = self.tensor(f"blk.{i}.attn_output.weight", s["norm"])
        out = self.tensor("node_17", s["out"], "MUL_MAT", [weight])
        yield out
        yield self.tensor(f"ffn_inp-{i}", s["residual"], "ADD", [out, out])

    def mlp(self, pass_name, i):
        """Yield the tensors of the feed-forward block of layer i."""
        prefix = f"{pass_name}/layers.{i}.mlp"
        has_experts = f"{prefix}.experts" in self.arrays
        for name, step, operation in MIXTURE if has_experts else MLP:
            array = self.arrays[f"{prefix}.{step}"]
            if step == "experts":  # the one with the largest logit is the first
                logits = self.arrays[f"{prefix}.router"]  # [T, E]
                numbers = np.argsort(-logits, axis=1)[:, : array.shape[1]]  # [T, X]
                yield self.tensor(f"ffn_moe_topk-{i}", numbers.astype(np.int32), "RESHAPE")
                places = np.argsort(np.argsort(numbers, axis=1), axis=1)  # [T, X]
                array = np.take_along_axis(array, places[:, :, None], axis=1)  # [T, X, F]
            weight = self.tensor("", array)
            yield self.tensor(f"{name}-{i}", array, operation, [weight, weight])

    def after(self, pass_name):
        """Yield the tensors after the layers."""
        yield self.tensor("result_norm", self.arrays[f"{pass_name}/final_norm"], "MUL")
        weight = self.tensor("output.weight", self.arrays[f"{pass_name}/final_norm"])
        yield self.tensor("result_output", self.arrays[f"{pass_name}/logits"], "MUL_MAT", [weight])


STEPS = (
    "norm",
    "q",
    "k",
    "v",
    "q_rope",
    "k_rope",
    "k_cache",
    "v_cache",
    "probs",
    "context",
    "out",
    "residual",
)
MLP = [
    ("ffn_norm", "norm", "MUL"),
    ("ffn_gate", "gate", "MUL_MAT"),
    ("ffn_up", "up", "MUL_MAT"),
    ("ffn_swiglu", "act", "GLU"),
    ("ffn_out", "out", "MUL_MAT"),
    ("l_out", "residual", "ADD"),
]
MIXTURE = [
    ("ffn_norm", "norm", "MUL"),
    ("ffn_moe_logits", "router", "MUL_MAT"),
    ("ffn_moe_swiglu", "experts", "GLU"),
    ("ffn_moe_out", "out", "ADD"),
    ("l_out", "residual", "ADD"),
]


def padded(array, axis):
    """Return an array with PADDING more positions along an axis, which hold garbage."""
    widths = [(0, PADDING if number == axis else 0) for number in range(array.ndim)]
    return np.pad(array, widths, constant_values=7)


def play(observe, tensors):
    """Call the callback as ggml's scheduler does; stop where it says so, and return whether it did not."""
    for tensor in tensors:
        address = ctypes.addressof(tensor)
        if observe(address, True, None) and not observe(address, False, None):
            return False
    return True
