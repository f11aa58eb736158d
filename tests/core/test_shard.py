"""Tests of the sharding plan: it is complete and even, and query heads are with their KV heads."""

import numpy as np
import pytest

from minitp.errors import InputError
from minitp.loading.config import parse_config
from minitp.shard import make_plan
from minitp.util.shares import in_tenths, shares_by_speed, shares_in, split_in_proportion

HEADS = [(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (7, 7), (8, 2), (9, 3), (12, 4), (15, 5), (32, 8)]  # H, K
every_model = pytest.mark.parametrize(("heads", "kv_heads"), HEADS)

# The split axis of each tensor [out, in]: the outputs of a column-parallel weight and its bias, the inputs of
# a row-parallel weight (its bias is replicated), and the vocabulary. (Megatron-LM, section 3.)
SPLIT_AXES = {
    "model.embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "model.norm.weight": None,
    "input_layernorm.weight": None,
    "post_attention_layernorm.weight": None,
    **{f"self_attn.{part}_proj.{kind}": 0 for part in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{part}_proj.{kind}": 0 for part in ("gate", "up") for kind in ("weight", "bias")},
    "self_attn.o_proj.weight": 1,
    "self_attn.o_proj.bias": None,
    "mlp.down_proj.weight": 1,
    "mlp.down_proj.bias": None,
}


def make_config(heads=9, kv_heads=3, **fields):
    sizes = {"vocab_size": 101, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 6}
    return parse_config({"model_type": "llama", **sizes, **fields}, "config.json")


def check_even_split(ranges, n):
    """Check that the ranges follow each other from 0 to n, and that their lengths differ by at most one."""
    assert [start for start, _ in ranges] == [0, *[stop for _, stop in ranges[:-1]]]
    assert ranges[-1][1] == n
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1


@every_model
def test_heads_columns_and_rows_are_split_evenly(heads, kv_heads):
    for tp in range(1, heads + 1):
        plan = make_plan(make_config(heads, kv_heads), tp)
        for ranges, n in ((plan.head_ranges, heads), (plan.ffn_ranges, 37), (plan.vocab_ranges, 101)):
            assert len(ranges) == tp
            check_even_split(ranges, n)


def test_fewer_ffn_columns_or_tokens_than_ranks():
    plan = make_plan(make_config(intermediate_size=3, vocab_size=2), 9)
    check_even_split(plan.ffn_ranges, 3)
    check_even_split(plan.vocab_ranges, 2)
    assert plan.tensors["model.layers.0.mlp.down_proj.weight"].shape_on(8) == (20, 0)
    assert plan.tensors["lm_head.weight"].shape_on(8) == (0, 20)


@every_model
def test_every_query_head_is_with_its_kv_head(heads, kv_heads):
    for tp in range(1, heads + 1):
        plan = make_plan(make_config(heads, kv_heads), tp)
        for rank in range(tp):
            start, stop = plan.head_ranges[rank]
            held = range(*plan.kv_head_ranges[rank])
            groups = plan.query_groups(rank)
            pairs = [
                (head, kv) for kv, group in zip(held, groups, strict=True) for head in range(*group)
            ]  # local query head, global KV head
            expected = [(local, (start + local) // (heads // kv_heads)) for local in range(stop - start)]
            assert pairs == expected
            assert set(held) == {kv for _, kv in expected}  # the rank holds no other KV heads


def test_the_example_in_the_docstring_of_plan():
    plan = make_plan(make_config(9, 3), 4)
    assert plan.head_ranges == ((0, 3), (3, 5), (5, 7), (7, 9))
    assert plan.kv_head_ranges == ((0, 1), (1, 2), (1, 3), (2, 3))
    assert [plan.query_groups(rank) for rank in range(4)] == [
        [(0, 3)],
        [(0, 2)],
        [(0, 1), (1, 2)],
        [(0, 2)],
    ]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tp", range(1, 10))
def test_the_slices_of_all_ranks_make_up_each_tensor(tp, biases):
    plan = make_plan(make_config(attention_bias=biases, mlp_bias=biases), tp)
    for name, shard in plan.tensors.items():
        whole = np.arange(1, np.prod(shard.shape) + 1).reshape(shard.shape)
        rebuilt, holders = np.zeros_like(whole), np.zeros_like(whole)
        for rank in range(tp):
            part = whole[shard.index(rank)]
            assert part.shape == shard.shape_on(rank)
            rebuilt[shard.index(rank)] = part
            holders[shard.index(rank)] += 1
        np.testing.assert_array_equal(rebuilt, whole)
        assert shard.axis == SPLIT_AXES[name.split("layers.")[-1].lstrip("0123456789.")]
        if shard.axis is None:
            assert (holders == tp).all()
        elif ".k_proj." not in name and ".v_proj." not in name:  # KV heads may be on several ranks
            assert (holders == 1).all()


def test_the_config_determines_the_tensors():
    names = set(make_plan(make_config(tie_word_embeddings=True), 2).tensors)
    assert "lm_head.weight" not in names
    assert not [name for name in names if name.endswith("bias")]
    assert len(names) == 2 + 2 * 9
    all_names = set(make_plan(make_config(attention_bias=True, mlp_bias=True), 2).tensors)
    assert len(all_names) == 3 + 2 * 16
    assert make_plan(make_config(), 2).tensors["model.layers.1.self_attn.k_proj.weight"].shape == (18, 20)


@pytest.mark.parametrize("tp", [-1, 0, 10])
def test_an_impossible_tp_is_rejected_with_the_possible_ones(tp):
    with pytest.raises(InputError, match=rf"--tp {tp}: .*9 attention heads.* 1 to 9 "):
        make_plan(make_config(9, 3), tp)


# --- unequal shares -------------------------------------------------------------------------------------

SHARES = ["3,1", "1,5", "2,3,1", "5,1,1,2", "0.6,0.4", "1000,1,1", "1,1,1000", ".5,1e1,2.", "7"]


@pytest.mark.parametrize("split", SHARES)
@every_model
def test_each_rank_has_its_share_rounded_to_a_whole_number(split, heads, kv_heads):
    shares = shares_in(split)
    tp = len(shares)
    if tp > heads:
        return
    plan = make_plan(make_config(heads, kv_heads), tp, shares)
    for ranges, n in ((plan.head_ranges, heads), (plan.ffn_ranges, 37), (plan.vocab_ranges, 101)):
        assert [start for start, _ in ranges] == [0, *[stop for _, stop in ranges[:-1]]]
        assert ranges[-1][1] == n
        exact = [n * float(share) / float(sum(shares)) for share in shares]
        raised = sum(size < 1 for size in exact)  # ranks that get one because their share is less
        for (start, stop), size in zip(ranges, exact, strict=True):
            assert stop - start >= 1
            assert abs(stop - start - size) < 1 + raised
    for rank, (start, stop) in enumerate(plan.head_ranges):
        assert plan.kv_head_ranges[rank] == (
            start * kv_heads // heads,
            (stop - 1) * kv_heads // heads + 1,
        )


def test_equal_shares_of_any_size_are_the_even_split():
    for tp in range(1, 10):
        for share in ("1", "0.3", "12"):
            equal = make_plan(make_config(), tp, shares_in(",".join([share] * tp)))
            assert equal == make_plan(make_config(), tp)


def test_the_largest_remainders_get_what_is_left():
    assert split_in_proportion(10, [1, 1, 1]) == ((0, 4), (4, 7), (7, 10))  # equal remainders: the first
    assert split_in_proportion(10, [5, 3, 3]) == ((0, 4), (4, 7), (7, 10))  # 4.55, 2.73, 2.73
    assert split_in_proportion(9, [3, 1]) == ((0, 7), (7, 9))  # 6.75, 2.25
    assert split_in_proportion(4, [100, 1, 1]) == ((0, 2), (2, 3), (3, 4))
    assert split_in_proportion(2, [1, 1, 5]) == ((0, 0), (0, 0), (0, 2))  # fewer than ranks


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("3,0", ("rank 1", "'0'")),
        ("3,-1", ("rank 1", "'-1'")),
        ("nan,1", ("rank 0", "'nan'")),
        ("1,inf", ("rank 1", "'inf'")),
        ("1/3,1", ("rank 0", "'1/3'")),
        ("3,,1", ("rank 1", "''")),
        ("", ("rank 0", "''")),
        ("fast,slow", ("'fast'", "auto or memory")),
    ],
)
def test_a_share_that_is_no_positive_number_is_rejected(split, words):
    with pytest.raises(InputError) as error:
        shares_in(split)
    assert all(word in str(error.value) for word in ("--split", *words))


def test_shares_that_do_not_fit_the_ranks_or_the_heads_are_rejected():
    with pytest.raises(InputError, match="--split has 2 shares for 3 ranks"):
        make_plan(make_config(), 3, shares_in("3,1"))
    with pytest.raises(InputError, match=r"--split with 10 shares: .*9 attention heads"):
        make_plan(make_config(), 10, shares_in(",".join("1" * 10)))


def test_shares_by_speed_respect_the_memory():
    gb = 1e9
    assert shares_by_speed([30, 10], [80 * gb, 80 * gb], 20 * gb) == "3,1"
    assert shares_by_speed([30.4, 10.1, 9.9], [80 * gb] * 3, 20 * gb) == "3.1,1,1"
    assert shares_by_speed([30, 10], [10 * gb, 80 * gb], 20 * gb) == "0.4,0.6"  # 8 of the 20 GB fit
    assert shares_by_speed([30, 10, 10], [10 * gb, 80 * gb, 80 * gb], 20 * gb) == "0.4,0.3,0.3"
    assert shares_by_speed([30, 10], [10 * gb, 5 * gb], 20 * gb) == "2,1"  # too large: by memory
    assert in_tenths([24 * gb, 16.1 * gb]) == "1.5,1"
