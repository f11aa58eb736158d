"""How many launches a captured decoding step has: docs/performance.md counts on it."""

import pytest
from on_gpu import model_on_gpu, run_on_gpus
from tiny import write_tiny

from minitp.generate import prefill

pytestmark = pytest.mark.usefixtures("cupy")

LAYERS = 2


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("launches") / "model", num_hidden_layers=LAYERS)


class PeerSums:
    """In place of AllReduce: a launch each, of nothing; ranks that are threads cannot wait in a kernel."""

    def __init__(self, *args):
        import cupy

        self._run = cupy.cuda.run

    def __call__(self, partial, out):
        self._run(lambda: None)

    def add_and_norm(self, *args):
        self._run(lambda: None)


@pytest.mark.parametrize(
    ("ranks", "transport", "sequences", "a_layer", "beside"),
    [
        (1, "nccl", 1, 5, 4),  # norms inside the products
        (1, "nccl", 2, 7, 5),
        *((ranks, "nccl", sequences, 9, 8) for ranks in (2, 4) for sequences in (1, 2)),
        *((ranks, "peer", sequences, 7, 8) for ranks in (2, 4) for sequences in (1, 2)),
    ],
)
def test_launches_of_a_step(model_directory, monkeypatch, ranks, transport, sequences, a_layer, beside):
    def run(comm):
        model = model_on_gpu(model_directory, comm)
        model.connect()
        pool = model.new_pool(4)
        caches = [model.new_cache(16) for _ in range(sequences)]
        for row, cache in enumerate(caches):
            cache.pool, cache.block_table = pool, [row]
            prefill(model, cache, [1, 2, 3])
        model.forward_batch([([4], cache) for cache in caches], logits_at=slice(None))
        return len(pool.graphs[sequences]._graph.launches)

    monkeypatch.setattr("minitp.cuda.peer.AllReduce", PeerSums)
    assert run_on_gpus(ranks, run, transport) == [a_layer * LAYERS + beside] * ranks
