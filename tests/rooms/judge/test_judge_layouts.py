"""The judgement of arrays in other layouts than a trace's, and of arrays that fit no layout."""

import numpy as np
import pytest
from paths import GOLDENS, PROBED
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.cli.main import main
from minitp.trace.names import split_name

LLAMA = PROBED / "llama2.safetensors"  # 5 tokens, then 1; 6 query heads, 2 KV heads
SCORE_ROOT = 6**0.5  # the head size is 6


@pytest.fixture
def judge(tmp_path, capsys):
    """A function that judges a recording changed by change(step, array), and returns exit code and output."""

    def judge(change, path=LLAMA, model="llama2", is_trace=True, more=lambda arrays: None):
        with safe_open(path, "np") as file:
            arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        arrays = {name: change(split_name(name)[2], array) for name, array in arrays.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        more(arrays)
        target = tmp_path / ("engine.safetensors" if is_trace else "engine.npz")
        save_file(arrays, target, metadata) if is_trace else np.savez(target, **arrays)
        code = main(["judge", str(target), "--model", str(GOLDENS / model)])
        return code, capsys.readouterr().out

    return judge


def tokens_first(step, array):
    return array.transpose(1, 0, 2) if step in ("attn.q_rope", "attn.k_rope", "attn.q_norm") else array


def repeated(step, array):
    kv = ("attn.k", "attn.v", "attn.k_rope", "attn.k_cache", "attn.v_cache")
    return np.repeat(array, 3, axis=0) if step in kv else array


def repeated_joined(step, array):
    array = repeated(step, array)
    return array.transpose(1, 0, 2).reshape(array.shape[1], -1) if step == "attn.k_cache" else array


def long_cache(step, array):
    """Give a cache and the probabilities room for 9 positions."""
    if step in ("attn.k_cache", "attn.v_cache"):
        return np.concatenate((array, np.zeros((2, 9 - array.shape[1], 6), array.dtype)), axis=1)
    if step == "attn.probs":
        return np.concatenate((array, np.zeros((*array.shape[:2], 9 - array.shape[2]), array.dtype)), axis=2)
    return array


def with_batch_axis(step, array):
    return array[None] if array.ndim == 2 else array


@pytest.mark.parametrize("is_trace", [True, False])
@pytest.mark.parametrize(
    "change",
    [tokens_first, repeated, repeated_joined, long_cache, with_batch_axis],
    ids=lambda f: f.__name__,
)
def test_right_arrays_in_other_layouts_are_right(change, is_trace, judge):
    code, out = judge(change, is_trace=is_trace)
    assert code == 0, out
    assert "not judged" not in out
    assert "(82 arrays on 1 rank)" in out


def test_tiled_copies_of_kv_heads_are_copies_too(judge):
    """A wrong choice among the heads is a fault of attention, not of the cache."""

    def tiled(step, array):
        return np.tile(array, (3, 1, 1)) if step in ("attn.k_cache", "attn.v_cache") else array

    assert judge(tiled)[0] == 0


@pytest.mark.parametrize("mask", [-1e9, -65504.0, float(np.finfo(np.float32).min)])
def test_masked_scores_may_be_large_negative_numbers(mask, judge):
    def add_scores(arrays):
        for name in [name for name in arrays if name.endswith("attn.probs")]:
            q, k = (arrays[name.replace("probs", step)].astype(np.float64) for step in ("q_rope", "k_cache"))
            scores = q @ np.repeat(k, 3, axis=0).transpose(0, 2, 1) / SCORE_ROOT  # [H, T, S]
            arrays[name.replace("probs", "scores")] = np.where(arrays[name] > 0, scores, mask).astype(
                np.float32
            )

    code, out = judge(lambda step, array: array, more=add_scores)
    assert code == 0, out
    assert "attn.scores" in out.partition("not recorded")[0]


@pytest.mark.parametrize("is_trace", [True, False])
def test_queries_may_be_stored_times_the_scale(is_trace, judge):
    def divided(divisor):
        return lambda step, array: array / divisor if step == "attn.q_rope" else array

    code, out = judge(divided(SCORE_ROOT), is_trace=is_trace)
    assert code == 0, out
    assert "attn.q_rope is stored times 0.408, the scale of the scores\n" in out
    code, out = judge(divided(2), is_trace=is_trace)
    assert code == 1
    assert "the right result times 0.5" in out


def test_an_array_that_fits_no_layout_is_not_judged(judge):
    code, out = judge(lambda step, array: array[:, :-1] if step == "mlp.act" else array)
    assert code == 0
    assert "not judged, because of their shapes: mlp.act is [1, 63], expected [1, 64] (2 arrays); " in out
    assert "mlp.act is [5, 63], expected [5, 64] (2 arrays)\n" in out


def test_copies_of_kv_heads_that_differ_are_not_judged(judge):
    def drifting(step, array):
        array = repeated(step, array)
        return array + np.arange(6, dtype=np.float32)[:, None, None] if step == "attn.k_cache" else array

    code, out = judge(drifting)
    assert code == 0
    assert (
        "attn.k_cache is [6, 5, 6], expected [2, 5, 6]; repeated KV heads that are not equal? (2 arrays)"
        in out
    )


def test_a_block_of_which_nothing_fits_is_named(judge):
    def cut(step, array):
        if step.endswith("cache"):
            return None
        return array[..., :-1] if step.startswith("attn.") else array

    code, out = judge(cut)
    assert code == 0, out
    assert "no array is left to judge of attn of layer 0, attn of layer 1\n" in out
    assert "mlp of layer" not in out
