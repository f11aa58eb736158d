"""Tests of the runs that `check` makes: chunks, batches, caches of a smaller dtype, and total errors."""

from dataclasses import replace

import numpy as np
import pytest
from check_models import MODELS, PROMPT, SHAPE, blame, write_models
from faults import Fault
from faulty_model import FaultyModel, hook_ops
from one_core import run_threads
from safetensors.numpy import load_file, save_file

from minitp import kv_cache
from minitp import model as model_module
from minitp.check.passes import BLOCK_SIZE, batch_prompts, chunk_stops, preemptions, scarce_blocks
from minitp.check.replay import Replay
from minitp.check.result import ratio_of
from minitp.check.run import check_model
from minitp.device import open_device
from minitp.engine import scheduler
from minitp.engine.engine import Engine
from minitp.engine.scheduler import Scheduler
from minitp.errors import RankError
from minitp.kv_cache import Int8KVStorage
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.loading.weights import Loader
from minitp.request import Request


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The directories of the models, by name."""
    return write_models(tmp_path_factory.mktemp("runs"), SHAPE)


def check(directory, tp=2, ids=PROMPT, decode=1, batch=0, dtype="float32", kv_dtype="auto", spoil=None):
    """Return rank 0's CheckResult; spoil(model) changes the Model of a rank before the run."""
    source, device = open_model(str(directory), tp), open_device(dtype)

    def rank(comm):
        model = load_model(source, comm, device, kv_dtype=kv_dtype)
        if spoil is not None:
            spoil(model)
        return check_model(source, model, ids, decode, batch)

    return run_threads(tp, rank)[0]


# --- the passes -----------------------------------------------------------------------------------------


def test_a_prompt_is_divided_into_two_unequal_chunks():
    assert chunk_stops(1) == []
    assert chunk_stops(2) == [1, 2]
    for tokens in range(3, 600):
        first, stop = chunk_stops(tokens)
        assert stop == tokens
        assert 1 <= first < tokens - first


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17])
def test_the_sequences_share_a_block_and_one_is_preempted(count, tokens):
    prompts = batch_prompts(list(range(tokens)), count, 101)
    lengths = [len(prompt) for prompt in prompts]
    assert len(set(lengths)) == count
    assert len({tuple(prompt[:BLOCK_SIZE]) for prompt in prompts}) == 1
    budget = sum(lengths) * 2 // 3
    assert preemptions(prompts, scarce_blocks(prompts, budget), budget) == 1


@pytest.mark.parametrize("name", ["biased", "window", "gemma", "mixture", "unturned"])
@pytest.mark.parametrize(("tp", "dtype"), [(1, "bfloat16"), (3, "float32"), (4, "float16")])
def test_nothing_is_blamed_in_batches(name, tp, dtype, models):
    result = check(models[name], tp, PROMPT[:7], 1, batch=3, dtype=dtype)
    assert blame(result) == []
    assert [len(ids) for ids in result.sequences] == [8, 9, 10, 11]
    batches = [pass_ for pass_ in result.passes if pass_.name.startswith("batch.")]
    shared = [pass_ for pass_ in batches if any(".seq0" in name for name, _ in pass_.cached)]
    assert {pass_.sequence for pass_ in shared} > {1}, "no sequence has reused a block of the first"
    restarted = [
        pass_
        for pass_ in batches
        if pass_.start < max(p.stop for p in batches if p.sequence == pass_.sequence and p is not pass_)
    ]
    assert restarted


# --- faults in batches ----------------------------------------------------------------------------------


def on_rank(rank, change):
    """Return a `spoil` that calls change(model) on one rank."""
    return lambda model: change(model) if model.comm.rank == rank else None


def first_blamed(result):
    finding = result.blamed()[0]
    return finding.name, finding.rank


