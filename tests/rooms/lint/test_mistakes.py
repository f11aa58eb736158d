"""Shards that are wrong in many ways: the wrong tensors are named, and so is the mistake."""

from collections import namedtuple

import engine_shards as engines
import ml_dtypes
import numpy as np
import pytest
from engine_shards import linted

from minitp.compare.heads import interleaved

LAYER = "model.layers.1."
Q, K, V, OUT = (f"{LAYER}self_attn.{letter}_proj.weight" for letter in "qkvo")
GATE, UP, DOWN = (f"{LAYER}mlp.{word}_proj.weight" for word in ("gate", "up", "down"))
QKV, GATE_UP = f"{LAYER}self_attn.qkv_proj.weight", f"{LAYER}mlp.gate_up_proj.weight"
MEGATRON_QKV = "module.decoder.layers.1.self_attention.linear_qkv.weight"
EMBED, NORM = "model.embed_tokens.weight", f"{LAYER}input_layernorm.weight"
W13 = "model.layers.1.mlp.experts.w13_weight"

# A mistake: `break_(ranks, whole)` changes the right shards of an engine, given the model's whole tensors.
# Then the tensors `wrong` are wrong, and `words` name the mistake of the first.
Mistake = namedtuple("Mistake", "break_ wrong words model engine tp", defaults=("llama", "hf", 2))


def each_rank(name, shard):
    """Return a mistake in which each rank has shard(whole tensors, rank, number of ranks)."""

    def break_(ranks, whole):
        for rank, held in enumerate(ranks):
            held[name] = shard(whole, rank, len(ranks))

    return break_


def on_rank(rank, name, change):
    """Return a mistake in which one rank has change(its tensor)."""

    def break_(ranks, whole):
        ranks[rank][name] = change(ranks[rank][name])

    return break_


def exchange(*names):
    """Return a mistake in which ranks 0 and 1 have each other's tensors; without names, all of them."""

    def break_(ranks, whole):
        for name in names or list(ranks[0]):
            ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]

    return break_


def exchange_tensors(one, other):
    """Return a mistake in which each rank has two of its tensors under each other's name."""

    def break_(ranks, whole):
        for held in ranks:
            held[one], held[other] = held[other], held[one]

    return break_


def remove(name, *numbers):
    """Return a mistake in which some ranks, or all, do not have a tensor."""

    def break_(ranks, whole):
        for rank in numbers or range(len(ranks)):
            del ranks[rank][name]

    return break_


def cut(x, rank, tp, axis=0):
    return np.array_split(x, tp, axis)[rank]


def joined(whole, letters="qkv"):
    return np.concatenate([whole[f"{LAYER}self_attn.{letter}_proj.weight"] for letter in letters])


def gate_up(whole):
    return np.concatenate((whole[GATE], whole[UP]))


def group_qkv(ranks, whole):
    for held in ranks:
        q, k, v = np.split(held[QKV], [64, 80])  # 8 query heads and 2 KV heads of 8
        held[QKV] = engines.grouped(q, k, v, [4, 4])


def ungroup_qkv(ranks, whole):
    for held in ranks:
        q, k, v = np.split(held[MEGATRON_QKV].reshape(2, 6, 8, -1), [4, 5], axis=1)  # [KV head, head, row, D]
        held[MEGATRON_QKV] = np.concatenate([part.reshape(-1, part.shape[-1]) for part in (q, k, v)])


def kv_of_rank_0_on_rank_3(ranks, whole):
    for name in (K, V):
        ranks[3][name] = ranks[0][name]


def kv_in_turn(ranks, whole):
    for rank, held in enumerate(ranks):
        for name in (K, V):
            held[name] = whole[name][4 * (rank % 2) : 4 * (rank % 2) + 4]


def kv_in_turn_joined(ranks, whole):
    kv_in_turn(ranks, whole)
    for rank, held in enumerate(ranks):
        held[QKV] = np.concatenate((cut(whole[Q], rank, len(ranks)), held.pop(K), held.pop(V)))


def rope(x):
    return np.moveaxis(interleaved(np.moveaxis(x.reshape(-1, 4, x.shape[1]), 1, -1)), -1, 1).reshape(x.shape)


def pad_each_rank(ranks, whole):
    for held in ranks:
        held[EMBED] = np.pad(held[EMBED], ((0, 3), (0, 0)))


def swap_experts(ranks, whole):
    for held in ranks:
        one, other = (f"{LAYER}mlp.experts.{n}.down_proj.weight" for n in (0, 2))
        held[one], held[other] = held[other], held[one]


def strided_heads(ranks, whole):
    for rank, held in enumerate(ranks):
        held[Q] = whole[Q].reshape(8, 4, -1)[rank::2].reshape(16, -1)


def add_tensor(ranks, whole):
    for held in ranks:
        held["model.layers.1.mlp.extra.weight"] = np.arange(12, dtype=np.float32).reshape(3, 4)


def lose_last_rank(ranks, whole):
    ranks.pop()


