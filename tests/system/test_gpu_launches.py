"""A test of the number of launches in a captured decode pass, which docs/performance.md states."""

import pytest
from on_gpu import model_on_gpu, run_on_gpus
from tiny import write_tiny

from minitp.generate import prefill

pytestmark = pytest.mark.usefixtures("cupy")

LAYERS = 2


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("launches")
    kinds = {"dense": {}, "experts": MIXTRAL}
    return {kind: write_tiny(root / kind, num_hidden_layers=LAYERS, **kinds[kind]) for kind in kinds}


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
        ("experts", 1, "nccl", 1, 8, 4),
        ("experts", 2, "nccl", 2, 12, 8),
    ],
)
def test_launches_of_a_pass(models, monkeypatch, kind, ranks, transport, sequences, per_layer, others):
    def run(comm):
        model = model_on_gpu(models[kind], comm)
        model.connect()
        pool = model.new_pool(4)
        caches = [model.new_cache(16) for _ in range(sequences)]
        for row, cache in enumerate(caches):
            cache.pool, cache.block_table = pool, [row]
            prefill(model, cache, [1, 2, 3])
        model.forward_batch([([4], cache) for cache in caches], logits_at=slice(None))
        return len(pool.graphs[sequences]._graph.launches)

    monkeypatch.setattr("minitp.cuda.peer.AllReduce", PeerSums)
    assert run_on_gpus(ranks, run, transport) == [per_layer * LAYERS + others] * ranks