def test_a_rank_whose_block_table_differs_is_blamed(models):
    def change(model):
        forward = model.forward_batch

        def swapped(parts, *args):
            for _, cache in parts:
                table = getattr(cache, "block_table", [])
                if len(table) > 1:
                    table[0], table[1] = table[1], table[0]
            return forward(parts, *args)

        model.forward_batch = swapped

    result = check(models["biased"], 3, batch=2, spoil=on_rank(1, change))
    name, rank = first_blamed(result)
    assert (name.split("/")[1], rank) == ("block_table", 1)


def test_a_rank_that_reads_another_sequences_cache_is_blamed(models):
    def change(model):
        attend = model._attend

        def other(i, q, k, v, sequence, record):
            if i == 1 and sequence.index == 1:
                sequence.cache.append(i, k[:, sequence.tokens], v[:, sequence.tokens], sequence.first_key)
                sequence.cache.pool.storage[i][0].values[:, sequence.cache.slots(0, 1)] = 0
            return attend(i, q, k, v, sequence, record)

        model._attend = other

    result = check(models["biased"], 2, batch=2, spoil=on_rank(0, change))
    assert first_blamed(result) == ("batch.2.seq1/layers.1.attn.k_cache", 0)


def test_blocks_shared_by_sequences_of_other_tokens_are_blamed(models, monkeypatch):
    """Use a block's number as its key, so that a sequence reuses blocks of other tokens when it restarts."""

    def keys(token_ids, block_size, before=()):
        return [bytes([i]) for i in range(len(token_ids) // block_size)]

    monkeypatch.setattr(scheduler, "block_keys", keys)
    finding = check(models["biased"], 2, PROMPT[:7], batch=3).blamed()[0]
    assert finding.step == "positions"
    assert "of the cache has the key of other tokens, those of batch." in finding.note


def test_a_rank_that_forgets_the_length_of_a_reused_prefix_is_blamed(models, monkeypatch):
    forward = Engine._forward

    def one_short(engine, batch, recording):
        if engine.model.comm.rank == 1:
            started = [(number, table, max(0, length - 1)) for number, table, length in batch.started]
            batch = replace(batch, started=started)
        return forward(engine, batch, recording)

    monkeypatch.setattr(Engine, "_forward", one_short)
    name, rank = first_blamed(check(models["biased"], 2, batch=2))
    assert (name.split("/")[1], rank) == ("positions", 1)


# --- tokens ---------------------------------------------------------------------------------------------


def late(model):
    """Let this rank get the chosen token one step late."""
    broadcast, arrived = model.comm.broadcast, [(60, False)]  # a token of rank 2's part of the vocabulary

    def late_broadcast(value):
        value = broadcast(value)
        if not (isinstance(value, tuple) and isinstance(value[0], int)):
            return value
        arrived.append(value)
        return arrived[-2]

    model.comm.broadcast = late_broadcast


def test_a_rank_that_gets_the_token_late_is_blamed(models):
    assert blame(check(models["biased"], 4, decode=4, spoil=on_rank(2, late))) == [
        (f"decode.{n}/tokens", 2) for n in range(1, 5)
    ]


def test_a_wrong_total_error_is_never_silent(models, monkeypatch):
    """Leave out the step `tokens`: every other step of the late rank is right for its own inputs."""
    before = Replay.before
    monkeypatch.setattr(
        Replay, "before", lambda *args: (found for found in before(*args) if found[0] != "tokens")
    )
    assert check(models["biased"], 4, decode=2).ok
    result = check(models["biased"], 4, decode=2, spoil=on_rank(2, late))
    assert all(finding.ok for finding in result.findings)
    assert not result.ok
    assert blame(result) == [("decode.1/embed", "all")]
    assert result.blamed()[0].total.relative > 0.1


def test_total_errors_have_useful_bounds(models):
    """The bound leaves room for rounding errors, and little more: a fault changes a result by 10% or more."""
    for dtype, most, step in (("float32", 1e-3, None), ("float16", 0.02, "embed")):
        result = check(models["biased"], 2, dtype=dtype, batch=2)
        bounds = [f.total_bound for f in result.findings if f.total_bound and step in (None, f.step)]
        assert 0 < max(bounds) < most


def test_a_router_that_chooses_another_expert_ends_the_bounds(models):
    """A token whose experts are nearly as good as others may get others, and its total error is large."""

    def change(model):
        for layer in model.weights.layers:
            layer.w_router[:, 1] = layer.w_router[:, 0] * np.float32(1 + 1e-7)

    result = check(models["mixture"], 2, spoil=change)
    assert {finding.step for finding in result.findings if not finding.ok} == {
        f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(3)
    }
    routers = [finding for finding in result.findings if finding.step == "mlp.router"]
    assert all(finding.total_bound is None for finding in routers if finding.layer == 2)


# --- caches of a smaller dtype --------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["int8", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_blamed_with_a_cache_of_a_smaller_dtype(kv_dtype, dtype, models):
    for name in ("biased", "window", "gemma"):
        result = check(models[name], 3, batch=2, dtype=dtype, kv_dtype=kv_dtype)
        assert blame(result) == []
        caches = [finding for finding in result.findings if finding.step == "attn.k_cache"]
        assert {finding.local.relative for finding in caches} == {0.0}
        assert all(1e-5 < finding.bounds[0] < 0.05 for finding in caches)


def spoiled_storage(monkeypatch, rank, values_of):
    """Let one rank store values_of(x, scale) instead of round(x / scale)."""
    write = Int8KVStorage.write
    spoiled = []

    def change(model):
        spoiled.append(model.plan)
        model.spoiled_storage = True

    def other(storage, slots, x):
        write(storage, slots, x)
        if getattr(storage, "spoiled", False):
            scale = storage.scales[:, slots]
            storage.values[:, slots] = values_of(x, np.where(scale > 0, scale, 1)).astype(np.int8)

    monkeypatch.setattr(Int8KVStorage, "write", other)

    def spoil(model):
        if model.comm.rank != rank:
            return
        new_cache = model.new_cache

        def cache_with_fault(capacity=64):
            cache = new_cache(capacity)
            for stored in (stored for pair in cache.storage for stored in pair):
                stored.spoiled = True
            return cache

        model.new_cache = cache_with_fault

    return spoil


def test_numbers_cut_off_instead_of_rounded_are_blamed(models, monkeypatch):
    spoil = spoiled_storage(monkeypatch, 1, lambda x, scale: np.trunc(x / scale))
    result = check(models["biased"], 2, kv_dtype="int8", spoil=spoil)
    assert {(finding.step, finding.rank) for finding in result.blamed()} == {
        ("attn.k_cache", 1),
        ("attn.v_cache", 1),
    }
    assert "the error is larger than a int8 cache allows" in result.blamed()[0].note


def test_another_rounding_within_half_a_step_is_not_blamed(models, monkeypatch):
    spoil = spoiled_storage(monkeypatch, 0, lambda x, scale: np.floor(x / scale + np.float32(0.5)))
    assert blame(check(models["biased"], 2, kv_dtype="int8", spoil=spoil)) == []


# --- roundings ------------------------------------------------------------------------------------------


def rounded(x, dtype):
    return x.astype(dtype).astype(np.float32)


def silu_rounded(swiglu, xp, gate_up):
    """Round silu(gate) before it is multiplied by up."""
    gate, up = np.split(gate_up, 2, axis=-1)
    g = gate.astype(np.float32)
    return (rounded(g / (1 + np.exp(-g)), gate.dtype) * up.astype(np.float32)).astype(gate.dtype)


def angles_rounded(apply_rope, xp, x, cos, sin):
    return apply_rope(xp, x, *(rounded(y, x.dtype) for y in (cos, sin)))


def shares_rounded(route, xp, logits, *routing):
    chosen, shares = route(xp, logits, *routing)
    return chosen, rounded(shares, logits.dtype)


ROUNDINGS = {
    "mlp.act": ("biased", {"swiglu": silu_rounded}),
    "attn.q_rope": ("biased", {"apply_rope": angles_rounded}),
    "mlp.out_partial": ("mixture", {"route": shares_rounded}),
}


@pytest.mark.parametrize("step", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_second_rounding_is_warned_of_and_not_blamed(step, dtype, models, monkeypatch):
    hook_ops(monkeypatch)
    name, hooks = ROUNDINGS[step]
    source = open_model(str(models[name]), 1)
    everywhere = type("EveryLayer", (FaultyModel,), {"_within": every_layer})

    def rank(comm):
        device = open_device(dtype)
        weights = Loader(source.plan, comm.rank, source.tensors, device).load()
        model = everywhere(Fault("rounded", step, hooks), 0, source, weights, comm, device)
        return check_model(source, model, [*PROMPT, *PROMPT[::-1], *range(20, 40)], 1)

    result = run_threads(1, rank)[0]
    assert blame(result) == []
    assert any(text.startswith(f"{step} rounds more than once") for text in result.warnings), result.warnings


def every_layer(self, block, i, *args, **kwargs):
    """Make the hooks active in all layers."""
    self.layer = i
    return FaultyModel._within(self, block, i, *args, **kwargs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_second_rounding_is_found_in_right_runs(dtype, models):
    for name in MODELS:
        assert check(models[name], 1, [*PROMPT, *PROMPT[::-1], *range(20, 40)], dtype=dtype).warnings == []


# --- runs that do not fit together ----------------------------------------------------------------------


def on_batches(monkeypatch, change, rank=None):
    """Let change(batch) replace the batches of one rank, or of all ranks."""
    forward = Engine._forward

    def changed(engine, batch, recording):
        if rank in (None, engine.model.comm.rank):
            batch = change(batch)
        return forward(engine, batch, recording)

    monkeypatch.setattr(Engine, "_forward", changed)


def test_a_rank_with_logits_of_other_rows_is_blamed(models, monkeypatch):
    on_batches(
        monkeypatch, lambda batch: replace(batch, logits_at=[max(0, row - 1) for row in batch.logits_at]), 1
    )
    result = check(models["biased"], 2, batch=3)
    assert first_blamed(result) == ("batch.1.seq0/final_norm", 1)
    assert {finding.rank for finding in result.blamed()} == {1}


def test_a_block_table_that_is_too_long_on_one_rank_is_blamed(models):
    def change(model):
        forward = model.forward_batch

        def longer(parts, *args):
            for _, cache in parts:
                if len(getattr(cache, "block_table", [])) == 4:
                    cache.block_table.append(0)
            return forward(parts, *args)

        model.forward_batch = longer

    result = check(models["biased"], 2, batch=3, spoil=on_rank(1, change))
    assert first_blamed(result) == ("batch.2.seq0/block_table", 1)
    assert result.blamed()[0].note == "shape [5], expected [4]"


def test_logits_that_are_too_wide_on_one_rank_are_blamed(models):
    def change(model):
        gather = model.comm.all_gather
        model.comm.all_gather = lambda x, widths: np.pad(gather(x, widths), ((0, 0), (0, 3)))

    result = check(models["biased"], 2, spoil=on_rank(1, change))
    assert first_blamed(result) == ("prefill/logits", 1)


@pytest.mark.parametrize("change", [lambda ids: [*ids, 0], lambda ids: ids[1:]], ids=["more", "fewer"])
def test_another_number_of_tokens_is_the_only_finding(change, models):
    def spoil(model):
        forward = model.forward
        model.forward = lambda ids, *args, **options: forward(
            change(ids) if len(ids) > 3 else ids, *args, **options
        )

    result = check(models["biased"], 2, spoil=spoil)
    assert blame(result) == [
        ("prefill/tokens", "all"),
        ("prefill.0/tokens", "all"),
        ("prefill.1/tokens", "all"),
    ]


def test_a_shard_of_another_shape_is_blamed(models):
    """Let rank 1 compute with the feed-forward columns of rank 0, of which there is one more."""

    def spoil(model):
        first = model.comm.allgather_object(model.weights.layers[1])[0]
        if model.comm.rank == 1:
            for part in ("w_down", "w_gate_up", "b_gate_up"):
                setattr(model.weights.layers[1], part, getattr(first, part))

    result = check(models["biased"], 2, spoil=spoil)
    notes = {finding.step.split(".", 3)[-1]: finding.note for finding in result.blamed()}
    assert notes["mlp.down_proj.weight"] == "shape [20, 19], expected [20, 18]"
    assert {finding.rank for finding in result.blamed() if finding.pass_name == "weights"} == {1}


def test_a_model_that_fails_names_the_last_step(models):
    def change(model):
        def broken(*args):
            raise ValueError("no such head")

        model._attend = broken

    with pytest.raises(RankError, match=r"rank 1: .* the step prefill/layers.0.attn.k_rope: .*no such head"):
        check(models["biased"], 2, spoil=on_rank(1, change))


# --- the results of requests ----------------------------------------------------------------------------


def test_a_preempted_sequence_that_loses_its_tokens_is_blamed(models, monkeypatch):
    preempt = Scheduler._preempt

    def forgetful(scheduler, sequence):
        preempt(scheduler, sequence)
        scheduler.waiting[0].token_ids = list(sequence.request.prompt_ids)

    monkeypatch.setattr(Scheduler, "_preempt", forgetful)
    (finding,) = check(models["biased"], 2, batch=4).blamed()
    assert (finding.name, finding.rank) == ("batch.6.seq3/tokens", 0)
    assert finding.note == "position 19 of the result is token 46, but no token was chosen"


def test_a_wrong_last_token_of_a_request_is_blamed(models, monkeypatch):
    sample = Request.sample

    def wrong(request, logits):
        token, last = sample(request, logits)
        if last:
            request.token_ids[-1] = (token + 1) % 101
        return token, last

    monkeypatch.setattr(Request, "sample", wrong)
    findings = check(models["biased"], 2, batch=2).blamed()
    assert {(finding.step, finding.rank) for finding in findings} == {("tokens", 0)}
    assert "of the result is token" in findings[0].note


def test_a_cache_that_is_not_quantized_is_blamed(models, monkeypatch):
    make = kv_cache.make_storage
    monkeypatch.setattr(kv_cache, "make_storage", lambda *args: make(*args[:-1], "auto"))
    finding = check(models["biased"], 2, kv_dtype="int8").blamed()[0]
    assert finding.name == "prefill/layers.0.attn.k_cache"
    assert finding.note == "the cache is not int8: it has the numbers as they were written"


def test_positions_of_another_dtype_are_blamed(models, monkeypatch):
    class Floats(model_module.SequenceSlice):
        def __init__(self, *args):
            super().__init__(*args)
            self.positions = self.positions.astype(np.float32)

    monkeypatch.setattr(model_module, "SequenceSlice", Floats)
    finding = check(models["biased"], 2).blamed()[0]
    assert (finding.name, finding.note) == ("prefill/positions", "dtype float32, expected int64")


def test_keys_that_are_too_large_for_the_cache_are_blamed(tmp_path):
    directory = write_models(tmp_path, SHAPE)["biased"]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.bias"] += 1e5
    save_file(tensors, directory / "model.safetensors")
    first = check(directory, 1, kv_dtype="float16").blamed()[0]
    assert first.name == "prefill/layers.0.attn.k_cache"
    assert "larger than a float16 cache allows" in first.note


@pytest.mark.parametrize(
    ("error", "bound", "expected"),
    [(1, 2, 0.5), (0, 0, 0), (1, 0, np.inf), (1, np.inf, 0), (0, np.nan, 0), (1, np.nan, np.inf)],
)
def test_an_error_as_a_share_of_its_bound(error, bound, expected):
    assert ratio_of(error, bound) == expected