MISTAKES = {
    "ranks exchanged in one tensor": Mistake(
        exchange(Q), [Q], "ranks exchanged: rank 0 has the rows of rank 1, rank 1 has the rows of rank 0"
    ),
    "files exchanged": Mistake(
        exchange(), [EMBED, "lm_head.weight"], "ranks exchanged: rank 0 has the rows of rank 1"
    ),
    "one rank's rows on two": Mistake(
        each_rank(GATE, lambda whole, r, n: cut(whole[GATE], 0, n)),
        [GATE],
        "rank 1 has the rows of rank 0; rows 24:48 are on no rank",
    ),
    "joined qkv cut": Mistake(
        each_rank(QKV, lambda whole, r, n: cut(joined(whole), r, n)),
        [QKV],
        "the joined matrix was cut into 2 pieces: rank 0 has q 0:24; each part must be cut by itself",
        engine="vllm",
    ),
    "joined gate_up cut": Mistake(
        each_rank(GATE_UP, lambda whole, r, n: cut(gate_up(whole), r, n)),
        [GATE_UP],
        "the joined matrix was cut into 2 pieces: rank 0 has gate 0:48; each part",
        engine="vllm",
    ),
    "qkv grouped": Mistake(
        group_qkv,
        [QKV],
        "q, k, v are interleaved for each KV head; the engine expects one after",
        model="wide",
        engine="vllm",
    ),
    "qkv not grouped": Mistake(
        ungroup_qkv,
        [MEGATRON_QKV],
        "in the order q, k, v, one after another; the engine expects them grouped by KV head",
        model="wide",
        engine="megatron",
    ),
    "k before q": Mistake(
        each_rank(QKV, lambda whole, r, n: np.concatenate([cut(joined(whole, x), r, n) for x in "kqv"])),
        [QKV],
        "the parts are in the order k, q, v, expected q, k, v",
        engine="vllm",
    ),
    "up before gate": Mistake(
        each_rank(GATE_UP, lambda whole, r, n: np.concatenate([cut(whole[x], r, n) for x in (UP, GATE)])),
        [GATE_UP],
        "gate and up are exchanged: the order is up, gate",
        engine="vllm",
    ),
    "gate and up alternate": Mistake(
        each_rank(
            GATE_UP,
            lambda whole, r, n: np.stack([cut(whole[x], r, n) for x in (GATE, UP)], 1).reshape(48, -1),
        ),
        [GATE_UP],
        "the rows of gate and up alternate",
        engine="vllm",
    ),
    "gate and up exchanged": Mistake(exchange_tensors(GATE, UP), [GATE, UP], "has rows of mlp.up_proj"),
    "KV heads modulo": Mistake(
        kv_in_turn,
        [K, V],
        "query head h is given KV head h mod K, expected h div (H / K), with H = 8, K = 2",
        tp=8,
    ),
    "KV heads in turn": Mistake(
        kv_in_turn, [K, V], "the ranks are given the KV heads in turn, as rank mod K", tp=4
    ),
    "KV heads of rank 0 on the last of uneven ranks": Mistake(
        kv_of_rank_0_on_rank_3,
        [K, V],
        "rank 3 has the rows of rank 0; rows 12:18 are on no rank",
        "uneven",
        tp=4,
    ),
    "joined KV heads in turn": Mistake(kv_in_turn_joined, [QKV], "as rank mod K", engine="vllm", tp=4),
    "KV heads of v exchanged": Mistake(exchange(V), [V], "ranks exchanged: rank 0 has the rows of rank 1"),
    "off by a block": Mistake(
        each_rank(GATE, lambda whole, r, n: whole[GATE][20 * r : 20 * r + 24]),
        [GATE],
        "off by 4 rows: rank 1 has rows 20:44, expected rows 24:48",
    ),
    "o split along rows": Mistake(
        each_rank(OUT, lambda whole, r, n: cut(whole[OUT], r, n)),
        [OUT],
        "split along the wrong axis: rank 0 has rows 0:16, expected a share of the columns",
    ),
    "q split along columns": Mistake(
        each_rank(Q, lambda whole, r, n: cut(whole[Q], r, n, 1)),
        [Q],
        "split along the wrong axis: rank 0 has columns 0:16, expected a share of the rows",
    ),
    "transposed": Mistake(
        each_rank(GATE, lambda whole, r, n: cut(whole[GATE], r, n).T),
        [GATE],
        "transposed: rank 0 has rows 0:24",
    ),
    "transposed square": Mistake(
        each_rank(Q, lambda whole, r, n: cut(whole[Q].T, r, n)), [Q], "transposed: rank 0 has columns 0:16"
    ),
    "another layer": Mistake(
        each_rank(DOWN, lambda whole, r, n: cut(whole[DOWN.replace("1", "0")], r, n, 1)),
        [DOWN],
        "holds the tensor of layer 0, not 1",
    ),
    "another layer's norm": Mistake(
        each_rank(NORM, lambda whole, r, n: whole[NORM.replace("1", "0")]),
        [NORM],
        "holds the tensor of layer 0, not 1",
    ),
    "other RoPE layout": Mistake(
        each_rank(K, lambda whole, r, n: rope(cut(whole[K], r, n))),
        [K],
        "the rows of each query and key head are interleaved, expected half-split: the other RoPE layout",
    ),
    "padding in the middle": Mistake(
        pad_each_rank, [EMBED], "padding before the end: rank 0 has 3 rows of zeros", model="uneven", tp=3
    ),
    "norm split": Mistake(
        each_rank(NORM, lambda whole, r, n: cut(whole[NORM], r, n)),
        [NORM],
        "split, but every rank needs all of it: rank 0 has 16 of 32 elements",
    ),
    "rounded through float16": Mistake(
        on_rank(1, UP, lambda x: x.astype(np.float16).astype(np.float32)),
        [UP],
        "rank 1 was rounded through float16",
    ),
    "embedding scaled": Mistake(
        on_rank(1, EMBED, lambda x: x * 3), [EMBED], "rank 1 has the expected values times 3"
    ),
    "rounded through bfloat16": Mistake(
        each_rank(NORM, lambda whole, r, n: whole[NORM].astype(ml_dtypes.bfloat16).astype(np.float32)),
        [NORM],
        "rank 0 was rounded through bfloat16",
    ),
    "scaled": Mistake(on_rank(0, Q, lambda x: x / 2), [Q], "rank 0 has the expected values times 0.5"),
    "norm plus 1": Mistake(
        on_rank(1, NORM, lambda x: x + 1), [NORM], "rank 1 has the expected values plus 1"
    ),
    "one row changed": Mistake(
        on_rank(1, DOWN, lambda x: x + 0.01 * (np.arange(24) == 5)),
        [DOWN],
        "rank 1 has values that differ from the expected ones by up to 0.01 in 1 of 24 columns",
    ),
    "one row lost": Mistake(
        on_rank(1, UP, lambda x: np.where(np.arange(24)[:, None] == 5, np.roll(x, 1, axis=1), x)),
        [UP],
        "rows 5 of rank 1 are not in the checkpoint",
    ),
    "NaN": Mistake(on_rank(1, UP, lambda x: x + np.nan), [UP], "rank 1 has 768 values not finite"),
    "never written": Mistake(
        on_rank(1, GATE, lambda x: 0 * np.abs(x)), [GATE], "all values are zero on rank 1: never written?"
    ),
    "missing on a rank": Mistake(remove(UP, 1), [UP], "is missing on rank 1"),
    "missing on all": Mistake(remove(UP), [UP], "is in no rank's file"),
    "extra": Mistake(add_tensor, ["model.layers.1.mlp.extra.weight"], "is not in the checkpoint"),
    "strided": Mistake(
        strided_heads, [Q], "strided: the ranks take turns with heads; rank 0 has rows 0:4, 8:12, 16:20, .."
    ),
    "heads cut": Mistake(
        lambda ranks, whole: [
            held.update({name: cut(whole[name], r, len(ranks), int(name == OUT)) for name in (Q, OUT)})
            for r, held in enumerate(ranks)
        ],
        [Q, OUT],
        "cut inside a head: rank 0 has 14 rows, and a head has 6",
        model="uneven",
        tp=4,
    ),
    "down whole": Mistake(
        each_rank(DOWN, lambda whole, r, n: whole[DOWN]),
        [DOWN],
        "rank 0 has columns 0:48, but mlp.gate_proj has rows 0:24",
    ),
    "experts exchanged": Mistake(
        swap_experts,
        [f"{LAYER}mlp.experts.{n}.down_proj.weight" for n in (0, 2)],
        "holds the tensor of expert 2, not 0",
        model="qwen3-moe",
    ),
    "experts' up before gate": Mistake(
        lambda ranks, whole: [held.update({W13: np.roll(held[W13], 6, axis=1)}) for held in ranks],
        [f"{W13}[{n}]" for n in range(4)],
        "gate and up are exchanged: the order is up, gate",
        model="qwen3-moe",
        engine="vllm",
    ),
    "last file missing": Mistake(
        lose_last_rank, None, "rows 172:258 are on no rank: is the file of a last rank missing?", tp=3
    ),
    "bias": Mistake(
        exchange(f"{LAYER}mlp.gate_proj.bias"),
        [f"{LAYER}mlp.gate_proj.bias"],
        "ranks exchanged",
        model="bias",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_wrong_tensor_and_the_mistake_are_named(name, models, tmp_path):
    mistake = MISTAKES[name]
    model = models[mistake.model]
    ranks = engines.of_engine(mistake.engine, model, mistake.tp)
    mistake.break_(ranks, model.tensors)
    result = linted(model, ranks, tmp_path)
    if mistake.wrong is not None:
        assert list(result.faults) == mistake.wrong
    assert mistake.words in next(iter(result.faults.values()))
