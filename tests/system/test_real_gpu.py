"""Tests on a real GPU: the fused path against the explicit one, graphs, sampling, NCCL, loading."""

import json
from dataclasses import replace

import numpy as np
import pytest
from check_models import MODELS
from on_gpu import STAND_IN
from real_gpu import HALVES, NEEDS_GPU, drawn, same_each_time
from tiny import write_tiny

from minitp.bench.fake_weights import TiledWeights
from minitp.comm.single import SingleRank
from minitp.device import DTYPES
from minitp.errors import MinitpError
from minitp.generate import generate, host_logits
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.loading.weights import named_slices
from minitp.request import Request
from minitp.sampling import SamplingParams

pytestmark = NEEDS_GPU


# --- models ---------------------------------------------------------------------------------------------


TINY = {"tiny": {}, "mixture": MODELS["mixture"], "qwen3": MODELS["normed"]}
TINY["gemma3"] = MODELS["gemma3"] | {"hidden_size": 36, "head_dim": 12}  # with padding


@pytest.fixture(scope="module", params=[*TINY, "mistral-7b"])
def source(request, tmp_path_factory):
    """The ModelSource of a tiny model of some family, or of one layer of Mistral 7B."""
    if request.param in TINY:
        return open_model(
            str(write_tiny(tmp_path_factory.mktemp("models") / "tiny", **TINY[request.param])), 1
        )
    found = open_model("random:mistral-7b", 1, layers=1)
    return replace(found, tensors=TiledWeights(found.tensors.shapes, np.dtype(np.float32)))


def models(comm, source, dtype, *paths):
    """Load a Model for each of some paths."""
    device = replace(comm.gpu, dtype=np.dtype(DTYPES[dtype]))
    return [load_model(source, comm, device, path=path) for path in paths]


def some_tokens(source, count):
    return np.random.default_rng(0).integers(0, source.config.vocab_size, count).tolist()


def logits_of(model, ids, prompt):
    """Return the logits, float32 [n, V], of a prompt's last token and of each later token, one per pass."""
    cache, found = model.new_cache(len(ids)), []
    for part in (ids[:prompt], *[[token] for token in ids[prompt:]]):
        found.append(host_logits(model, model.forward(part, cache, slice(-1, None))).copy()[0])
    return np.stack(found)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_fused_path_agrees_with_the_explicit_one(comm, source, dtype):
    ids = some_tokens(source, 200)
    explicit, fused = models(comm, source, dtype, "explicit", "fused")
    (exact,) = models(comm, source, "float32", "explicit")
    exact, explicit, found = (logits_of(model, ids, 190) for model in (exact, explicit, fused))
    error, allowed = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (found, explicit))
    assert error < 2 * allowed + 1e-6
    for _ in range(3):
        np.testing.assert_array_equal(logits_of(fused, ids, 190), found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_graph_gives_the_same_bits_as_its_launches(comm, source, dtype, batch):
    (model,) = models(comm, source, dtype, "fused")
    pool = model.new_pool(batch * 4)
    for pair in pool.storage:
        for stored in pair:
            stored.values.fill(0.25)
    tables = [list(range(4 * n, 4 * n + 4)) for n in range(batch)]
    graph = model.decode_graph(pool, batch)

    def run(method):
        graph.fill(some_tokens(source, batch), [40 + n for n in range(batch)], tables)
        method()
        return graph.logits.copy()

    eager = same_each_time(comm.gpu, lambda: run(graph.run))
    np.testing.assert_array_equal(same_each_time(comm.gpu, lambda: run(graph.launch)), eager)
    assert np.isfinite(eager).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_gpu_chooses_the_same_tokens_as_the_host(comm, source, temperature):
    """Compare runs with logprobs, where the host chooses, and without, where the GPU does."""
    (model,) = models(comm, source, "bfloat16", "fused")
    prompt, found = some_tokens(source, 30), []
    for logprobs in (1, None):
        params = SamplingParams(24, temperature, 40, 0.95, seed=5, ignore_eos=True, logprobs=logprobs)
        request = Request(params, (), prompt, len(prompt) + 24)
        found.append(list(generate(model, prompt, request)))
    assert found[0] == found[1]
    assert len(found[0]) == 24


# --- CuPy -----------------------------------------------------------------------------------------------


def test_the_stand_in_has_the_dtypes_of_the_installed_cupy(gpu):
    """Compare the tables, so that results on the stand-in have the same dtypes as on a GPU."""
    from make_cupy_types import tables

    assert tables() == json.loads((STAND_IN / "cupy" / "types.json").read_text())["types"]


def test_copying_a_transposed_array_to_the_host_keeps_the_current_stream(gpu):
    x = drawn(gpu, np.float32, 300, 500)
    np.testing.assert_array_equal(gpu.to_host(x.T), gpu.to_host(x).T)
    x.T.get()
    gpu.check_stream()


# --- NCCL and loading -----------------------------------------------------------------------------------


def test_nccl_with_one_rank(gpu):
    from minitp.cuda.nccl import NcclComm, load_nccl

    try:
        load_nccl()
    except MinitpError as error:
        pytest.skip(str(error))
    nccl = NcclComm(SingleRank(), gpu)
    for dtype in DTYPES.values():
        x = drawn(gpu, dtype, 3, 40)
        np.testing.assert_array_equal(gpu.to_host(nccl.all_reduce(x)), gpu.to_host(x))
        np.testing.assert_array_equal(gpu.to_host(nccl.all_gather(x, [40])), gpu.to_host(x))
    out = gpu.cupy.zeros(x.shape, x.dtype)
    gpu.stream.begin_capture()
    nccl.reduce_into(x, out)
    graph = gpu.stream.end_capture()
    with nccl.launching():
        graph.launch(gpu.stream)
    np.testing.assert_array_equal(gpu.to_host(out), gpu.to_host(x))
    nccl.check()
    nccl.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_on_the_gpu_equal_those_in_the_file(comm, source, dtype):
    (model,) = models(comm, source, dtype, "explicit")
    for name, array in named_slices(model.weights, source.plan, 0):
        index = source.plan.tensors[name].index(0)
        if len(index) == 2 and isinstance(source.tensors, TiledWeights):
            continue  # TiledWeights' numbers depend on the block that is read
        expected = source.tensors.read(name, index).astype(DTYPES[dtype])
        np.testing.assert_array_equal(comm.gpu.to_host(array), expected)
