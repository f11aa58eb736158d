"""A Model with a fault in one layer of one rank, and the hooks that the table in `faults` uses.

Ranks are threads, so a FaultyModel keeps the active hooks in a thread-local `state`: those of its fault,
while the block with the fault runs. All functions of `ops` and `moe`, the collectives, the cache's `append`
and the two blocks look for hooks there. A hook computes with NumPy, even on a GPU: see `host_arrays`.
"""

import copy
import inspect
import threading
from dataclasses import replace
from functools import partial

import numpy as np
from host_arrays import HostArrays

from minitp import model as model_module
from minitp import moe, ops
from minitp.loading.weights import LAYER_PARTS
from minitp.model import Model, SequenceSlice
from minitp.rope import rope_inverse_frequencies
from minitp.util.shares import split_evenly

OPS = [(module, name) for module in (ops, moe) for name, value in vars(module).items() if callable(value)]


class RankState(threading.local):
    """The state of this thread's rank: its model, the current block and Layer, and the active hooks."""

    def __init__(self):
        self.model, self.hooks, self.block, self.layer, self.arrays = None, {}, "", None, None
        self.cache, self.decoding = None, False


state = RankState()


def hooked(name, original):
    """Wrap a function so that the hook of this name replaces it while it is active."""

    def call(*args, **kwargs):
        if state.model is not None:
            state.model.calls.add((state.block, name))
        hook = state.hooks.get(name)
        if hook is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        return state.arrays.run(hook, original, *bound.args)  # hooks change arguments by index

    return call


def hook_ops(monkeypatch):
    """Wrap all functions of `ops` and `moe`, so that they look for hooks when they call each other, too."""
    for module, name in OPS:
        monkeypatch.setattr(module, name, hooked(name, getattr(module, name)))
    monkeypatch.setattr(model_module, "SequenceSlice", hooked("sequence_slice", SequenceSlice))


class Faulty:
    """A mixin for a Model with a Fault in layer `layer`, or outside the layers if the fault's block is "".

    `calls` has (block, name) of all hooks that the model has looked for.
    """

    def __init__(self, fault, layer, source, weights, comm, device):
        super().__init__(source.config, source.plan, weights, comm, device)
        self.fault, self.layer, self.calls, self.arrived = fault, layer, set(), []
        comm.all_reduce = hooked("all_reduce", comm.all_reduce)
        comm.all_gather = hooked("all_gather", comm.all_gather)
        if fault.weights is not None:
            fault.weights(self, layer, partial(whole_tensor, source))

    def new_cache(self, capacity=64):
        cache = super().new_cache(max(capacity, 64))
        cache.append = hooked("append", cache.append)
        return cache

    def forward(self, token_ids, cache, *args, **kwargs):
        state.cache, state.decoding = cache, cache.length > 0 and len(token_ids) == 1
        forward = hooked("forward", super().forward)
        return self._within("", None, None, forward, token_ids, cache, *args, **kwargs)

    def _within(self, block, i, layer, call, *args, **kwargs):
        before = dict(vars(state))
        active = block == self.fault.block and (block == "" or i == self.layer)
        state.model, state.block, state.arrays = self, block, HostArrays(self.device)
        state.hooks, state.layer = (self.fault.hooks, state.arrays.of(layer)) if active else ({}, None)
        try:
            return call(*args, **kwargs)
        finally:
            vars(state).update(before)


class FaultyModel(Faulty, Model):
    """A Faulty model on the explicit path."""

    def _attention(self, i, layer, *args):
        return self._within("attn", i, layer, hooked("block", super()._attention), i, layer, *args)

    def _mlp(self, i, layer, *args):
        return self._within("mlp", i, layer, hooked("block", super()._mlp), i, layer, *args)

    def _all_reduce_and_add(self, x, *args):
        return hooked("add", super()._all_reduce_and_add)(x, *args)


def whole_tensor(source, name):
    """Read a whole checkpoint tensor."""
    return source.tensors.read(name, tuple(slice(0, n) for n in source.plan.tensors[name].shape))


