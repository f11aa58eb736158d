"""Tests of passes over prompts on GPUs: graphs for up to 64 tokens, their bits, launches and allocations."""

from threading import current_thread

import numpy as np
import pytest
from on_gpu import model_on_gpu, run_on_gpus
from paths import GOLDENS
from tiny import write_tiny

from minitp.generate import host_logits
from minitp.model import unrecorded

pytestmark = pytest.mark.usefixtures("cupy")

LAYERS = 2
BASE = {"vocab_size": 101, "hidden_size": 40, "intermediate_size": 37, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model with a sliding window of 20 and biases."""
    fields = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 20}
    fields |= {"use_sliding_window": True, "max_window_layers": 0}
    return write_tiny(
        tmp_path_factory.mktemp("prompts") / "model", tokenizer=False, **BASE, **HEADS, **fields
    )


def tokens(count, seed=0):
    return np.random.default_rng([seed, count]).integers(0, BASE["vocab_size"], count).tolist()


def caches(pool, *starts):
    """Return caches of up to 128 positions in one pool, from these blocks on."""
    from minitp.paged_cache import PagedCache

    return [PagedCache(pool, list(range(start, start + 8))) for start in starts]


def logits_of(model, pool, prompts, record=unrecorded, past=()):
    """Return the logits of all tokens of some prompts in one pass, after `past` in a pass of its own."""
    parts = list(zip(prompts, caches(pool, *range(0, 8 * len(prompts), 8)), strict=True))
    if past:
        model.forward_batch([(past, parts[0][1])], None)
    return np.array(host_logits(model, model.forward_batch(parts, slice(None), record)))


def on_ranks(directory, tp, function, transport="nccl"):
    return run_on_gpus(
        tp, lambda comm: function(model_on_gpu(directory, comm, "float16", path="fused")), transport
    )


class Ignored:
    """A `record` that keeps nothing; a pass that is recorded is not captured."""

    def __call__(self, *_):
        return self


@pytest.mark.parametrize(("tp", "count", "past"), [(1, 5, 0), (3, 16, 30), (1, 64, 0)])
def test_a_graph_has_the_bits_of_single_launches(directory, tp, count, past):
    """Check a prompt's first pass, its graph, that graph again, and the recorded pass of the exact size."""

    def rank(model):
        pool = model.new_pool(8)
        found = [logits_of(model, pool, [tokens(count)], past=tokens(past)) for _ in range(3)]
        found.append(logits_of(model, pool, [tokens(count)], Ignored(), tokens(past)))
        assert [prompts._graph is not None for prompts in pool.prompt_graphs.values()][-1]
        return found

    for found in on_ranks(directory, tp, rank):
        for logits in found:
            assert logits.shape == (count, BASE["vocab_size"])
            assert np.array_equal(logits, found[0])


@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe", "phi3-partial"])
def test_graphs_of_other_families(name):
    """Check several RoPEs and windows, experts, and heads that are padded and partly rotated."""

    def rank(comm):
        model = model_on_gpu(GOLDENS / name, comm, "bfloat16", path="fused")
        pool = model.new_pool(16)
        prompts = [[n % model.config.vocab_size for n in tokens(count)] for count in (12, 9)]
        found = [logits_of(model, pool, prompts) for _ in range(2)]
        assert pool.prompt_graphs[32, 32]._graph is not None
        return [*found, logits_of(model, pool, prompts, Ignored())]

    for found in run_on_gpus(2, rank):
        assert np.isfinite(found[0]).all()
        assert all(np.array_equal(logits, found[0]) for logits in found)


def test_nothing_is_compiled_while_other_ranks_wait_in_a_sum(directory, monkeypatch):
    from minitp.cuda.compiler import Compiler
    from minitp.cuda.nccl import NcclComm

    events = {}  # thread of a rank -> which of the two it called, in order

    def noted(owner, name):
        original = getattr(owner, name)

        def method(*args, **options):
            events.setdefault(current_thread(), []).append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, method)

    noted(Compiler, "kernel")
    noted(NcclComm, "reduce_into")
    on_ranks(directory, 2, lambda model: logits_of(model, model.new_pool(8), [tokens(5)]) is None)
    assert len(events) == 2
    for names in events.values():
        assert "kernel" in names
        assert "kernel" not in names[names.index("reduce_into") :]


