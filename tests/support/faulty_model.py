"""A Model of which one rank does one thing wrong in one layer, and ways to do things wrong: see `faults`.

Ranks are threads, so a FaultyModel says in a thread-local `here` which hooks are active: those of its fault,
while the block that has the fault runs. All functions of `ops`, the collectives, the cache's `append` and the
two blocks look there. A hook computes with NumPy, on a GPU too: see `host_arrays`.
"""

import copy
import inspect
import threading
from dataclasses import replace
from functools import partial

import numpy as np
from host_arrays import HostArrays

from minitp import moe, ops
from minitp.loading.weights import LAYER_PARTS
from minitp.model import Model, SequenceSlice
from minitp.rope import rope_inverse_frequencies
from minitp.shard import split_evenly

OPS = [(module, name) for module in (ops, moe) for name, value in vars(module).items() if callable(value)]


class Here(threading.local):
    """Of this thread's rank: its model, the block and the Layer at work, the hooks that are active."""

    def __init__(self):
        self.model, self.hooks, self.block, self.layer, self.arrays = None, {}, "", None, None


here = Here()


def hooked(name, original):
    """`original`, or hook(original, ..) while the hook of this name is active."""

    def call(*args, **kwargs):
        if here.model is not None:
            here.model.calls.add((here.block, name))
        hook = here.hooks.get(name)
        if hook is None:
            return original(*args, **kwargs)
        args = inspect.signature(original).bind(*args, **kwargs).args  # by their place, as hooks change them
        return here.arrays.run(hook, original, *args)

    return call


def hook_ops(monkeypatch):
    """From here on the functions of `ops` and `moe` look for hooks, those that call one another too."""
    for module, name in OPS:
        monkeypatch.setattr(module, name, hooked(name, getattr(module, name)))


class Faulty:
    """What a Model with a Fault has: in layer `layer`, or outside the layers if the fault's block is "".

    `calls` are (block, name) of all hooks that the model has looked for.
    """

    def __init__(self, fault, layer, source, weights, comm, device):
        super().__init__(source.config, source.plan, weights, comm, device)
        self.fault, self.layer, self.calls = fault, layer, set()
        comm.all_reduce = hooked("all_reduce", comm.all_reduce)
        comm.all_gather = hooked("all_gather", comm.all_gather)
        if fault.weights is not None:
            fault.weights(self, layer, partial(whole_tensor, source))

    def new_cache(self, capacity=64):
        cache = super().new_cache(max(capacity, 64))
        cache.append = hooked("append", cache.append)
        return cache

    def forward(self, token_ids, cache, *args, **kwargs):
        here.cache = cache
        return self._within("", None, None, super().forward, token_ids, cache, *args, **kwargs)

    def _within(self, block, i, layer, call, *args, **kwargs):
        before = dict(vars(here))
        active = block == self.fault.block and (block == "" or i == self.layer)
        here.model, here.block, here.arrays = self, block, HostArrays(self.device)
        here.hooks, here.layer = (self.fault.hooks, here.arrays.of(layer)) if active else ({}, None)
        try:
            return call(*args, **kwargs)
        finally:
            vars(here).update(before)


class FaultyModel(Faulty, Model):
    """The same of the explicit path."""

    def _attention(self, i, layer, *args):
        return self._within("attn", i, layer, hooked("block", super()._attention), i, layer, *args)

    def _mlp(self, i, layer, *args):
        return self._within("mlp", i, layer, hooked("block", super()._mlp), i, layer, *args)

    def _all_reduce_and_add(self, x, *args):
        return hooked("add", super()._all_reduce_and_add)(x, *args)


def whole_tensor(source, name):
    """A checkpoint tensor, unsharded."""
    return source.tensors.read(name, tuple(slice(0, n) for n in source.plan.tensors[name].shape))


# --- hooks ----------------------------------------------------------------------------------------------


def changed(**changes):
    """A hook that changes some of the arguments of an operation: by their place, `_1` the one after `xp`."""

    def hook(original, *args):
        args = list(args)
        for place, change in changes.items():
            args[int(place[1:])] = change(args[int(place[1:])])
        return original(*args)

    return hook