# --- hooks ----------------------------------------------------------------------------------------------


def changed(**changes):
    """Return a hook that changes arguments of an operation by index; `_1` is the one after `xp`."""

    def hook(original, *args):
        args = list(args)
        for name, change in changes.items():
            index = int(name[1:])
            args[index] = change(args[index])
        return original(*args)

    return hook


def result(change):
    """Return a hook that changes the result."""
    return lambda original, *args: change(original(*args))


def times(factor):
    """Return a hook that multiplies the result."""
    return result(lambda y: (y * np.float32(factor)).astype(y.dtype))


def with_context(change):
    """Return a hook for an attention block: change(context, sequence) changes copies before it runs.

    They are the ForwardContext and the SequenceSlice.
    """

    def hook(original, i, layer, x, context):
        context = copy.copy(context)
        sequence = copy.copy(context.sequences[state.model.config.windows[i]][0])
        context.sequences = {window: [sequence] for window in context.sequences}
        with state.arrays.lent(context, sequence):
            change(context, sequence)
        return original(i, layer, x, context)

    return {"block": hook}


def rotate(context, positions, **rope):
    """Use the angles of other positions or of changed RoPE parameters."""
    config = replace(state.model.config, rope=replace(state.model.config.rope, **rope))
    frequencies = rope_inverse_frequencies(config.rope, config.rotary_dim)
    angles = ops.rope_cos_sin(np, positions, np.float32(frequencies))
    context.angles = dict.fromkeys(context.angles, angles)


def shifted_mask(by):
    """Return hooks that give each query the mask of the query `by` positions later."""

    def change(context, sequence):
        positions = sequence.positions
        if sequence.mask is not None:
            sequence.mask = ops.causal_mask(np, positions + by, sequence.first_key, positions[-1] + 1)

    return with_context(change)


def other_window(by):
    """Return hooks that make the window longer by `by`."""

    def change(context, sequence):
        other = SequenceSlice(
            np, sequence.index, sequence.tokens, sequence.cache, state.model.config.sliding_window + by
        )
        sequence.mask, sequence.first_key = other.mask, other.first_key

    return with_context(change)


def window_of_the_other_layers(context, sequence):
    """Use the window of the layers of the other kind, in a model with windows in some layers."""
    windows = state.model.config.windows
    other = next(window for window in windows if window != windows[state.model.layer])
    of_layer = SequenceSlice(np, sequence.index, sequence.tokens, sequence.cache, other)
    sequence.mask, sequence.first_key = of_layer.mask, of_layer.first_key


def angles_of_the_other_layers(context, sequence):
    """Swap the two RoPEs of a model that has one for the layers with a window and one for the others."""
    (one, angles), (other, other_angles) = context.angles.items()
    context.angles = {one: other_angles, other: angles}


def in_decode(hooks):
    """Return the hooks restricted to decode passes."""
    return restricted(hooks, lambda: state.decoding)


def without_cache(hooks):
    """Return the hooks restricted to passes without earlier positions."""
    return restricted(hooks, lambda: state.cache.length == 0)


def in_chunks(hooks):
    """Return the hooks restricted to later chunks of a prompt."""
    return restricted(hooks, lambda: state.cache.length > 0 and not state.decoding)


def restricted(hooks, active):
    """Return the hooks restricted to passes for which active() is true."""

    def when_active(hook):
        def call(original, *args):
            return hook(original, *args) if active() else original(*args)

        return call

    return {name: when_active(hook) for name, hook in hooks.items()}


def token_before(forward, token_ids, *args):
    """Use the token before the one to decode: the ranks' broadcast comes one step late."""
    model = state.model
    before, model.arrived = model.arrived, list(token_ids)
    return forward(before[-1:] if state.decoding else token_ids, *args)


def another_token(forward, token_ids, *args):
    """Decode the token that follows the chosen one in the vocabulary."""
    vocab = state.model.config.vocab_size
    return forward([(t + 1) % vocab for t in token_ids] if state.decoding else token_ids, *args)


