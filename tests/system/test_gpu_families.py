"""Tests that `check` passes for every family of the goldens in 16 bits, on the stand-in's GPUs."""

from itertools import cycle

import pytest
from check_random_models import alarms, check_number
from faulty_kernels import arguments, replaced, without_macro, without_options
from on_gpu import model_on_gpu, run_on_gpus
from paths import GOLDENS

from minitp.check.run import check_model
from minitp.loading.source import open_model

pytestmark = pytest.mark.usefixtures("cupy")

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
# A golden of each family, with as many of its operations as possible, for the explicit operations.
EXPLICIT = ["gemma2", "gemma3", "granite-bias", "llama-bias", "mistral-v01", "mixtral-window", "phi3-partial"]
EXPLICIT += ["qwen2-window", "qwen3-moe", "qwen3-yarn", "smollm3-window"]
PROMPT = [3, 40, 60, 80, 15, 7, 60, 21]


def checked(name, path, dtype="bfloat16", tp=2, decode=1, batch=0):
    """Check a golden; return the model's class and the findings that are blamed, (step, rank, note)."""
    source = open_model(str(GOLDENS / name), tp)

    def rank(comm):
        model = model_on_gpu(GOLDENS / name, comm, dtype, path=path)
        result = check_model(source, model, PROMPT, decode, batch)
        return type(model).__name__, [(found.name, found.rank, found.note) for found in result.blamed()]

    return run_on_gpus(tp, rank)[0]


@pytest.mark.parametrize("name", EXPLICIT)
def test_the_explicit_operations(name):
    assert checked(name, "explicit") == ("Model", [])


# Each golden in one dtype, with one number of ranks; the families have several goldens.
RUNS = list(zip(NAMES, cycle(("bfloat16", "float16")), cycle((1, 2, 3)), strict=False))


@pytest.mark.parametrize(("name", "dtype", "tp"), RUNS)
def test_the_kernels(name, dtype, tp):
    assert checked(name, "fused", dtype, tp) == ("FusedModel", [])


@pytest.mark.parametrize("name", ["gemma3", "phi3-half"])
def test_the_kernels_with_a_batch(name):
    assert checked(name, "fused", batch=3) == ("FusedModel", [])


@pytest.mark.parametrize("number", [5, 7, 8])  # SmolLM3, Gemma 3, Granite: small models
def test_the_kernels_with_random_models(number):
    """Check that nothing is blamed; check_random_models.py makes many such runs."""
    run, result = check_number(0, number, path="fused")
    assert alarms(result) == [], run


# --- faults ---------------------------------------------------------------------------------------------


def other_window(original):
    """Return a method that gives layers with a window the kernel for those without, and vice versa."""

    def by_window(*args):
        kernels = original(*args)
        return dict(zip(kernels, reversed(kernels.values()), strict=True))

    return by_window


def windows_swapped(monkeypatch):
    from minitp.cuda.kernels import Kernels

    monkeypatch.setattr(Kernels, "attention_decode", other_window(Kernels.attention_decode))


def reversed_ropes(tables):
    return tables[0][::-1].copy(), tables[1]


def without_factors(tables):
    return tables[0], 0 * tables[1] + 1


# An operation that only some families have, wrong in one kernel: (golden, change, step to be blamed first).
FAULTS = {
    "weights without added one": ("gemma2", without_macro("PLUS_ONE"), "prefill/layers.0.attn.norm"),
    "no norm after the block": ("gemma2", without_macro("POST_NORM"), "prefill/layers.0.attn.residual"),
    "SiLU instead of GELU": ("gemma2", without_macro("GELU"), "prefill/layers.0.mlp.act"),
    "scores not capped": ("gemma2", without_macro("SOFT_CAP"), "prefill/layers.0.attn.context"),
    "logits not capped": ("gemma3", without_macro("SOFT_CAP"), "decode.1/logits_partial"),
    "the window of other layers": ("gemma2", windows_swapped, "decode.1/layers.0.attn.context"),
    "k_norm for q": (
        "qwen3", arguments("heads", "Heads", "__call__", replaced(1, lambda norms: norms[::-1])),
        "prefill/layers.0.attn.q_rope",
    ),
    "the RoPE of other layers": (
        "gemma3", arguments("begin_decode", "BeginDecode", "__call__", replaced(3, reversed_ropes)),
        "prefill/layers.0.attn.q_rope",
    ),
    "no attention factor": (
        "qwen3-yarn", arguments("begin_decode", "BeginDecode", "__call__", replaced(3, without_factors)),
        "prefill/layers.0.attn.q_rope",
    ),
    "fewer rotated dimensions": (
        "phi3-half", arguments("linear", "Linear", "qkv", replaced(11, lambda size: size - 2)),
        "decode.1/layers.0.attn.q_rope",
    ),
    "fewer rotated dimensions in a prompt": (
        "phi3-half", arguments("heads", "Heads", "__init__", replaced(2, lambda size: size - 2)),
        "prefill/layers.0.attn.q_rope",
    ),
    "embeddings not scaled": (
        "granite", arguments("begin_decode", "BeginDecode", "__init__", replaced(3, lambda multiplier: 1.0)),
        "prefill/embed_partial",
    ),
    "output of attention not scaled": (
        "granite", arguments("linear", "Linear", "residual", replaced(4, lambda multiplier: 1.0)),
        "decode.1/layers.0.attn.residual",
    ),
    "output of attention not scaled in a prompt": (
        "granite", arguments("rms_norm", "RmsNorm", "__call__", lambda args: args[:7]),
        "prefill/layers.0.attn.residual",
    ),
    "logits not divided": (
        "granite", without_options("linear", "Linear", "logits"), "decode.1/logits_partial"
    ),
    "scores scaled as in Llama": (
        "granite", without_options("attention_decode", "AttentionDecode", "__init__"),
        "decode.1/layers.0.attn.context",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_is_blamed(monkeypatch, name):
    golden, change, step = FAULTS[name]
    change(monkeypatch)
    assert checked(golden, "fused", tp=1)[1][0][0] == step
