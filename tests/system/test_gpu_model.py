"""Tests of the model on GPUs: the fused path against the explicit one, generation and serving."""

import gc
import importlib
import random
import threading
import weakref
from argparse import Namespace
from collections import Counter
from itertools import cycle

import ml_dtypes
import numpy as np
import pytest
from engine_requests import alone, run_requests
from faulty_kernels import moved, replaced, swapped, with_arguments, without_a_key
from on_gpu import model_on_gpu, run_on_gpus
from safetensors.numpy import load_file, save_file
from tiny import write_tiny

from minitp.check.run import check_model
from minitp.cli.perplexity import perplexity
from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.engine.engine import Engine
from minitp.errors import InputError, RankError
from minitp.generate import generate, host_logits
from minitp.load import load_model, open_source
from minitp.loading.source import open_model
from minitp.model import Model
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.trace.names import step_names
from minitp.trace.record import Recorder

pytestmark = pytest.mark.usefixtures("cupy")

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
BASE = {"vocab_size": 101, "hidden_size": 40, "intermediate_size": 37, "max_position_embeddings": 64}
SHAPES = {
    # Nothing divides evenly: 9 query heads on 3 KV heads, 37 FFN columns, 101 tokens.
    "uneven": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    | {"attention_bias": True, "mlp_bias": True},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
    "window": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5}
    | MISTRAL,
    "large heads": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64},
}
# Tokens of every rank's shard of the vocabulary, including the first and the last row.
PROMPT = [100, 3, 40, 60, 80, 15, 25, 35, 52, 71, 95, 0]
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write a model of each shape with weights of each dtype; return {(shape, dtype): directory}."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, fields in SHAPES.items():
        for dtype, kind in DTYPES.items():
            directory = write_tiny(root / f"{name} {dtype}", **{**BASE, **fields})
            path = directory / "model.safetensors"
            save_file({key: x.astype(kind) for key, x in load_file(path).items()}, path)
            found[name, dtype] = directory
    return found


def model_on_cpu(directory, comm, dtype):
    return load_model(open_model(str(directory), comm.size), comm, open_device(dtype))


# --- logits ---------------------------------------------------------------------------------------------

# A prompt, two decode passes, a longer chunk, and two decode passes again.
CHUNKS = (7, 1, 1, 11, 1, 1)


def logits_in_chunks(model):
    """Return the logits, float32 [n, V], of each of CHUNKS of the same random tokens."""
    ids = np.random.default_rng(0).integers(0, BASE["vocab_size"], sum(CHUNKS)).tolist()
    cache, found = model.new_cache(len(ids)), []
    for count in CHUNKS:
        found.append(np.array(host_logits(model, model.forward(ids[:count], cache, slice(None)))))
        del ids[:count]
    return found


def distances(found, exact):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    ("shape", "dtype", "tp"),
    [
        *(("uneven", "float16", tp) for tp in (1, 2, 3, 4)),
        *((shape, "float16", tp) for shape in ("window", "large heads") for tp in (1, 4)),
        ("tied", "float16", 3),
        ("uneven", "bfloat16", 3),
    ],
)
def test_logits(models, shape, dtype, tp):
    """Check that all ranks have the same logits, as close to those of float32 as the explicit path's.

    Both paths round equally often, but not in the same places, so their errors should have the same size. The
    factor 2 allows for chance, because a pass of one token has only 101 logits, with much error in common.
    """
    directory = models[shape, dtype]
    exact = logits_in_chunks(model_on_cpu(directory, SingleRank(), "float32"))
    explicit = logits_in_chunks(model_on_cpu(directory, SingleRank(), dtype))
    ranks = run_on_gpus(tp, lambda comm: logits_in_chunks(model_on_gpu(directory, comm, dtype, path="fused")))
    for found in ranks[1:]:
        assert all((a == b).all() for a, b in zip(found, ranks[0], strict=True))
    assert [x.shape for x in ranks[0]] == [(count, BASE["vocab_size"]) for count in CHUNKS]
    allowed = 2 * max(distances(explicit, exact))
    assert max(distances(ranks[0], exact)) < allowed < 20 * ml_dtypes.finfo(DTYPES[dtype]).eps


# --- check ----------------------------------------------------------------------------------------------


def check(directory, tp, dtype, path, transport="nccl", decode=2, batch=0, split=None):
    def rank(comm):
        model = model_on_gpu(directory, comm, dtype, split, path=path)
        source = open_model(str(directory), tp, split=split)
        return check_model(source, model, PROMPT, decode, batch)

    return run_on_gpus(tp, rank, transport)[0]


def blamed(result):
    return [(finding.name, finding.rank) for finding in result.blamed()]