def shifted_tokens(token_ids):
    return list(token_ids) if state.decoding else [*token_ids[1:], token_ids[0]]


def from_position_zero(sequence_slice, xp, index, tokens, cache, window):
    """Make a SequenceSlice whose positions, and so its mask, begin at 0."""
    sequence = sequence_slice(xp, index, tokens, cache, window)
    sequence.positions = sequence.positions - sequence.positions[0]
    total = cache.length + tokens.stop - tokens.start
    mask = sequence.positions, sequence.first_key, total, window
    sequence.mask = ops.causal_mask(state.model.device.xp, *mask)
    return sequence


def interleaved(original, xp, x, cos, sin):
    """Rotate the pairs (x[2i], x[2i + 1]) instead of (x[i], x[i + d/2])."""
    cos, sin = cos[:, : cos.shape[1] // 2], sin[:, sin.shape[1] // 2 :]  # [T, d/2] each
    first, second = x[..., 0::2], x[..., 1::2]  # [n, T, d/2] each
    turned = np.stack((first * cos - second * sin, second * cos + first * sin), axis=-1)  # [n, T, d/2, 2]
    return turned.reshape(x.shape).astype(x.dtype)


def scaled_scores(factor):
    """Return a hook that multiplies the scores by factor(d)."""
    return lambda original, xp, q, *rest: original(xp, q, *rest) * np.float32(factor(q.shape[-1]))


def softmax_over_queries(original, xp, scores):
    return original(xp, scores.swapaxes(1, 2)).swapaxes(1, 2)


def no_maximum_subtracted(original, xp, scores):
    with np.errstate(all="ignore"):
        return np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)


def even_groups(original, xp, by_head, by_kv_head, groups, *mask):
    """Give each KV head the same number of this rank's query heads."""
    return original(xp, by_head, by_kv_head, split_evenly(len(by_head), len(by_kv_head)), *mask)


def one_slot_too_far(original, layer, k, v, *first):
    """Write a decoded token's entry to the next slot, so that the slot that is read was never written."""
    cache, start = state.cache, state.cache.length
    original(layer, k, v, *first)
    if state.decoding:
        for rows, new in zip(cache.storage[layer], (k, v), strict=True):
            rows.values[:, start + 1 : start + 2], rows.values[:, start] = state.arrays.up(new), 0
    return [rows.read(slice(*first, start + k.shape[1])) for rows in cache.storage[layer]]


def stale(which):
    """Return hooks that replace position 1 by position 2 in decode; `which` is k, v or kv."""

    def hook(original, layer, k, v, *first):
        k, v = original(layer, k, v, *first)
        if state.decoding:
            for name, array in (("k", k), ("v", v)):
                if name in which:
                    array[:, 1] = array[:, 2]
        return k, v

    return {"append": hook}


def other_layer(original, layer, k, v, first):
    """Read the values of the previous layer; the layer is not the first."""
    k, v = original(layer, k, v, first)
    return k, state.cache.storage[layer - 1][1].read(slice(first, first + v.shape[1]))


no_added_one = {"rms_norm_plus_one": lambda norm, xp, *args: ops.rms_norm(xp, *args)}


def _no_added_one_in_heads(norm, xp, x, *rest):
    return ops.rms_norm(xp, x, *rest) if x.ndim == 3 else norm(xp, x, *rest)


no_added_one_in_heads = {"rms_norm_plus_one": _no_added_one_in_heads}


def without(norm_name):
    """Return hooks that leave out one of the Layer's norms."""

    def hook(norm, xp, x, weight, eps):
        return x if weight is getattr(state.layer, norm_name) else norm(xp, x, weight, eps)

    return {"rms_norm_plus_one": hook}


def silu_instead_of_gelu(geglu, xp, gate_up):
    return ops.swiglu(xp, gate_up)


def next_experts(route, xp, logits, *routing):
    """Choose the experts that follow the right ones."""
    chosen, shares = route(xp, logits, *routing)
    return (chosen + 1) % logits.shape[1], shares


