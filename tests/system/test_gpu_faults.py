"""Tests that `check` blames the faults of `faults` on a GPU in 16 bits too, on both paths.

The stand-in's tensor cores truncate like real ones, so the bounds are those of a GPU. Each fault is tried at
one place.
"""

from dataclasses import replace
from itertools import cycle

import pytest
from check_models import MODELS, PROMPT, SHAPE, blame, write_models
from faults import FAULTS, Fault, places_of
from faulty_model import Faulty, FaultyModel, changed, hook_ops, times
from on_gpu import run_on_gpus

from minitp.check.run import check_model
from minitp.cuda.fused import FusedModel
from minitp.cuda.prefill import Prefill
from minitp.cuda.prompt_pass import PromptPass
from minitp.load import load_model
from minitp.loading.source import open_model

pytestmark = pytest.mark.usefixtures("cupy")

HALVES = ("float16", "bfloat16")
SHAPES = {"explicit": SHAPE, "fused": {**SHAPE, "hidden_size": 40, "head_dim": 8}}

# Faults that are too small for 16 bits, with larger ones to use instead. Rounding changes a number by up to
# 2^-11 of its size in float16 and 2^-8 in bfloat16, and a step may have twice the error of such roundings.
larger_eps = {"rms_norm": changed(_3=lambda eps: eps * 1e4)}
TOO_SMALL = {
    # eps is 1e-5, and the mean square is near 1: a tenth of eps changes the norm by 4.5e-6, 1e4 eps by 5e-2.
    "wrong eps": larger_eps,
    "wrong eps before the mlp": larger_eps,
    # The factor is 1 + 1e-4 there and 1.05 here.
    "projections slightly off": {"column_parallel": times(1.05)},
}

# Faults that the fused path can have: wrong weights, and errors in the collectives and operations of `ops`
# that it calls for a prompt. The rest of the path consists of kernels, whose faults are in test_gpu_model.
ON_THE_FUSED_PATH = [
    *("biases missing", "biases added twice", "projections slightly off"),
    *("all-reduce left out", "all-reduce left out after the mlp", "all-reduce of the embedding left out"),
    *("all-reduce left out on one rank", "all-reduce done twice", "all-reduce done twice after the mlp"),
    *(
        "mean instead of sum",
        "bias on every rank",
        "bias on every rank of the mlp",
        "last bit of the sum",
    ),
    *("logits in the wrong order", "logits in the wrong order on one rank", "gate and up mixed up"),
    *("logits not capped", "logits not scaled", "last row of the head missing"),
    *("head not tied", "neighbor's KV heads", "shard of the wrong columns", "shard of the wrong rows"),
    *(
        "gate and up weights swapped",
        "weights slightly off",
        "one weight slightly off",
        "last bit of a weight",
    ),
    *(
        "logits in 16 bits",
        "token of the step before",
        "not the most probable token",
        "prompt shifted by one",
    ),
]


class FaultyPromptPass(PromptPass):
    """A PromptPass whose products with a bias and sums are calls within a block of a faulty model."""

    def _attend(self, i, layer, *args):
        return self.model._within("attn", i, layer, super()._attend, i, layer, *args)

    def _activations(self, i, layer, *args):
        return self.model._within("mlp", i, layer, super()._activations, i, layer, *args)

    def _summed(self, block, i, *args):
        return self.model._within(block, i, self.model.weights.layers[i], super()._summed, block, i, *args)

    def _sum(self, partial, out):
        """Sum with `comm.all_reduce`, which has hooks."""
        out[...] = self.comm.all_reduce(partial)
        return out


class FaultyPrefill(Prefill):
    """A Prefill of FaultyPromptPasses."""

    def _new_pass(self, *args, **options):
        return FaultyPromptPass(self, *args, **options)


class FaultyFusedModel(Faulty, FusedModel):
    """A FusedModel with a Fault, whose hooks apply to the prefill."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prefill = FaultyPrefill(self)


KINDS = {"explicit": FaultyModel, "fused": FaultyFusedModel}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write the models; return {(path, name): directory}."""
    root = tmp_path_factory.mktemp("faults")
    written = {path: write_models(root / path, shape) for path, shape in SHAPES.items()}
    return {(path, name): folder for path, folders in written.items() for name, folder in folders.items()}