@pytest.mark.parametrize(
    ("tp", "dtype", "path"),
    [
        *((tp, dtype, "explicit") for tp in (1, 4) for dtype in ("float32", *DTYPES)),
        *((tp, dtype, "fused") for tp in (1, 2, 3, 4) for dtype in DTYPES),
    ],
)
def test_check_passes(models, tp, dtype, path):
    stored = dtype if dtype in DTYPES else "float16"
    result = check(models["uneven", stored], tp, dtype, path)
    assert (blamed(result), result.problems) == ([], [])


@pytest.mark.parametrize(
    ("split", "transport", "batch"),
    [("3,1", "nccl", 0), ("3,1", "peer", 3), ("2,3,1", "peer", 0), ("2,3,1", "nccl", 0), ("1,5", "mpi", 0)],
)
def test_check_passes_at_unequal_shares(models, split, transport, batch):
    """The ranks' parts of the logits have different widths; all but the widest are padded to be gathered."""
    tp = split.count(",") + 1
    result = check(models["uneven", "bfloat16"], tp, "bfloat16", "fused", transport, 2, batch, split)
    assert (blamed(result), result.problems) == ([], [])


@pytest.mark.parametrize(
    ("how", "rates", "rooms", "split"),
    [
        ("auto", (3e9, 1e9), (1e9, 1e9), "3,1"),
        ("auto", (3e9, 1e9), (2e4, 1e9), "0.242,0.758"),  # 80% of 20 kB hold less than 3/4 of 66 kB
        ("memory", None, (2e9, 3.02e9), "1,1.5"),
    ],
)
def test_shares_that_the_gpus_decide(models, monkeypatch, how, rates, rooms, split):
    directory = models["uneven", "float16"]
    options = Namespace(model=str(directory), layers=None, revision=None, dtype="float16", verbose=False)
    options.split = how

    def rank(comm):
        monkeypatch.setattr(Gpu, "weights_room", lambda gpu: (number(), rooms[number()]))
        if rates is not None:
            assert comm.gpu.read_rate() > 0, "the real measurement, on the stand-in"
            comm.agree()
            monkeypatch.setattr(Gpu, "read_rate", lambda gpu: rates[number()])
        return open_source(comm, options).shares

    def number():
        return int(threading.current_thread().name.removeprefix("rank "))

    from minitp.cuda.gpu import Gpu

    assert run_on_gpus(2, rank) == [split] * 2


@pytest.mark.parametrize(("shape", "tp"), [("uneven", 2), ("window", 1), ("large heads", 3)])
def test_check_passes_for_batches(models, shape, tp):
    """Check batches of prompts, of decoded tokens and of both, in which several sequences are recorded."""
    result = check(models[shape, "bfloat16"], tp, "bfloat16", "fused", decode=0, batch=3)
    assert blamed(result) == []
    batches = {finding.pass_name for finding in result.findings if finding.pass_name.startswith("batch.")}
    assert {name.rpartition(".")[2] for name in batches} == {"seq0", "seq1", "seq2"}


@pytest.mark.parametrize("shape", ["tied", "window", "large heads"])
@pytest.mark.parametrize("path", ["explicit", "fused"])
def test_check_passes_for_other_shapes(models, shape, path):
    assert blamed(check(models[shape, "float16"], 3, "float16", path)) == []


# Steps inside fused operations, which are not recorded, by pass and number of ranks.
ALWAYS_INSIDE = {"attn.scores", "attn.probs"}
INSIDE_DECODE = {"attn.q", "attn.k", "mlp.gate", "mlp.up"}
INSIDE_WITH_ONE_RANK = {"attn.norm", "attn.out_partial", "attn.out"} | {
    "mlp.norm", "mlp.out_partial", "mlp.out", "final_norm",
}  # fmt: skip
BIASED_SUMS = {"attn.out", "mlp.out"}  # the bias is added together with the residual


@pytest.mark.parametrize("shape", ["uneven", "tied"])
@pytest.mark.parametrize("tp", [1, 3])
def test_the_steps_that_the_fused_path_records(models, shape, tp):
    directory = models[shape, "float16"]
    all_steps = step_names(open_model(str(directory), tp).plan)

    def rank(comm):
        model = model_on_gpu(directory, comm, path="fused")
        names = {f"{name}/{step}" for name in ("prefill", "decode") for step in all_steps}
        recorded = []
        record = Recorder(model.device, names, lambda name, array: recorded.append(name))
        cache = model.new_cache(16)
        for name, ids in (("prefill", PROMPT), ("decode", [5])):
            record.begin(name)
            model.forward(ids, cache, slice(None), record)
        return recorded

    sums = BIASED_SUMS if shape == "uneven" else set()
    hidden = {"prefill": ALWAYS_INSIDE | sums}
    hidden["decode"] = ALWAYS_INSIDE | INSIDE_DECODE | sums | (INSIDE_WITH_ONE_RANK if tp == 1 else set())
    expected = [
        f"{name}/{step}"
        for name, steps in hidden.items()
        for step in all_steps
        if step.removeprefix("layers.0.").removeprefix("layers.1.") not in steps
    ]
    for found in run_on_gpus(tp, rank):
        assert sorted(found) == sorted(expected)


