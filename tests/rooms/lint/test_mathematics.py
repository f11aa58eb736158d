"""Test of random changes: lint finds a fault exactly if the ranks' sum is not the whole block's."""

import engine_shards as engines
import numpy as np
import pytest
from engine_shards import linted

from minitp.oracle import ops

LAYER = "model.layers.0."
ATTENTION = [f"{LAYER}self_attn.{letter}_proj.weight" for letter in "qkvo"]
MLP = [f"{LAYER}mlp.{word}_proj.weight" for word in ("gate", "up", "down")]
T = 5  # tokens


def block(held, x, d):
    """Return the terms of a rank in the sums of attention and of the MLP, [2, T, D]."""
    q, k, v, o, gate, up, down = (held[name].astype(np.float64) for name in (*ATTENTION, *MLP))
    whole = len(q) % d == len(k) % d == 0 and len(k) and len(q) % len(k) == 0
    if not whole or len(v) != len(k) or o.shape[1] != len(q):
        return np.full((2, *x.shape), np.nan)
    queries, keys, values = ((x @ w.T).reshape(T, -1, d) for w in (q, k, v))  # [T, n, d]
    frequencies = 100.0 ** (-np.arange(d // 2) / (d // 2))  # [d/2]
    queries, keys = (ops.rope(a.transpose(1, 0, 2), np.arange(T), frequencies, 1.0) for a in (queries, keys))
    group = len(queries) // len(keys)
    heads = []
    for j, query in enumerate(queries):
        kv = j // group
        scores = query @ keys[kv].T + np.triu(np.full((T, T), -np.inf), 1)  # [T, T]
        heads.append(ops.softmax(scores) @ values[:, kv])  # [T, d]
    if not len(gate) == len(up) == down.shape[1]:
        return np.full((2, *x.shape), np.nan)
    return np.stack((np.concatenate(heads, axis=-1) @ o.T, ops.swiglu(x @ gate.T, x @ up.T) @ down.T))


def permute(ranks, names, order):
    """Give the ranks the pieces that all of them hold together in another order, for some tensors."""
    for name in names:
        axis = int(name.endswith(("o_proj.weight", "down_proj.weight")))
        whole = np.concatenate([held[name] for held in ranks], axis)
        edges = np.cumsum([held[name].shape[axis] for held in ranks])[:-1]
        for held, part in zip(ranks, np.split(np.take(whole, order, axis), edges, axis), strict=True):
            held[name] = part


def rows(heads, d):
    return np.add.outer(np.asarray(heads) * d, np.arange(d)).ravel()


def insert_zero_heads(held, places, names, d):
    """Insert a head of zeros before some of a rank's heads."""
    for name in names:
        axis = int(name.endswith("o_proj.weight"))
        held[name] = np.insert(held[name], np.repeat(np.array(places, int) * d, d), 0, axis)


def pad_heads(rng, ranks, d):
    """Add heads of zeros to the ranks: one to each KV head's queries, or at random places."""
    regular = rng.integers(3)
    for held in ranks:
        heads, kv_heads = (len(held[name]) // d for name in ATTENTION[:2])
        places = np.arange(kv_heads) * (heads // kv_heads) + rng.integers(max(1, heads // kv_heads))
        if not regular:
            places = rng.integers(heads + 1, size=rng.integers(1, 4))
        insert_zero_heads(held, places, [ATTENTION[0]], d)
        other = rng.permutation(heads)[: len(places)] if rng.integers(4) == 0 else places
        insert_zero_heads(held, other, [ATTENTION[3]], d)
        if not rng.integers(4):
            insert_zero_heads(held, [rng.integers(kv_heads + 1)], ATTENTION[1:3], d)


def deal_heads(rng, ranks, order, whole, config):
    """Give the ranks other query heads, not equally many, with the KV heads that these read or with all."""
    d, heads = config.head_dim, config.num_attention_heads
    edges = np.sort(rng.permutation(np.arange(1, heads))[: len(ranks) - 1])
    if rng.integers(2):
        edges = np.arange(1, len(ranks)) * heads // len(ranks)
    for held, own in zip(ranks, np.split(order, edges), strict=True):
        kv = list(dict.fromkeys(own // (heads // config.num_key_value_heads)))
        kv = range(config.num_key_value_heads) if rng.integers(3) == 0 else kv
        for name, numbers in zip(ATTENTION, (own, kv, kv, own), strict=True):
            held[name] = np.take(whole[name], rows(numbers, d), int(name.endswith("o_proj.weight")))


def change(rng, ranks, whole, config):
    """Change the shards of a layer at random; a change of several tensors may be right."""
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    group, q, kv = heads // kv_heads, rng.permutation(heads), rng.permutation(kv_heads)
    in_groups = np.concatenate([head * group + rng.permutation(group) for head in kv])
    some = rng.choice([*ATTENTION, *MLP])
    axis = int(some.endswith(("o_proj.weight", "down_proj.weight")))
    held = ranks[rng.integers(len(ranks))]
    size = held[some].shape[axis]
    kind = rng.integers(13)
    if kind == 0:
        permute(ranks, [ATTENTION[0], ATTENTION[3]], rows(in_groups, d))
        permute(ranks, ATTENTION[1:3], rows(kv, d))
    elif kind == 1:
        permute(ranks, [ATTENTION[0], ATTENTION[3]], rows(q, d))
    elif kind == 2:
        permute(ranks, MLP[: rng.integers(1, 4)], rng.permutation(config.intermediate_size))
    elif kind == 3:
        names = (
            rng.permutation(ATTENTION)[: rng.integers(1, 5)] if rng.integers(2) else MLP[: rng.integers(1, 4)]
        )
        for name in names:
            ranks[0][name], ranks[-1][name] = ranks[-1][name], ranks[0][name]
    elif kind == 4:
        held[some] = np.roll(held[some], rng.integers(size), axis)
    elif kind == 5:
        held[some] = held[some][::-1, ::-1] if rng.integers(2) else np.flip(held[some], axis)
    elif kind == 6:
        held[some] = ranks[0][some].copy()
    elif kind == 7:
        held[some] = held[some] * np.float32(rng.choice([1, 0.5, -1]))
    elif kind == 8:
        one, other = rng.integers(size, size=2)
        held[some] = np.take(held[some], [other if i == one else i for i in range(size)], axis)
    elif kind == 9:
        pad_heads(rng, ranks, d)
    elif kind == 10:
        deal_heads(rng, ranks, rng.choice([np.arange(heads), in_groups, q]), whole, config)
    elif kind == 11:
        for one in ranks if rng.integers(2) else [held]:
            one |= {name: whole[name] for name in ATTENTION[1:3]}
    else:
        order = rng.permutation(heads if some == ATTENTION[0] else kv_heads)
        if some in ATTENTION[:3]:
            permute(ranks, [some], rows(order, d))


@pytest.mark.parametrize("number", range(90))
def test_a_fault_is_found_exactly_if_the_sum_is_wrong(number, models, tmp_path):
    rng = np.random.default_rng([5, number])
    model = models["wide" if number % 2 else "llama"]
    tp = 4 if number % 4 == 1 else 2
    ranks = engines.of_engine("hf", model, tp)
    for _ in range(rng.integers(1, 3)):
        change(rng, ranks, model.tensors, model.config)
    x, d = rng.standard_normal((T, model.config.hidden_size)), model.config.head_dim
    whole = engines.cut(model.tensors, model.config, 1)[0]
    error = np.abs(sum(block(held, x, d) for held in ranks) - block(whole, x, d)).max()
    is_right = bool(error < 1e-9)
    result = linted(model, engines.vllm(ranks) if number % 3 else ranks, tmp_path)
    assert (result.faults == {}) == is_right, (result.faults, error)
