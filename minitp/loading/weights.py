"""One rank's weights, in the layout that `model` multiplies by."""

import math
from dataclasses import dataclass
from typing import Any

from minitp.device import LINE_BYTES
from minitp.errors import InputError

BLOCK_BYTES = 1 << 24  # bytes of a matrix that are read at a time, as float32

LM_HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"

# The arrays of a Layer, each with the checkpoint tensors that it joins.
LAYER_PARTS = {
    "attn_norm": ["input_layernorm.weight"],
    "w_qkv": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "b_qkv": [f"self_attn.{part}_proj.bias" for part in "qkv"],
    "q_norm": ["self_attn.q_norm.weight"],
    "k_norm": ["self_attn.k_norm.weight"],
    "w_o": ["self_attn.o_proj.weight"],
    "b_o": ["self_attn.o_proj.bias"],
    "mlp_norm": ["post_attention_layernorm.weight"],
    "w_gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "b_gate_up": ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
    "w_down": ["mlp.down_proj.weight"],
    "b_down": ["mlp.down_proj.bias"],
    "w_router": ["block_sparse_moe.gate.weight"],
}
# In a model with norms after the blocks, post_attention_layernorm names a different norm.
POST_NORM_PARTS = {
    "mlp_norm": ["pre_feedforward_layernorm.weight"],
    "attn_post_norm": ["post_attention_layernorm.weight"],
    "mlp_post_norm": ["post_feedforward_layernorm.weight"],
}
# The arrays of an Expert, in the two kinds of checkpoints (see `tensors`).
EXPERT_PARTS = {
    "block_sparse_moe": {"w_gate_up": ["w1.weight", "w3.weight"], "w_down": ["w2.weight"]},
    "mlp": {"w_gate_up": ["gate_proj.weight", "up_proj.weight"], "w_down": ["down_proj.weight"]},
}
MLP_ROUTER = {"w_router": ["mlp.gate.weight"]}


@dataclass
class Expert:
    """One expert's tensors on one rank."""

    w_gate_up: Any  # [D, 2 F_r]
    w_down: Any  # [F_r, D]


@dataclass
class Layer:
    """One layer's tensors on one rank; projections are [in, out], absent tensors are None."""

    attn_norm: Any  # [D]
    w_qkv: Any  # [D, (H_r + 2 K_r) d]: the columns of q, then k, then v
    b_qkv: Any  # [(H_r + 2 K_r) d]
    q_norm: Any  # [d]
    k_norm: Any  # [d]
    w_o: Any  # [H_r d, D]
    b_o: Any  # [D]
    mlp_norm: Any  # [D]
    w_gate_up: Any  # [D, 2 F_r]: the columns of gate, then up
    b_gate_up: Any  # [2 F_r]
    w_down: Any  # [F_r, D]
    b_down: Any  # [D]
    w_router: Any  # [D, E]
    experts: list  # E Experts; empty without w_router
    attn_post_norm: Any = None  # [D]
    mlp_post_norm: Any = None  # [D]


@dataclass
class Weights:
    """One rank's tensors."""

    embed: Any  # [V_r, D]
    lm_head: Any  # [D, V_r]; with tied embeddings `embed` is a view of it
    final_norm: Any  # [D]
    layers: list
    nbytes: int  # total size; tied embeddings count once


