"""`check` on a GPU in 16 bits: the faults of `faults` are blamed there too, on both paths.

The stand-in's tensor cores cut off what they add, as real ones do, so the bounds are those of a GPU. Each
fault is tried at one place.
"""

from dataclasses import replace

import pytest
from check_models import MODELS, PROMPT, SHAPE, blame, write_models
from faults import FAULTS, Fault, places_of
from faulty_model import Faulty, FaultyModel, changed, hook_ops, times
from on_gpu import run_on_gpus

from minitp.check.run import check_model
from minitp.cuda.fused import FusedModel, unfit
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.record import passes_of

pytestmark = pytest.mark.usefixtures("cupy")

HALVES = ("float16", "bfloat16")
SHAPES = {"explicit": SHAPE, "fused": {**SHAPE, "hidden_size": 40, "head_dim": 8}}

# Faults too small for 16 bits, and hooks that do the same visibly. Rounding moves a number by up to 2^-11 of
# its size in float16 and 2^-8 in bfloat16, and a step may be twice as far off as that makes it.
larger_eps = {"rms_norm": changed(_3=lambda eps: eps * 1e4)}
TOO_SMALL = {
    # eps is 1e-5, beside a mean square near 1: a tenth of it moves the norm by 4.5e-6, 1e4 times it by 5e-2.
    "wrong eps": larger_eps,
    "wrong eps before the mlp": larger_eps,
    # 1e-4 there, 5e-2 here.
    "projections slightly off": {"column_parallel": times(1.05)},
}

# What the fused path can have: wrong weights, and what is wrong in those operations of `ops` and collectives
# that it calls for a prompt. The rest are kernels, whose faults are in test_cuda_model.
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
    *("embedding off by one", "last row of the embedding missing", "last row of the head missing"),
    *("head not tied", "neighbor's KV heads", "shard of the wrong columns", "shard of the wrong rows"),
    *(
        "gate and up weights swapped",
        "weights slightly off",
        "one weight slightly off",
        "last bit of a weight",
    ),
    "logits in 16 bits",
]


class FaultyFusedModel(Faulty, FusedModel):
    """A FusedModel with a Fault: a layer's products with a bias and its sums are in its blocks."""

    def _prefill_attention(self, i, layer, *args):
        return self._within("attn", i, layer, super()._prefill_attention, i, layer, *args)

    def _columns(self, h, w, bias):
        for i, layer in enumerate(self.weights.layers):
            if w is layer.w_gate_up:
                return self._within("mlp", i, layer, super()._columns, h, w, bias)
        return super()._columns(h, w, bias)

    def _partial(self, block, i, *args):
        return self._within(block, i, self.weights.layers[i], super()._partial, block, i, *args)


KINDS = {"explicit": FaultyModel, "fused": FaultyFusedModel}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(path, name) -> directory"""
    root = tmp_path_factory.mktemp("faults")
    found = {path: write_models(root / path, shape) for path, shape in SHAPES.items()}
    return {(path, name): directory for path, some in found.items() for name, directory in some.items()}


def check(directory, fault, place, dtype, path):
    """The CheckResult of rank 0, and where the ranks with the fault have looked for hooks: (block, name).

    The model's layers end with the one that has the fault.
    """
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
        result = check_model(source, model, PROMPT, passes_of(len(PROMPT), fault.decode))
        calls.update(getattr(model, "calls", ()))
        return result

    return run_on_gpus(tp, run)[0], calls


def wanted(fault):
    """The calls in which the fault has its hooks."""
    return {(fault.block, name) for name in fault.hooks}


def numbered():
    """(fault, place) by name: as large as 16 bits show it; of few ranks, and in an early layer."""
    found = {}
    for number, fault in enumerate(FAULTS):
        hooks = TOO_SMALL.get(fault.name, fault.hooks)
        found[fault.name] = replace(fault, hooks=hooks), min(places_of(number))
    return found


CASES = numbered()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CASES)
def test_a_fault_of_the_explicit_path_is_blamed(name, dtype, models, monkeypatch):
    hook_ops(monkeypatch)
    fault, place = CASES[name]
    result, calls = check(models["explicit", fault.model], fault, place, dtype, "explicit")
    assert wanted(fault) <= calls, "a hook that nobody looks for"
    assert blame(result) == fault.blame(*place[1:], result.passes)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ON_THE_FUSED_PATH)
def test_a_fault_of_the_fused_path_is_blamed(name, dtype, models, monkeypatch):
    """Where the bias comes with the addition to the stream, the sum is not seen: the stream is blamed."""
    hook_ops(monkeypatch)
    fault, (tp, layer, rank) = CASES[name]
    fault = replace(fault, decode=0)  # then come the kernels
    result, calls = check(models["fused", fault.model], fault, (tp, layer, rank), dtype, "fused")
    assert wanted(fault) <= calls, "a hook that nobody looks for"
    expected = fault.blame(layer, rank, result.passes)
    if fault.model == "biased" and expected[0][0].endswith((".attn.out", ".mlp.out")):
        stream = expected[0][0].removesuffix("out") + "residual"
        expected = [(stream, r) for r in (range(tp) if fault.everywhere else [rank])]
    assert blame(result) == expected


def test_which_faults_the_fused_path_can_have(models, monkeypatch):
    hook_ops(monkeypatch)
    calls, nothing = {}, Fault("nothing", "embed", decode=0)
    for model in MODELS:
        source = open_model(str(models["fused", model]), 2)
        if unfit(source.config, source.plan, open_device("float16"), "auto") is None:
            calls[model] = check(models["fused", model], nothing, (2, 0, 0), "float16", "fused")[1]
    assert set(calls) == {"biased", "tied", "scaled", "loud", "window"}
    can = [name for name, (fault, _) in CASES.items() if wanted(fault) <= calls.get(fault.model, set())]
    assert can == ON_THE_FUSED_PATH


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", TOO_SMALL)
def test_16_bits_do_not_show(name, dtype, models, monkeypatch):
    """On a single rank; several find out that they have not the same bits."""
    hook_ops(monkeypatch)
    fault = next(fault for fault in FAULTS if fault.name == name)
    result, calls = check(models["explicit", fault.model], fault, (1, 0, 0), dtype, "explicit")
    assert wanted(fault) <= calls
    assert blame(result) == []