def test_prompts_of_other_lengths_reuse_a_graph(directory, cupy, monkeypatch):
    """Check also that what a longer prompt leaves in the padding of a shorter one does not matter."""
    captured, begin = [], cupy.cuda.Stream.begin_capture
    monkeypatch.setattr(cupy.cuda.Stream, "begin_capture", lambda stream: captured.append(begin(stream)))
    lengths = (16, 3, 17, 32, 64, 40)

    def rank(model):
        pool = model.new_pool(8)
        found = [logits_of(model, pool, [tokens(n)]) for n in lengths]
        assert sorted(pool.prompt_graphs) == [(16, 1), (32, 1), (64, 1)]
        assert len(captured) == 3
        return found, [logits_of(model, model.new_pool(8), [tokens(n)]) for n in lengths]

    ((found, alone),) = on_ranks(directory, 1, rank)
    assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))


def test_several_prompts_in_a_graph_have_the_bits_of_each_alone(directory):
    def rank(model):
        pool, prompts = model.new_pool(32), [tokens(n, seed=n) for n in (20, 2, 7, 30)]
        found = [logits_of(model, pool, prompts) for _ in range(2)]
        assert list(pool.prompt_graphs) == [(64, 64)]
        return found, np.concatenate([logits_of(model, model.new_pool(8), [ids]) for ids in prompts])

    for found, alone in on_ranks(directory, 2, rank):
        for logits in found:
            assert np.array_equal(logits, alone)


def test_long_prompts_have_nearly_the_logits_of_short_passes(directory):
    """Check cuBLAS's products, with several sequences in one launch of attention."""

    def rank(model):
        prompts = [tokens(n, seed=n) for n in (70, 9)]
        found = logits_of(model, model.new_pool(16), prompts)
        pieces = []
        for ids in prompts:
            (cache,) = caches(model.new_pool(8), 0)
            for start in range(0, len(ids), 20):
                logits = model.forward(ids[start : start + 20], cache, slice(None))
                pieces.append(np.array(host_logits(model, logits)))
        return found, np.concatenate(pieces)

    for found, pieces in on_ranks(directory, 2, rank):
        assert np.linalg.norm(found - pieces) < 3e-3 * np.linalg.norm(pieces)


@pytest.mark.parametrize(("tp", "per_layer", "others"), [(1, 9, 2), (2, 11, 3)])
def test_launches_of_a_graph(directory, tp, per_layer, others):
    """Check the number that docs/performance.md states."""

    def rank(model):
        pool = model.new_pool(8)
        for _ in range(2):
            logits_of(model, pool, [tokens(12)])
        return len(pool.prompt_graphs[16, 1]._graph.launches)

    assert on_ranks(directory, tp, rank) == [per_layer * LAYERS + others] * tp


@pytest.mark.parametrize("count", [20, 70])
def test_layers_allocate_nothing(tmp_path, cupy, monkeypatch, count):
    """Check that a pass over a prompt makes as many allocations with three layers as with one."""
    allocated, memory, counts = [], cupy._memory, []
    monkeypatch.setattr(cupy, "_memory", lambda nbytes: allocated.append(nbytes) or memory(nbytes))

    def rank(model):
        pool = model.new_pool(8)
        for _ in range(3):
            allocated.clear()
            model.forward(tokens(count), caches(pool, 0)[0], slice(-1, None))
        return len(allocated)

    for layers in (1, 3):
        folder = tmp_path / str(layers)
        write_tiny(folder, tokenizer=False, **{**BASE, **HEADS, "num_hidden_layers": layers})
        counts += on_ranks(folder, 1, rank)
    assert counts[0] == counts[1] < 8


def test_a_sequence_without_blocks_is_an_error(directory):
    def rank(model):
        cache = caches(model.new_pool(2), 0)[0]
        cache.block_table = [0, 1]
        model.forward(tokens(33), cache)

    with pytest.raises(IndexError, match="position 32 has no slot: the block table has only 32 slots"):
        on_ranks(directory, 1, rank)