def result(change):
    """A hook that changes what comes out."""
    return lambda original, *args: change(original(*args))


def times(factor):
    """A hook that multiplies what comes out."""
    return result(lambda y: (y * np.float32(factor)).astype(y.dtype))


def with_step(change):
    """A hook for an attention block: change(copy of the ForwardContext and SequenceSlice) before it runs."""

    def hook(original, i, layer, x, step):
        step = copy.copy(step)
        sequence = copy.copy(step.sequences[here.model.config.windows[i]][0])
        step.sequences = {window: [sequence] for window in step.sequences}
        with here.arrays.lent(step, sequence):
            change(step, sequence)
        return original(i, layer, x, step)

    return {"block": hook}


def turn(step, positions, **rope):
    """Angles for these positions, with some of the RoPE parameters changed."""
    config = here.model.config
    frequencies = rope_inverse_frequencies(replace(config.rope, **rope), config.head_dim)
    step.cos, step.sin = ops.rope_cos_sin(np, positions, np.float32(frequencies))


def shifted_mask(by):
    """Each query sees as the one `by` positions later does."""

    def change(step, sequence):
        positions = sequence.positions
        if sequence.mask is not None:
            sequence.mask = ops.causal_mask(np, positions + by, sequence.first_key, positions[-1] + 1)

    return with_step(change)


def other_window(by):
    """A window that is so much longer."""

    def change(step, sequence):
        other = SequenceSlice(np, sequence.tokens, sequence.cache, here.model.config.sliding_window + by)
        sequence.mask, sequence.first_key = other.mask, other.first_key

    return with_step(change)


def in_decode(hooks):
    """These hooks, but not in prefill."""

    def late(hook):
        return lambda original, *args: hook(original, *args) if here.cache.length else original(*args)

    return {name: late(hook) for name, hook in hooks.items()}


def interleaved(original, xp, x, cos, sin):
    """The pairs (x[2i], x[2i + 1])."""
    cos, sin = cos[:, : cos.shape[1] // 2], sin[:, sin.shape[1] // 2 :]  # [T, d/2] each
    first, second = x[..., 0::2], x[..., 1::2]  # [n, T, d/2] each
    turned = np.stack((first * cos - second * sin, second * cos + first * sin), axis=-1)  # [n, T, d/2, 2]
    return turned.reshape(x.shape).astype(x.dtype)


def own_scale(factor):
    """Scores multiplied by factor(d)."""
    return lambda original, xp, q, *rest: original(xp, q, *rest) * np.float32(factor(q.shape[-1]))


def softmax_over_queries(original, xp, scores):
    return original(xp, scores.swapaxes(1, 2)).swapaxes(1, 2)


def no_maximum_subtracted(original, xp, scores):
    with np.errstate(all="ignore"):
        return np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)


def even_groups(original, xp, by_head, by_kv_head, groups, *mask):
    """As if each KV head had as many of this rank's query heads."""
    return original(xp, by_head, by_kv_head, split_evenly(len(by_head), len(by_kv_head)), *mask)


def one_slot_too_far(original, layer, k, v, *first):
    """In decode the new entry lands behind the slot that is read for it, which was never written."""
    cache, start = here.cache, here.cache.length
    original(layer, k, v, *first)
    if start:
        for rows, new in zip(cache.storage[layer], (k, v), strict=True):
            rows.values[:, start + 1 : start + 2], rows.values[:, start] = here.arrays.up(new), 0
    return [rows.read(slice(*first, start + k.shape[1])) for rows in cache.storage[layer]]


def stale(which):
    """In decode position 1 holds what belongs to position 2; `which` is k, v or kv."""

    def hook(original, layer, k, v, *first):
        k, v = original(layer, k, v, *first)
        if here.cache.length:
            for name, array in (("k", k), ("v", v)):
                if name in which:
                    array[:, 1] = array[:, 2]
        return k, v

    return {"append": hook}


