"""A test of the number of launches in a captured decode pass, which docs/performance.md states."""

import pytest
from check_models import MODELS
from on_gpu import model_on_gpu, run_on_gpus
from tiny import write_tiny

from minitp.generate import prefill

pytestmark = pytest.mark.usefixtures("cupy")

LAYERS = 2
# Kernels that may start while the previous one ends.
PRODUCTS = ("store", "residual", "logits", "swiglu", "qkv")
DEPENDENTS = {*PRODUCTS, "attention_decode", "rms_norm", "all_reduce", "all_reduce_norm"}
DEPENDENTS |= {"route", "expert_swiglu", "expert_down", "expert_sum"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("launches")
    kinds = {"dense": {}, **MODELS}
    return {
        kind: write_tiny(root / kind, num_hidden_layers=LAYERS, **fields) for kind, fields in kinds.items()
    }


class PeerSums:
    """A replacement for AllReduce that launches nothing; ranks that are threads cannot wait in a kernel."""

    def __init__(self, *args):
        import cupy

        self._run = cupy.cuda.run

    def __call__(self, partial, out):
        self._run(lambda: None)

    def add_and_norm(self, *args):
        self._run(lambda: None)


@pytest.mark.parametrize(
    ("kind", "ranks", "transport", "sequences", "per_layer", "others"),
    [
        ("dense", 1, "nccl", 1, 5, 4),  # norms are fused into the products
        ("dense", 1, "nccl", 2, 7, 5),
        *(("dense", ranks, "nccl", sequences, 9, 8) for ranks in (2, 4) for sequences in (1, 2)),
        *(("dense", ranks, "peer", sequences, 7, 8) for ranks in (2, 4) for sequences in (1, 2)),
        ("mixture", 1, "nccl", 1, 8, 4),
        ("mixture", 2, "nccl", 2, 12, 8),
        # Families with more options than Llama.
        *((kind, 1, "nccl", 1, 5, 4) for kind in ("granite", "yarn", "unturned", "partial")),
        ("normed", 1, "nccl", 1, 6, 4),
        ("gemma", 1, "nccl", 1, 7, 4),
        ("gemma3", 1, "nccl", 1, 8, 4),
        ("gemma3", 2, "peer", 1, 10, 8),
    ],
)
def test_launches_of_a_pass(cupy, models, monkeypatch, kind, ranks, transport, sequences, per_layer, others):
    def run(comm):
        model = model_on_gpu(models[kind], comm)
        model.connect()
        pool = model.new_pool(4)
        caches = [model.new_cache(16) for _ in range(sequences)]
        for row, cache in enumerate(caches):
            cache.pool, cache.block_table = pool, [row]
            prefill(model, cache, [1, 2, 3])
        model.forward_batch([([4], cache) for cache in caches], logits_at=slice(None))
        return pool.graphs[sequences]._graph.launches

    monkeypatch.setattr("minitp.cuda.peer.AllReduce", PeerSums)
    for launches in run_on_gpus(ranks, run, transport):
        assert len(launches) == per_layer * LAYERS + others
        kernels = [launch for launch in launches if isinstance(launch, cupy.cuda.driver.Launch)]
        for launch in kernels:
            assert launch.dependent == (launch.kernel.name in DEPENDENTS), launch.kernel.name