def no_expert_weights(route, xp, logits, per_token, normalized):
    """Give all chosen experts the same weight."""
    chosen, shares = route(xp, logits, per_token, normalized)
    return chosen, np.full_like(shares, 1 / per_token)


def sigmoid_shares(route, xp, logits, *routing):
    """Normalize the sigmoids of the chosen experts' logits, as in models with another router."""
    chosen, _ = route(xp, logits, *routing)
    shares = 1 / (1 + np.exp(-np.take_along_axis(logits, chosen, axis=1)))
    return chosen, shares / shares.sum(axis=1, keepdims=True)


def _other_router(column_parallel, xp, x, w, *bias):
    y = column_parallel(xp, x, w, *bias)
    return np.roll(y, 1, axis=-1) if w is state.layer.w_router else y


other_router = {"column_parallel": _other_router}


def bias_on_every_rank(all_reduce, x):
    """Add the bias on every rank but rank 0, whose bias stands for the one that the model adds anyway."""
    bias = state.layer.b_o if state.model.fault.block == "attn" else state.layer.b_down
    return all_reduce(x + bias if state.model.comm.rank else x)


def last_bit(y):
    """Change the last bit of one element, which is within any bound but differs from the other ranks."""
    y = y.copy()
    y[0, 0] = np.nextafter(y[0, 0], y.dtype.type(np.inf))
    return y


def swapped_halves(y):
    """Swap the halves of the last axis: [.., 2n] -> [.., 2n]."""
    return np.concatenate(np.split(y, 2, axis=-1)[::-1], axis=-1)


def rounded_to_16_bits(y):
    """Round to the model's 16-bit dtype and return float32."""
    return y.astype(state.model.device.dtype).astype(np.float32)


def sum_in_16_bits(original, xp, x, w):
    """Multiply with each addition rounded to the dtype."""
    total = np.zeros((len(x), w.shape[1]), x.dtype)
    for i in range(w.shape[0]):
        total = (total + x[:, i : i + 1] * w[i]).astype(x.dtype)
    return total


def stream(change):
    """Return hooks that add a block's output to change(x) instead of the residual stream x."""
    return {"add": lambda original, x, *args: original(change(x), *args)}


# --- weights --------------------------------------------------------------------------------------------


def reload(*arrays, change):
    """Return a `weights` fault that makes arrays of a Layer from change(name, whole tensor, model)."""

    def fault(model, layer, whole):
        for array in arrays:
            parts = []
            for name in LAYER_PARTS[array]:
                name = f"model.layers.{layer}.{name}"
                index = model.plan.tensors[name].index(model.comm.rank)
                parts.append(change(name, whole(name), model)[index].T)
            joined = np.concatenate(parts, axis=-1).astype(model.device.dtype)
            getattr(model.weights.layers[layer], array)[...] = model.device.xp.asarray(joined)

    return fault


def shifted_by_one(name, whole, model):
    return np.roll(whole, -1, axis=model.plan.tensors[name].axis)


def neighbors_kv_heads(name, whole, model):
    """Use the keys and values of the next KV heads; the queries are right."""
    return np.roll(whole, -model.config.head_dim, axis=0) if ".q_proj." not in name else whole


def slightly_off(name, whole, model):
    """Change each element by 1e-3 of its value, up or down."""
    return whole * (1 + 1e-3 * np.random.default_rng(1).choice([-1, 1], whole.shape))


def gate_and_up_swapped(model, layer, whole):
    weights = model.weights.layers[layer]
    for array in (weights.w_gate_up, weights.b_gate_up):
        array[...] = model.device.xp.asarray(swapped_halves(model.device.to_host(array)))


def untied_head(model, layer, whole):
    """Replace the tied head by rows in another order."""
    rows = np.roll(model.device.to_host(model.weights.lm_head).T, 1, axis=0)  # [V_r, D]
    model.weights.lm_head = model.device.xp.asarray(rows).T
