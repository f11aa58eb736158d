"""Tests that `check` passes for every family of the goldens in bfloat16, on the stand-in's GPUs."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from check_random_models import alarms, check_number
from on_gpu import model_on_gpu, run_on_gpus
from paths import GOLDENS

from minitp.check.run import check_model
from minitp.loading.source import open_model

pytestmark = pytest.mark.usefixtures("cupy")

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
# Families whose operations and sizes all have kernels; `unfit` says what the others lack.
FUSED = {
    "llama-bias",
    "llama1",
    "mistral-nemo",
    "mistral-v01",
    "mistral-v03",
    "mixtral-window",
    "text",
    "tinyllama",
}
PROMPT = [3, 40, 60, 80, 15]


def checked(name, path):
    """Check a golden at TP=2; return the model's class and the findings that are blamed."""
    source = open_model(str(GOLDENS / name), 2)

    def rank(comm):
        model = model_on_gpu(GOLDENS / name, comm, "bfloat16", path=path)
        result = check_model(source, model, PROMPT, 1)
        return type(model).__name__, [(found.name, found.rank, found.note) for found in result.blamed()]

    return run_on_gpus(2, rank)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_explicit_operations(name):
    assert checked(name, "explicit") == ("Model", [])


@pytest.mark.parametrize("name", sorted(FUSED))
def test_the_kernels(name):
    assert checked(name, "fused") == ("FusedModel", [])


@pytest.mark.parametrize("number", range(4))  # a model of each such family
def test_the_kernels_with_random_models(number):
    """Check that nothing is blamed; check_random_models.py makes many such runs."""
    run, result = check_number(0, number, path="fused")
    assert alarms(result) == [], run


def test_the_families_with_kernels():
    from minitp.cuda.fused import unfit

    device = SimpleNamespace(dtype=np.dtype(ml_dtypes.bfloat16))
    sources = {name: open_model(str(GOLDENS / name), 2) for name in NAMES}
    assert {name for name, s in sources.items() if unfit(s.config, s.plan, device, "auto") is None} == FUSED