def other_layer(original, layer, k, v, first):
    """The values of the layer before, which is not the first."""
    k, v = original(layer, k, v, first)
    return k, here.cache.storage[layer - 1][1].read(slice(first, first + v.shape[1]))


weight_alone = {"rms_norm_plus_one": lambda norm, xp, *args: ops.rms_norm(xp, *args)}


def without(norm_name):
    """Hooks that leave out one of the Layer's norms."""

    def hook(norm, xp, x, weight, eps):
        return x if weight is getattr(here.layer, norm_name) else norm(xp, x, weight, eps)

    return {"rms_norm_plus_one": hook}


def silu_for_gelu(geglu, xp, gate_up):
    return ops.swiglu(xp, gate_up)


def next_experts(route, xp, logits, per_token):
    """Those after the chosen ones."""
    chosen, shares = route(xp, logits, per_token)
    return (chosen + 1) % logits.shape[1], shares


def shares_of_all(route, xp, logits, per_token):
    """As the softmax over all experts gives them, so that they do not add up to 1."""
    chosen, _ = route(xp, logits, per_token)
    return chosen, np.take_along_axis(ops.softmax(xp, logits), chosen, axis=1)


def no_shares(route, xp, logits, per_token):
    """The experts count alike."""
    chosen, shares = route(xp, logits, per_token)
    return chosen, np.full_like(shares, 1 / per_token)


def _other_router(column_parallel, xp, x, w, *bias):
    y = column_parallel(xp, x, w, *bias)
    return np.roll(y, 1, axis=-1) if w is here.layer.w_router else y


other_router = {"column_parallel": _other_router}


def bias_on_every_rank(all_reduce, x):
    """The bias is among the terms of the sum; rank 0's is the one that the model adds anyway."""
    bias = here.layer.b_o if here.model.fault.block == "attn" else here.layer.b_down
    return all_reduce(x + bias if here.model.comm.rank else x)


def last_bit(y):
    """One element's neighbour: far inside any bound, but not the other ranks' bits."""
    y = y.copy()
    y[0, 0] = np.nextafter(y[0, 0], y.dtype.type(np.inf))
    return y


def swapped_halves(y):
    """[.., 2n] with its halves swapped."""
    return np.concatenate(np.split(y, 2, axis=-1)[::-1], axis=-1)


def rounded_to_16_bits(y):
    """float32 numbers that have been 16-bit ones."""
    return y.astype(here.model.device.dtype).astype(np.float32)


def sum_in_16_bits(original, xp, x, w):
    """Each addition of a product rounded to the dtype."""
    total = np.zeros((len(x), w.shape[1]), x.dtype)
    for i in range(w.shape[0]):
        total = (total + x[:, i : i + 1] * w[i]).astype(x.dtype)
    return total


def stream(change):
    """Hooks: a block's output is added to change(x) and not to the stream x."""
    return {"add": lambda original, x, *args: original(change(x), *args)}


# --- weights --------------------------------------------------------------------------------------------


def reload(*arrays, change):
    """These arrays of a Layer anew, cut out of change(name, whole tensor, model)."""

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


def one_column_on(name, whole, model):
    return np.roll(whole, -1, axis=model.plan.tensors[name].axis)


def neighbours_kv_heads(name, whole, model):
    """Keys and values of the KV heads after this rank's own; its queries are right."""
    return np.roll(whole, -model.config.head_dim, axis=0) if ".q_proj." not in name else whole


def slightly_off(name, whole, model):
    """Each element by 1e-3 of itself, up or down."""
    return whole * (1 + 1e-3 * np.random.default_rng(1).choice([-1, 1], whole.shape))


def gate_for_up(model, layer, whole):
    weights = model.weights.layers[layer]
    for array in (weights.w_gate_up, weights.b_gate_up):
        array[...] = model.device.xp.asarray(swapped_halves(model.device.to_host(array)))


def head_of_its_own(model, layer, whole):
    """The head of a model that does not tie it to the embedding."""
    rows = np.roll(model.device.to_host(model.weights.lm_head).T, 1, axis=0)  # [V_r, D]
    model.weights.lm_head = model.device.xp.asarray(rows).T