def check(directory, fault, place, dtype, path):
    """Run `check` with a fault in the last layer; return its result and the calls made, (block, name)."""
    from minitp.cuda.gpu import with_dtype
    from minitp.cuda.loader import GpuLoader

    tp, layer, rank = place
    source, calls = open_model(str(directory), tp, layer + 1), set()

    def run(comm):
        device = with_dtype(comm.gpu, dtype, source.config.dtype)
        if fault.everywhere or comm.rank == rank:
            weights = GpuLoader(source.plan, comm.shard_rank, source.tensors, device).load()
            model = KINDS[path](fault, layer, source, weights, comm, device)
        else:
            model = load_model(source, comm, device, path=path)
        result = check_model(source, model, PROMPT, fault.decode)
        calls.update(getattr(model, "calls", ()))
        return result

    return run_on_gpus(tp, run)[0], calls


def hooked_calls(fault):
    """Return the calls, (block, name), in which the fault has hooks."""
    return {(fault.block, name) for name in fault.hooks}


def numbered():
    """Return {name: (fault, place)}, with faults large enough for 16 bits, few ranks and an early layer."""
    found = {}
    for number, fault in enumerate(FAULTS):
        hooks = TOO_SMALL.get(fault.name, fault.hooks)
        found[fault.name] = replace(fault, hooks=hooks), min(places_of(number))
    return found


CASES = numbered()


@pytest.mark.parametrize(("name", "dtype"), list(zip(CASES, cycle(HALVES), strict=False)))
def test_a_fault_of_the_explicit_path_is_blamed(name, dtype, models, monkeypatch):
    hook_ops(monkeypatch)
    fault, place = CASES[name]
    result, calls = check(models["explicit", fault.model], fault, place, dtype, "explicit")
    assert hooked_calls(fault) <= calls, "a hook was never called"
    assert blame(result) == fault.blame(*place[1:], result.passes)


@pytest.fixture
def cublas(monkeypatch):
    """Let prompts of any length use cuBLAS and the operations around it, like long ones."""
    monkeypatch.setattr("minitp.cuda.prefill.CAPTURED_ROWS", 0)


@pytest.mark.parametrize(("name", "dtype"), list(zip(ON_THE_FUSED_PATH, cycle(HALVES), strict=False)))
def test_a_fault_of_the_fused_path_is_blamed(name, dtype, models, monkeypatch, cublas):
    """Check the blame; where the bias is added with the residual, the stream is blamed instead of the sum."""
    hook_ops(monkeypatch)
    fault, (tp, layer, rank) = CASES[name]
    if fault.steps != "tokens":
        fault = replace(fault, decode=0)  # decode passes use kernels only
    result, calls = check(models["fused", fault.model], fault, (tp, layer, rank), dtype, "fused")
    assert hooked_calls(fault) <= calls, "a hook was never called"
    expected = fault.blame(layer, rank, result.passes)
    if fault.model == "biased" and expected[0][0].endswith((".attn.out", ".mlp.out")):
        streams = [name.removesuffix("out") + "residual" for name, _ in expected]
        expected = [(stream, r) for stream in streams for r in (range(tp) if fault.everywhere else [rank])]
    assert blame(result) == expected


def test_the_list_has_all_faults_that_the_fused_path_can_have(models, monkeypatch, cublas):
    hook_ops(monkeypatch)
    calls, nothing = {}, Fault("nothing", "embed", decode=0)
    for model in MODELS:
        calls[model] = check(models["fused", model], nothing, (2, 0, 0), "float16", "fused")[1]
    can = [name for name, (fault, _) in CASES.items() if hooked_calls(fault) <= calls[fault.model]]
    assert can == ON_THE_FUSED_PATH


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", TOO_SMALL)
def test_faults_too_small_for_16_bits(name, dtype, models, monkeypatch):
    """Check on a single rank; several ranks would notice that their bits differ."""
    hook_ops(monkeypatch)
    fault = next(fault for fault in FAULTS if fault.name == name)
    result, calls = check(models["explicit", fault.model], fault, (1, 0, 0), dtype, "explicit")
    assert hooked_calls(fault) <= calls
    assert blame(result) == []