class Loader:
    """A loader that reads one rank's slices of a checkpoint into the arrays that the model uses.

    All arrays share one allocation in the compute dtype. It is large enough for Linux to back it with 2 MB
    pages; with 4 kB pages, the products are slower (docs/performance.md). The arrays are filled block by
    block, and nothing else is kept. So the private memory of a rank (RssAnon + RssShmem in /proc/self/status)
    never exceeds its shard in the compute dtype + its largest single slice + 200 MB for Python and the
    libraries. The files are memory-mapped: their pages belong to the page cache, which the ranks of a host
    share.

    Parameters
    ----------
    plan : Plan
    rank : int
    source : Checkpoint or RandomWeights
    device : Device
    progress : callable
        A function that is called after each array with the array's size in bytes.
    """

    def __init__(self, plan, rank, source, device, progress=lambda nbytes: None):
        self.plan, self.rank, self.source, self.device, self.progress = plan, rank, source, device, progress
        gaps = len(plan.tensors) * LINE_BYTES
        self._memory = device.memory(shard_nbytes(plan, rank, device) + gaps)  # uint8 [n]
        self._allocated = 0  # bytes allocated so far

    def load(self):
        """Load and return this rank's Weights."""
        lm_head, embed = self._embeddings()
        final_norm = self._vector(FINAL_NORM)
        layers = [self._layer(i) for i in range(self.plan.layers)]
        nbytes = shard_nbytes(self.plan, self.rank, self.device)
        return Weights(embed, lm_head, final_norm, layers, nbytes)

    def _allocate(self, shape):
        """Return an uninitialized array from the part of the memory that is still free."""
        nbytes = math.prod(shape) * self.device.dtype.itemsize
        memory = self._memory[self._allocated : self._allocated + nbytes]
        self._allocated += -(-nbytes // LINE_BYTES) * LINE_BYTES
        return memory.view(self.device.dtype).reshape(shape)

    def _embeddings(self):
        """Load lm_head [D, V_r] and embed [V_r, D]; tied embeddings are one array and its transpose.

        The memory order of tied embeddings suits the product for the logits, which reads the whole array; the
        lookup reads only T rows.
        """
        if LM_HEAD in self.plan.tensors:
            shape = self.plan.tensors[EMBED].shape_on(self.rank)
            embed = self._allocate(shape)  # [V_r, D]
            for start, rows in self._blocks(EMBED):
                embed[start : start + len(rows)] = rows
            self.progress(embed.nbytes)
            return self._matrix(LM_HEAD), embed
        lm_head = self._matrix(EMBED)  # [D, V_r]
        self._refuse_untied_copy(lm_head)
        return lm_head, lm_head.T

    def _refuse_untied_copy(self, lm_head):
        """Reject a checkpoint with tied embeddings whose lm_head differs from them."""
        info = getattr(self.source, "tensors", {}).get(LM_HEAD)
        if info is None:
            return
        shape = self.plan.tensors[EMBED].shape
        same = info.shape == shape and all(
            (self.device.to_host(lm_head[:, start : start + len(rows)]) == rows.astype(lm_head.dtype).T).all()
            for start, rows in self._blocks(LM_HEAD, like=EMBED)
        )
        if not same:
            raise InputError(
                f"{info.file}: {LM_HEAD} differs from {EMBED}, but config.json says tie_word_embeddings: true"
            )

    def _layer(self, i):
        layer = f"model.layers.{i}."
        tables = expert_tables(self.plan)
        experts = [Expert(**self._arrays(layer + prefix, table)) for prefix, table in tables]
        return Layer(**self._arrays(layer, layer_parts(self.plan)), experts=experts)

    def _arrays(self, prefix, table):
        """Load the arrays of a table like LAYER_PARTS; arrays that the model does not have are None."""
        arrays = {}
        for array, parts in table.items():
            read = self._matrix if array.startswith("w_") else self._vector
            names = [prefix + part for part in parts]
            arrays[array] = read(*names) if names[0] in self.plan.tensors else None
        return arrays

    def _blocks(self, name, like=None):
        """Yield this rank's slice of a matrix as (first row, rows), a few MB at a time."""
        rows, columns = self.plan.tensors[like or name].index(self.rank)
        size = max(1, BLOCK_BYTES // (4 * max(1, columns.stop - columns.start)))  # rows per block
        for start in range(rows.start, rows.stop, size):
            block = slice(start, min(start + size, rows.stop))
            yield start - rows.start, self.source.read(name, (block, columns))

    def _matrix(self, *names):
        """Load the slices of `names`, each [out, in] in the file, as one matrix [in, sum of out]."""
        shapes = [self.plan.tensors[name].shape_on(self.rank) for name in names]
        columns = sum(out for out, _ in shapes)
        joined = self._allocate((shapes[0][1], columns))  # [in, sum of out]
        start = 0
        for name, (out, _) in zip(names, shapes, strict=True):
            for row, block in self._blocks(name):  # [rows, in]
                joined[:, start + row : start + row + len(block)] = block.T
            start += out
        self.progress(joined.nbytes)
        return joined

    def _vector(self, *names):
        """Load the slices of `names`, concatenated into one vector."""
        sizes = [self.plan.tensors[name].shape_on(self.rank)[0] for name in names]
        joined, start = self._allocate((sum(sizes),)), 0  # [sum of n]
        for name, size in zip(names, sizes, strict=True):
            joined[start : start + size] = self.source.read(name, self.plan.tensors[name].index(self.rank))
            start += size
        return joined


def layer_parts(plan):
    """Return LAYER_PARTS, with the entries that differ in a model with this plan."""
    post_norms = "model.layers.0.pre_feedforward_layernorm.weight" in plan.tensors
    return LAYER_PARTS | (POST_NORM_PARTS if post_norms else {}) | (MLP_ROUTER if in_mlp(plan) else {})


def in_mlp(plan):
    """Return whether the experts of a model are named as a part of its mlp."""
    return "model.layers.0.mlp.gate.weight" in plan.tensors


def expert_tables(plan):
    """Return the beginning of the tensors' names and the entry of EXPERT_PARTS for each expert of a layer."""
    block = "mlp" if in_mlp(plan) else "block_sparse_moe"
    return [(f"{block}.experts.{n}.", EXPERT_PARTS[block]) for n in range(plan.experts)]


def named_slices(weights, plan, rank):
    """Yield (checkpoint name, view) for each slice that a rank holds, shaped as in the file."""
    yield EMBED, weights.embed  # [V_r, D]
    yield FINAL_NORM, weights.final_norm  # [D]
    if LM_HEAD in plan.tensors:
        yield LM_HEAD, weights.lm_head.T  # [V_r, D]
    for i, layer in enumerate(weights.layers):
        yield from _slices(layer, layer_parts(plan), f"model.layers.{i}.", plan, rank)
        for expert, (prefix, table) in zip(layer.experts, expert_tables(plan), strict=True):
            yield from _slices(expert, table, f"model.layers.{i}.{prefix}", plan, rank)


def _slices(holder, table, prefix, plan, rank):
    """Yield (checkpoint name, view) for each slice in the arrays of a table like LAYER_PARTS."""
    for array, parts in table.items():
        joined, start = getattr(holder, array), 0  # [in, sum of out] or [sum of n]
        if joined is None:
            continue
        for name in (prefix + part for part in parts):
            stop = start + plan.tensors[name].shape_on(rank)[0] if len(parts) > 1 else joined.shape[-1]
            yield name, joined[..., start:stop].T  # [out_r, in_r] or [n]
            start = stop


def shard_nbytes(plan, rank, device):
    """Return the size in bytes of a rank's weights, without loading them."""
    shapes = [shard.shape_on(rank) for shard in plan.tensors.values()]
    elements = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)
    return elements * device.dtype.itemsize