# --- faults ---------------------------------------------------------------------------------------------


FAULTS = {  # name: (module in cuda/kernels, class, method, change, ranks, steps that must be blamed first)
    "RoPE of a prompt": (
        "cache_write", "CacheWrite", "__call__", swapped(1, 2), 3,
        ["prefill/layers.0.attn.q_rope", "prefill/layers.0.attn.k_rope"],
    ),
    "a prompt's keys, in the wrong slots": (
        "cache_write", "CacheWrite", "__call__", replaced(3, lambda slots: slots[::-1].copy()), 3,
        ["prefill/layers.0.attn.k_rope"],
    ),
    "a prompt sees too little": (
        "attention_prefill", "AttentionPrefill", "__call__", replaced(4, without_a_key), 3,
        ["prefill/layers.0.attn.context"],
    ),
    "a token sees too little": (
        "attention_decode", "AttentionDecode", "__call__", replaced(4, lambda seen: seen - 1), 3,
        ["decode.1/layers.0.attn.context"],
    ),
    "eps of the norm": (
        "rms_norm", "RmsNorm", "__call__", replaced(3, lambda eps: eps * 1e5), 3,
        ["prefill/layers.0.attn.norm"],
    ),
    "up for gate": (
        "swiglu", "Swiglu", "__call__", replaced(0, lambda x: x[:, moved(x.shape[1], x.shape[1] // 2)]), 3,
        ["prefill/layers.0.mlp.act"],
    ),
    "logits of another rank": (
        "join_columns", "JoinColumns", "__call__", replaced(0, lambda x: x[::-1].copy()), 3,
        ["decode.1/logits"],
    ),
    "the embedding of a token": (
        "begin_decode", "BeginDecode", "__call__", replaced(4, lambda table: table[1:]), 1,
        ["prefill/embed_partial"],
    ),
    "positions": (
        "begin_decode", "BeginDecode", "__call__", replaced(3, lambda tables: (2 * tables[0], tables[1])), 1,
        ["prefill/layers.0.attn.q_rope", "prefill/layers.0.attn.k_rope"],
    ),
    "a slot of the cache": (
        "linear", "Linear", "qkv", replaced(5, lambda slot: slot - 1), 1,
        ["decode.1/layers.0.attn.v", "decode.1/layers.0.attn.k_rope"],
    ),
    "a token's gate for up": (
        "linear", "Linear", "swiglu", replaced(1, lambda w: w[moved(len(w), len(w) // 2)]), 1,
        ["decode.1/layers.0.mlp.act"],
    ),
    "a bias that is left out": (
        "linear", "Linear", "residual", replaced(3, lambda bias: None), 1,
        ["decode.1/layers.0.attn.residual"],
    ),
    "the rows of the vocabulary": (
        "linear", "Linear", "logits", replaced(1, lambda w: w[moved(len(w), 1)]), 1,
        ["decode.1/logits_partial"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), list(zip(FAULTS, cycle(DTYPES), strict=False)))
def test_a_wrong_kernel_is_blamed(models, monkeypatch, name, dtype):
    file, kind, method, change, tp, steps = FAULTS[name]
    kind = getattr(importlib.import_module(f"minitp.cuda.kernels.{file}"), kind)
    with_arguments(monkeypatch, kind, method, change)
    found = [name for name, _ in blamed(check(models["uneven", dtype], tp, dtype, "fused", decode=1))]
    assert list(dict.fromkeys(found))[: len(steps)] == steps


def test_a_wrong_kernel_is_blamed_on_its_rank(models, monkeypatch):
    from minitp.cuda.kernels.attention_decode import AttentionDecode

    with_arguments(monkeypatch, AttentionDecode, "__call__", replaced(4, lambda seen: seen - 1), rank=2)
    found = blamed(check(models["uneven", "float16"], 4, "float16", "fused", decode=1))
    assert found == [(f"decode.1/layers.{i}.attn.context", 2) for i in range(2)]


def test_a_wrong_weight_is_blamed(models, monkeypatch):
    from minitp.cuda.loader import GpuLoader

    def load(self):
        weights = loaded(self)
        if self.rank == 1:
            weights.layers[1].w_down[3] = 0
        return weights

    loaded = GpuLoader.load
    monkeypatch.setattr(GpuLoader, "load", load)
    found = blamed(check(models["uneven", "float16"], 3, "float16", "fused", decode=1))
    assert found == [("weights/model.layers.1.mlp.down_proj.weight", 1)]


def test_a_sum_without_a_rank_is_blamed(models, monkeypatch):
    """Check blame on all ranks, in all sums except the embedding's, in which the rank may have only zeros."""
    from minitp.cuda.nccl import NcclComm

    with_arguments(monkeypatch, NcclComm, "reduce_into", replaced(0, lambda x: 0 * x), rank=1)
    result = check(models["tied", "float16"], 3, "float16", "fused", decode=1)
    wrong = [name for name, rank in blamed(result) if rank == "all"]
    assert wrong == [name for name, _ in blamed(result)]
    sums = [f"layers.{i}.{block}.out" for i in range(2) for block in ("attn", "mlp")]
    assert {name.split("/")[1] for name in wrong} - {"embed"} == set(sums)


# --- generation -----------------------------------------------------------------------------------------

LETTERS = [72, 101, 108]
ENDS = {  # fields of SamplingParams, and further arguments of `generated`
    "greedy": {"max_new_tokens": 14},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "sampled": {"max_new_tokens": 14, "temperature": 0.8, "seed": 5},
    "top k": {"max_new_tokens": 14, "temperature": 1.5, "top_k": 4, "seed": 6},
    "top p": {"max_new_tokens": 14, "temperature": 2.0, "top_p": 0.7, "seed": 7},
    "the context is full": {"max_new_tokens": 100, "context": 12},
    "the context is full after a token": {"max_new_tokens": 100, "context": 4},
    "end of text": {"max_new_tokens": 14, "end_at": 9},
    "end of text at once": {"max_new_tokens": 14, "end_at": 0},
    "end of text ignored": {"max_new_tokens": 14, "end_at": 9, "ignore_eos": True},
    "a stop string": {"max_new_tokens": 14, "stop_at": 6},
    "the reader stops": {"max_new_tokens": 14, "read": 5},
    "logprobs": {"max_new_tokens": 8, "logprobs": 3},
    "penalties": {"max_new_tokens": 14, "frequency_penalty": 2.0, "logit_bias": {66: 4}, "ignore_eos": True},
    "min p": {"max_new_tokens": 14, "temperature": 2.0, "min_p": 0.05, "seed": 7},
    "no cache": {"max_new_tokens": 8, "use_cache": False},
    "no cache, a prompt of one token": {"max_new_tokens": 8, "use_cache": False, "prompt": LETTERS[:1]},
    "a prompt of one token": {"max_new_tokens": 8, "prompt": LETTERS[:1]},
    "a prompt of a block": {"max_new_tokens": 4, "prompt": LETTERS[:2] * 8},
}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A model whose tokens are bytes, with a context of 64; its weights are float16.

    Its logits spread over six, and the best exceeds the next by tenths, while float16 rounds by hundredths at
    most. So all paths choose the same tokens, unless a draw falls just between two.
    """
    directory = tmp_path_factory.mktemp("models") / "speaking"
    write_tiny(directory, **{**BASE, **SHAPES["uneven"], "vocab_size": 258, "num_hidden_layers": 1})
    path = directory / "model.safetensors"
    save_file({key: x.astype(np.float16) for key, x in load_file(path).items()}, path)
    return directory


@pytest.fixture(scope="module")
def plain_tokens(speaking):
    """The model's 14 greedy tokens after LETTERS."""
    params = SamplingParams(max_new_tokens=14, ignore_eos=True)
    model = model_on_cpu(speaking, SingleRank(), "float16")
    return list(generate(model, LETTERS, Request(params, (), LETTERS, 64)))


def generated(model, directory, plain, case):
    """Generate; return (the tokens yielded, the Request, the pieces emitted), the last two only on rank 0."""
    case = dict(case)
    prompt, context = case.pop("prompt", LETTERS), case.pop("context", 64)
    use_cache, read = case.pop("use_cache", True), case.pop("read", 1000)
    eos = (plain[case.pop("end_at")],) if "end_at" in case else ()
    request, pieces = None, []
    if model.comm.rank == 0:
        tokenizer = open_model(str(directory), 1).tokenizer()
        if "stop_at" in case:
            text = tokenizer.decode(plain)
            case["stop"] = text[case["stop_at"] : case.pop("stop_at") + 3]

        def emit(piece):
            pieces.append(piece)
            return len(pieces) < read

        request = Request(SamplingParams(**case), eos, list(prompt), context, tokenizer, emit)
    return list(generate(model, prompt, request, use_cache)), request, pieces


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        *((name, 1) for name in ENDS),
        *((name, 3) for name in ("top p", "end of text", "logprobs", "penalties", "no cache")),
    ],
)
def test_generation(speaking, plain_tokens, name, tp):
    """Check that every rank yields the same tokens, for every kind of end, as the explicit path on a CPU."""
    tokens, request, pieces = generated(
        model_on_cpu(speaking, SingleRank(), "float16"), speaking, plain_tokens, ENDS[name]
    )

    def rank(comm):
        return generated(model_on_gpu(speaking, comm, path="fused"), speaking, plain_tokens, ENDS[name])

    ranks = run_on_gpus(tp, rank)
    assert [found[0] for found in ranks] == [tokens] * tp
    found = ranks[0][1]
    assert (found.token_ids, found.text, ranks[0][2]) == (request.token_ids, request.text, pieces)
    assert found.finish_reason == request.finish_reason
    assert len(found.logprobs) == len(request.logprobs)
    for (logprob, top), (expected, expected_top) in zip(found.logprobs, request.logprobs, strict=True):
        assert logprob == pytest.approx(expected, abs=0.05)  # logits near 10, each rounded about ten times
        assert [token for token, _ in top] == [token for token, _ in expected_top]


def test_the_cases_end_as_their_names_say(speaking, plain_tokens):
    model = model_on_cpu(speaking, SingleRank(), "float16")
    found = {name: generated(model, speaking, plain_tokens, case)[1] for name, case in ENDS.items()}
    reasons = {name: (request.finish_reason, len(request.token_ids)) for name, request in found.items()}
    assert reasons["the context is full"] == ("length", 9)
    assert reasons["end of text"] == ("stop", 1 + plain_tokens.index(plain_tokens[9]))
    assert reasons["a stop string"][0] == "stop"
    assert reasons["a stop string"][1] < 14
    assert reasons["the reader stops"][0] == "closed"
    assert len({tuple(found[name].token_ids) for name in ("greedy", "sampled", "top k", "top p")}) == 4


@pytest.mark.parametrize(("name", "ahead"), [("greedy", 0), ("end of text", 1), ("one token", 0)])
def test_the_gpu_is_at_most_one_pass_ahead(speaking, plain_tokens, cupy, monkeypatch, name, ahead):
    """Count the decode passes: one per token after the first, and one more if the end was unforeseen."""
    launched, launch = [], cupy.cuda.Graph.launch
    monkeypatch.setattr(
        cupy.cuda.Graph, "launch", lambda graph, stream: launched.append(launch(graph, stream))
    )

    def rank(comm):
        return generated(model_on_gpu(speaking, comm, path="fused"), speaking, plain_tokens, ENDS[name])

    tokens, _, _ = run_on_gpus(1, rank)[0]
    assert len(launched) == len(tokens) - 1 + ahead


def test_a_graph_is_captured_once_and_the_host_reads_no_logits(speaking, plain_tokens, cupy, monkeypatch):
    captured, begin = [], cupy.cuda.Stream.begin_capture
    monkeypatch.setattr(cupy.cuda.Stream, "begin_capture", lambda stream: captured.append(begin(stream)))
    copied, asnumpy = [], cupy.asnumpy
    monkeypatch.setattr(cupy, "asnumpy", lambda a, **options: copied.append(a.shape) or asnumpy(a, **options))

    def rank(comm):
        model = model_on_gpu(speaking, comm, path="fused")
        copied.clear()
        return generated(model, speaking, plain_tokens, ENDS["greedy"])

    run_on_gpus(1, rank)
    assert len(captured) == 2, "the prompt and a decode pass"
    assert copied == [(1, 258)], "only the logits of the prompt"


@pytest.mark.parametrize("tp", [1, 2])
def test_the_next_sequence_uses_the_captured_graph(speaking, plain_tokens, cupy, monkeypatch, tp):
    """Check this until a sequence does not fit into the previous one's memory."""
    captured, begin = [], cupy.cuda.Stream.begin_capture
    monkeypatch.setattr(cupy.cuda.Stream, "begin_capture", lambda stream: captured.append(begin(stream)))
    monkeypatch.setattr("minitp.cuda.fused.KEPT_BLOCKS", 3)

    def rank(comm):
        model, found = model_on_gpu(speaking, comm, path="fused"), []
        # A prompt and a decode pass are captured. 3 blocks are 48 positions.
        for new_tokens, captures in ((8, 2), (20, 2), (44, 4), (8, 4)):
            params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
            found.append(list(generate(model, PROMPT, Request(params, (), PROMPT, len(PROMPT) + new_tokens))))
            assert len(captured) == captures or tp > 1
        return found

    for found in run_on_gpus(tp, rank):
        assert found[0] == found[3] == found[1][:8] == found[2][:8]
        assert [len(tokens) for tokens in found] == [8, 20, 44, 8]
    assert len(captured) == 4 * tp


def test_concurrent_sequences_have_separate_memory(speaking, plain_tokens):
    """Check two interleaved generators, and that closing a generator early returns the kept pool."""

    def rank(comm):
        model = model_on_gpu(speaking, comm, path="fused")

        def begin(prompt):
            params = SamplingParams(max_new_tokens=8, ignore_eos=True)
            return generate(model, prompt, Request(params, (), prompt, len(prompt) + 8))

        separate = [list(begin(prompt)) for prompt in (PROMPT, PROMPT[::-1])]
        pairs = list(zip(*(begin(prompt) for prompt in (PROMPT, PROMPT[::-1])), strict=True))
        closed_early = begin(PROMPT)
        next(closed_early)
        closed_early.close()
        return separate, [list(tokens) for tokens in zip(*pairs, strict=True)], model._kept_pool is not None

    separate, interleaved, kept = run_on_gpus(1, rank)[0]
    assert interleaved == separate
    assert kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_is_the_same_as_on_a_cpu(speaking, dtype):
    """Compare the logarithms, which have the size of logits and errors of a few roundings."""
    text = (PROMPT * 3)[:30]
    expected = perplexity(model_on_cpu(speaking, SingleRank(), dtype), text, 20)
    found = run_on_gpus(1, lambda comm: perplexity(model_on_gpu(speaking, comm, dtype), text, 20))[0]
    assert found[1] == expected[1] == 28
    tolerance = 4 * float(ml_dtypes.finfo(np.dtype(dtype)).eps)
    assert np.log(found[0]) == pytest.approx(np.log(expected[0]), rel=tolerance)


def test_a_pool_that_is_too_small_is_freed_before_the_next_is_allocated(speaking, plain_tokens, monkeypatch):
    monkeypatch.setattr("minitp.cuda.fused.KEPT_BLOCKS", 1)

    def rank(comm):
        model, pools, alive = model_on_gpu(speaking, comm, path="fused"), [], []
        new_pool = model.new_pool

        def watched(*size):
            alive.extend(pool() for pool in pools)
            pool = new_pool(*size)
            pools.append(weakref.ref(pool))
            return pool

        model.new_pool = watched
        gc.disable()  # the collector would free the GPU's memory too late
        for new_tokens in (8, 40):
            params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
            list(generate(model, PROMPT, Request(params, (), PROMPT, len(PROMPT) + new_tokens)))
        gc.enable()
        return alive

    assert run_on_gpus(1, rank) == [[None]]


def test_ranks_that_choose_different_tokens_are_an_error(speaking, plain_tokens, monkeypatch):
    from minitp.cuda.lanes import OnTheWay

    read = OnTheWay.read
    monkeypatch.setattr(
        OnTheWay,
        "read",
        lambda self: [array + (threading.current_thread().name == "rank 2") for array in read(self)],
    )

    def rank(comm):
        return generated(model_on_gpu(speaking, comm, path="fused"), speaking, plain_tokens, ENDS["greedy"])

    with pytest.raises(RankError, match=r"rank 2 chose token .* and rank 0 .*: their GPUs disagree"):
        run_on_gpus(3, rank, transport="mpi")


# --- concurrent requests --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A model of one layer, which runs quickly."""
    directory = tmp_path_factory.mktemp("models") / "quick"
    return write_tiny(directory, **{**BASE, **SHAPES["uneven"], "num_hidden_layers": 1})


def requests(count):
    """Return random requests; every other one begins with the same 18 tokens, more than a block."""
    rng = random.Random(count)
    prefix, found = [rng.randrange(101) for _ in range(18)], []
    for number in range(count):
        prompt = (prefix if number % 2 else []) + [rng.randrange(101) for _ in range(rng.randint(1, 14))]
        params = SamplingParams(max_new_tokens=4 + number % 3, ignore_eos=True)
        found.append(Request(params, (), prompt, 64))
    return found


def served_and_alone(model, count, blocks, block_size=16, **limits):
    """Serve requests together and one by one; return the tokens of both, the scheduler and the pool."""
    batch, pools, new_pool = requests(count), [], model.new_pool
    expected = [alone(model, request) for request in batch]
    model.new_pool = lambda *size: pools.append(new_pool(*size)) or pools[-1]
    scheduler = run_requests(model, batch, blocks, block_size, **limits)
    return [request.token_ids for request in batch], expected, scheduler, pools[0]


@pytest.mark.parametrize(("path", "tp"), [("fused", 1), ("fused", 3), ("explicit", 1)])
def test_prompts_are_scored_as_on_a_cpu(speaking, path, tp):
    """Score prompts of one token and of several blocks, beside a request that only generates."""

    def scored(model):
        prompts = [LETTERS[:1], LETTERS[:2], (LETTERS * 7)[:20], LETTERS]
        params = [SamplingParams(max_new_tokens=3 * (n % 2), prompt_logprobs=2) for n in range(3)]
        batch = [Request(p, (), ids, 64) for p, ids in zip([*params, SamplingParams()], prompts, strict=True)]
        run_requests(model, batch, 40, 16, max_tokens_per_step=15)
        return [request.prompt_logprobs for request in batch]

    expected = scored(model_on_cpu(speaking, SingleRank(), "float16"))
    found = run_on_gpus(tp, lambda comm: scored(model_on_gpu(speaking, comm, path=path)))[0]
    assert [len(one) for one in found] == [1, 2, 20, 0]
    for of_gpu, of_cpu in zip(found, expected, strict=True):
        assert of_gpu[:1] == of_cpu[:1] == [None] * len(of_gpu[:1])
        for (logprob, top), (right, right_top) in zip(of_gpu[1:], of_cpu[1:], strict=True):
            assert logprob == pytest.approx(right, abs=0.05)  # as in test_generation
            assert [x for _, x in top] == pytest.approx([x for _, x in right_top], abs=0.05)


@pytest.mark.parametrize(
    ("tp", "count", "blocks", "limits", "batches"),
    [
        (1, 1, 40, {}, {1}),
        (1, 3, 40, {}, {1, 2, 4}),
        (1, 5, 40, {"max_tokens_per_step": 9}, {1, 2, 4}),  # chunks of prompts together with others' tokens
        (1, 6, 6, {}, {1, 2, 4}),
        (1, 6, 40, {}, {2, 4, 8}),
        (3, 3, 40, {}, {1, 2, 4}),
    ],
)
def test_requests_served_together_get_the_same_tokens_as_alone(
    quick, monkeypatch, tp, count, blocks, limits, batches
):
    """Check also that one graph is captured per batch size 1, 2, 4, .., however long the sequences grow."""
    from minitp.cuda.decode_graph import DecodeGraph

    captured, capture = Counter(), DecodeGraph._captured

    def count_capture(graph):
        captured[threading.current_thread().name] += 1
        return capture(graph)

    def rank(comm):
        return served_and_alone(model_on_gpu(quick, comm), count, blocks, **limits)

    monkeypatch.setattr(DecodeGraph, "_captured", count_capture)
    tokens, expected, scheduler, pool = run_on_gpus(tp, rank)[0]
    assert tokens == expected
    assert scheduler.allocator.num_free_blocks == blocks
    assert set(pool.graphs) == batches
    assert set(captured.values()) == {1 + len(batches)}, "requests run alone share one pool and graph"
    assert (scheduler.num_preempted > 0) == (blocks == 6)
    assert (scheduler.load()["reused_tokens"] > 0) == (bool(limits) or blocks == 6)


CHOICES = [
    {"temperature": 0.9, "seed": 1, "min_p": 0.05},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "logprobs": 2},
    {"temperature": 1.2, "seed": 2, "top_k": 9, "presence_penalty": 1.0, "logprobs": 0},
    {"logit_bias": {7: 30, 9: 28}, "frequency_penalty": 0.9},
    {"logprobs": 21, "temperature": 0.5, "seed": 3},  # the host chooses
    {"prompt_logprobs": 1, "repetition_penalty": 0.8},
    {"temperature": 0.8, "seed": 4, "top_p": 0.7},
]


def chosen(model, run_ahead, blocks):
    """Run a request with each of CHOICES, some of which are preempted in a small pool; return them."""
    rng, found = random.Random(5), []
    for number, options in enumerate(CHOICES):
        prompt = [rng.randrange(101) for _ in range(3 + 4 * number)]
        params = SamplingParams(max_new_tokens=5 + number // 2, ignore_eos=True, **options)
        found.append(Request(params, (), prompt, 64))
    scheduler = run_requests(model, found, blocks, 4, max_tokens_per_step=40, run_ahead=run_ahead)
    assert scheduler is None or (scheduler.num_preempted > 0) == (blocks < 40)
    return found


@pytest.mark.parametrize(("tp", "blocks"), [(1, 12), (3, 80)])
def test_running_ahead_changes_no_choice_and_no_log_probability(quick, tp, blocks):
    """Compare requests of every kind, chosen by the GPU a batch ahead, with the host's choices."""

    def rank(comm):
        model = model_on_gpu(quick, comm)
        return [chosen(model, run_ahead, blocks) for run_ahead in (True, False)]

    ahead, simple = run_on_gpus(tp, rank)[0]
    for found, expected in zip(ahead, simple, strict=True):
        assert found.token_ids == expected.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            assert_same_logprobs(getattr(found, name), getattr(expected, name))


def test_a_batch_copies_only_what_changes(quick, cupy, monkeypatch):
    """Count the copies of batches that decode: 24 bytes per row to the GPU and 8 back, as docs say.

    A sequence's new block adds nothing. With log-probabilities, the copy back has 16 bytes for each pair.
    """
    copies, runtime = [], cupy.cuda.runtime
    copy = runtime.memcpyAsync

    def counted_copy(target, source, nbytes, kind, stream):
        copies.append((nbytes, kind))
        copy(target, source, nbytes, kind, stream)

    monkeypatch.setattr(runtime, "memcpyAsync", counted_copy)
    host_copies = [[], []]
    for number, name in enumerate(("asarray", "asnumpy")):
        original = getattr(cupy, name)
        counted = lambda *a, _f=original, _n=number, **o: host_copies[_n].append(0) or _f(*a, **o)  # noqa: E731
        monkeypatch.setattr(cupy, name, counted)

    def rank(comm, logprobs):
        engine = Engine(model_on_gpu(quick, comm), 40, 4)
        for number in range(3):
            params = SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=logprobs)
            engine.add(Request(params, (), [5, 6 + number], 64))
        for _ in range(3):  # the prompt, and the first two decode passes
            engine.run_batch()
        copies.clear()
        host_copies[:] = [], []
        for _ in range(5):
            engine.run_batch()
        return list(copies), host_copies

    to_gpu, to_host = runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost
    for logprobs, numbers in ((None, 1), (0, 2), (2, 6)):
        found, others = run_on_gpus(1, lambda comm, top=logprobs: rank(comm, top))[0]
        assert found == [(24 * 4, to_gpu), (8 * 4 * numbers, to_host)] * 5
        assert others == [[], []]


def assert_same_logprobs(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        assert one[0] == pytest.approx(other[0], abs=0.05)  # as in test_generation
        assert [x for _, x in one[1]] == pytest.approx([x for _, x in other[1]], abs=0.05)


@pytest.mark.parametrize("block_size", [1, 7])
def test_blocks_of_any_size(quick, block_size):
    def rank(comm):
        model = model_on_gpu(quick, comm)
        return served_and_alone(model, 2, 100 // block_size, block_size)

    tokens, expected, *_ = run_on_gpus(1, rank)[0]
    assert tokens == expected


@pytest.mark.parametrize("run_ahead", [True, False])
def test_a_batch_too_large_for_the_kernels(quick, monkeypatch, run_ahead):
    """Run it as several decode passes, whose rows change owners in turn, or, if recorded, like a prompt."""
    monkeypatch.setattr("minitp.cuda.fused.MAX_TOKENS", 2)
    monkeypatch.setattr("minitp.cuda.batches_ahead.MAX_TOKENS", 2)

    def rank(comm):
        return served_and_alone(model_on_gpu(quick, comm), 5, 40, run_ahead=run_ahead)

    tokens, expected, _, pool = run_on_gpus(1, rank)[0]
    assert tokens == expected
    assert max(pool.graphs) <= 2


# --- models without a fused path ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "dtype", "kv_dtype", "reason"),
    [
        ({}, "float32", "auto", "compute in 16 bits, not in float32"),
        ({}, "float16", "int8", "read a cache of float16, not of int8"),
        ({}, "bfloat16", "float16", "read a cache of bfloat16, not of float16"),
        ({"head_dim": 264}, "float16", "auto", "a head_dim of up to 256, not 264"),
    ],
)
def test_unfit_models_use_the_explicit_path(tmp_path, fields, dtype, kv_dtype, reason):
    fields = {**BASE, **SHAPES["uneven"], **fields}
    directory = write_tiny(tmp_path, **fields)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    prompt = [token % fields["vocab_size"] for token in PROMPT]

    def rank(comm):
        with pytest.raises(InputError, match=f"--path fused: .*{reason}.*; use --path explicit"):
            model_on_gpu(directory, comm, dtype, kv_dtype=kv_dtype, path="fused")
        model = model_on_gpu(directory, comm, dtype, kv_dtype=kv_dtype)
        assert type(model) is Model
        return list(generate(model, prompt, Request(params, (), prompt, 64)))

    cpu = load_model(open_model(str(directory), 1), SingleRank(), open_device(dtype), kv_dtype=kv_dtype)
    expected = list(generate(cpu, prompt, Request(params, (), prompt, 64)))
    assert run_on_gpus(2, rank) == [expected] * 2


def test_a_gpu_uses_the_fused_path_by_default(models):
    kinds = run_on_gpus(1, lambda comm: type(model_on_gpu(models["tied", "float16"], comm)).__name__)
    assert kinds == ["FusedModel"]
