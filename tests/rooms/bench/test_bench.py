"""Tests of `minitp bench`: the limit consists of the model's own products, and all figures agree."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from paths import GOLDENS
from tiny import write_tiny

import minitp
from minitp.bench.cpu_roofline import LEAST_S, BareProducts, all_reduce_seconds
from minitp.bench.duration import SLOWER, expected_seconds
from minitp.bench.fake_weights import TiledWeights
from minitp.bench.plot import plot
from minitp.bench.roofline import total_elements
from minitp.bench.rounds import StepTimer, keys_read, profile, timed_batch, timed_round
from minitp.bench.table import above_limit, lines
from minitp.cli.bench import Job, contexts
from minitp.cli.main import main
from minitp.comm import run_threads
from minitp.comm.single import ShardOnly, SingleRank
from minitp.device import Device
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.names import step_names
from minitp.trace.record import ObservedSteps

SHAPES = {
    "plain": {},
    "uneven": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    "tied": {"tie_word_embeddings": True},
}


class CountingNumPy:
    """NumPy with a count of the shapes of all matrix products."""

    def __init__(self):
        self.shapes = Counter()

    def matmul(self, a, b, **kwargs):
        if a.shape[0]:
            self.shapes[a.shape, b.shape] += 1
        return np.matmul(a, b, **kwargs)

    def asnumpy(self, a):
        return a

    def __getattr__(self, name):
        return getattr(np, name)


def counted_model(directory, tp, comm, **shape):
    source = open_model(str(write_tiny(directory, **shape)), tp)
    return load_model(source, comm, Device(CountingNumPy(), np.dtype(np.float32)))


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_bare_products_are_those_of_the_model(tmp_path, shape, tp):
    """Compare the counts of all shapes for a prompt, a token, and a token of each of two sequences."""
    model = counted_model(tmp_path, tp, ShardOnly(tp - 1, tp), **SHAPES[shape])
    products, shapes = BareProducts(model), model.device.xp.shapes
    caches = [model.new_cache(), model.new_cache()]
    last = slice(-1, None)
    for parts, at, logit_rows in (
        ([(range(9), caches[0])], last, 1),
        ([(range(3), caches[0])], None, 0),
        ([([1], caches[0])], last, 1),
        ([(range(5), caches[1])], None, 0),
        ([([1], caches[0]), ([2], caches[1])], slice(None), 2),
    ):
        shapes.clear()
        read = [keys_read(model, cache.length + len(ids), len(ids)) for ids, cache in parts]
        model.forward_batch([(list(ids), cache) for ids, cache in parts], logits_at=at)
        expected = Counter(shapes)
        assert sum(expected.values()) > 8
        shapes.clear()
        products.multiply([(len(ids), keys) for (ids, _), keys in zip(parts, read, strict=True)], logit_rows)
        assert shapes == expected


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_bare_products_of_a_mixture(rows):
    """Check the rows of all experts, and for a token and for many tokens also the shapes of all products."""
    source = open_model(str(GOLDENS / "mixtral"), 2)  # 5 experts in a layer, of which each token uses 2
    model = load_model(source, ShardOnly(1, 2), Device(CountingNumPy(), np.dtype(np.float32)))
    products, shapes = BareProducts(model), model.device.xp.shapes
    of_experts = products.products(model.weights.layers[0], rows)[3:]
    each = {1: [1, 1], 2: [1, 1, 2], 40: [16] * 5}[rows]  # two tokens use 3.2 of 5 experts on average
    assert [n for n, _ in of_experts] == [n for n in each for _ in range(2)]
    if rows == 2:
        return
    model.forward(list(range(rows)), model.new_cache(), logits_at=slice(-1, None))
    in_model, matrices = Counter(shapes), {b for _, b in shapes if b[0] == 36 or b[1] == 36}
    shapes.clear()
    products.multiply([(rows, rows)], logit_rows=1)

    def total(counts):
        """Return the number of rows by which each matrix is multiplied; the model's tokens choose freely."""
        return {b: sum(n * a[0] for (a, other), n in counts.items() if other == b) for b in matrices}

    assert total(shapes) == total(in_model)
    assert products.multiplied(rows) == sum(n * b[0] * b[1] for b, n in total(shapes).items())
    assert rows == 1 or products.read(rows) == sum(w.size for w in arrays_of(model.weights))


def arrays_of(weights):
    """Return all projections of a rank's weights."""
    for layer in weights.layers:
        yield from (layer.w_qkv, layer.w_o, layer.w_router)
        for expert in layer.experts:
            yield from (expert.w_gate_up, expert.w_down)
    yield weights.lm_head


def test_bytes_of_a_pass_are_the_bytes_of_its_matrices(tmp_path):
    model = counted_model(tmp_path, 1, SingleRank())
    products = BareProducts(model)
    products.multiply([(1, 1)], logit_rows=1)
    of_weights = [shapes for shapes in model.device.xp.shapes if shapes[0][0] == 1 and shapes[1][0] >= 32]
    counts = model.device.xp.shapes
    elements = sum(b[0] * b[1] * counts[a, b] for a, b in of_weights)
    assert total_elements(SingleRank(), products) == elements
    assert products.cache_bytes(10) == 4 * 2 * 2 * 2 * 10 * 8  # layers, k and v, KV heads, keys, head_dim


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_alone_has_the_shapes_of_that_rank(tmp_path, tp):
    """Compare ShardOnly with the same rank among others: equal shapes, and values up to the first sum."""
    source = open_model(str(write_tiny(tmp_path)), tp)

    def first_partial(model):
        found = []
        steps = ObservedSteps(lambda *step: found.append(step))
        record = lambda *_: steps  # noqa: E731
        logits = model.forward([1, 2, 3], model.new_cache(), logits_at=slice(None), record=record)
        return found[0][1], [(step, array.shape) for step, array in found], logits.shape

    def among_others(comm):
        return first_partial(load_model(source, comm, Device(np, np.dtype(np.float32))))

    for rank, (partial, shapes, whole) in enumerate(run_threads(tp, among_others)):
        alone = load_model(source, ShardOnly(rank, tp), Device(np, np.dtype(np.float32)))
        own_partial, own_shapes, own_whole = first_partial(alone)
        assert np.array_equal(own_partial, partial)
        assert own_shapes == shapes
        assert own_whole == whole


def test_a_timer_counts_the_time_of_each_step():
    timer = StepTimer()
    for _ in range(2):
        timer.start()
        time.sleep(0.02)
        timer("attn", 0).norm = None
        second = timer("attn", 1)
        second.q, second.k = None, None
        time.sleep(0.06)
        timer().final_norm = None
        time.sleep(0.1)  # between passes
    assert list(timer.seconds) == ["attn.norm", "attn.q k v", "final_norm"]
    assert 0.04 <= timer.seconds["attn.norm"] < 0.09
    assert timer.seconds["attn.q k v"] < 0.02
    assert 0.12 <= timer.seconds["final_norm"] < 0.19


def test_a_profile_has_every_step_once(tmp_path):
    model = counted_model(tmp_path, 1, SingleRank())
    for seconds in profile(model, [1, 2, 3, 4], new_tokens=3):
        named = []
        for step in seconds:
            block, _, names = step.rpartition(".")
            named += [f"{block}.{name}" if block else name for name in names.split()]
        assert sorted(named) == sorted(
            {name.removeprefix("layers.0.") for name in step_names(model.plan) if "layers.1" not in name}
        )
        assert all(s > 0 for s in seconds.values())


def test_a_round_excludes_the_time_of_the_limit(tmp_path):
    """Time a model that takes 300 ms for the prompt and 50 ms per token, on both ranks."""
    source = open_model(str(write_tiny(tmp_path)), 2)

    def rank(comm):
        model = load_model(source, comm, Device(np, np.dtype(np.float32)))
        forward = model.forward_batch

        def slow(parts, *args, **kwargs):
            time.sleep(0.05 if len(parts[0][0]) == 1 else 0.3)
            return forward(parts, *args, **kwargs)

        model.forward_batch = slow
        one = timed_round(model, BareProducts(model), [1, 2, 3], 5)
        return one.ttft_s, one.decode_s, one.bare_decode_s, tuple(one.all_reduce_shares)

    first, second = run_threads(2, rank)
    assert first == second
    ttft_s, decode_s, bare_decode_s, shares = first
    # Sleeps may end late on a busy machine, so the bounds are loose, but double counting would exceed them.
    assert 0.3 <= ttft_s < 0.6
    assert 0.05 <= decode_s < 0.1
    assert bare_decode_s < 0.02  # the products of a tiny model alone
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


def test_a_timed_batch_decodes_every_sequence(tmp_path):
    model = counted_model(tmp_path, 1, SingleRank())
    model.device.xp.shapes.clear()
    assert timed_batch(model, [1, 2, 3], sequences=3, passes=4) > 0
    gate_up = model.weights.layers[0].w_gate_up.shape
    assert model.device.xp.shapes[(3, gate_up[0]), gate_up] == 2 * (3 + 4)  # three prompts of 3, then 4 of 3


def test_a_larger_all_reduce_takes_longer(tmp_path):
    small, large = run_threads(
        2, lambda comm: (all_reduce_seconds(comm, np, 4), all_reduce_seconds(comm, np, 1 << 23))
    )[0]
    assert 0 < small < large


def test_contexts_double_and_leave_room_for_new_tokens():
    assert contexts(512, 16) == (32, 64, 128, 256, 496)
    assert contexts(1000, 16) == (32, 64, 128, 256, 512, 984)
    assert contexts(40, 10) == (30,)


def test_tiled_weights_are_as_large_and_as_random_as_real_ones():
    shapes = {"w.weight": (300, 4096), "norm.weight": (8,), "b.bias": (8,), "big.weight": (2000, 4096)}
    weights = TiledWeights(shapes, np.dtype(np.float16))
    w = weights.read("w.weight", (slice(0, 100), slice(0, 1024)))
    assert w.dtype == np.float16
    assert w.shape == (100, 1024)
    assert w.astype(float).std() == pytest.approx(4096**-0.5, rel=0.02)
    assert not np.array_equal(w, weights.read("w.weight", (slice(100, 200), slice(0, 1024))))
    assert np.array_equal(w, weights.read("w.weight", (slice(0, 100), slice(0, 1024))))
    assert weights.read("big.weight", (slice(0, 2000), slice(0, 4096))).shape == (2000, 4096)
    assert (weights.read("norm.weight", (slice(0, 8),)) == 1).all()
    assert (weights.read("b.bias", (slice(2, 4),)) == 0).all()


# --- the command ----------------------------------------------------------------------------------------


def bench(*argv):
    """Run `minitp bench --json` in a separate process and return its result."""
    command = [sys.executable, "-m", "minitp", "bench", "--json", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.mpi
def test_figures_agree_with_each_other(tiny, tmp_path):
    result = bench(
        "--model", tiny, "--tp", 2, "--rounds", 3, "--prompt-tokens", 20, "-n", 8, "--profile"
    )  # fmt: skip
    assert (result["tp"], result["rounds"], result["as_rank"]) == (2, 3, None)
    assert [one["bytes"] for one in result["limits"]["all_reduce"]] == [4, 128, 4096, 65536, 1 << 20]
    for part, speed, limit in (
        ("prefill", "ttft_s", "limit_s"),
        ("decode", "tokens_per_s", "limit_tokens_per_s"),
    ):
        figures = result[part]
        for name in (speed, limit, "share_of_limit"):
            assert 0 < figures[name]["min"] <= figures[name]["median"] <= figures[name]["max"]
    decode = result["decode"]
    low, high = decode["tokens_per_s"], decode["limit_tokens_per_s"]
    assert low["min"] / high["max"] <= decode["share_of_limit"]["median"] <= low["max"] / high["min"]
    # float32: all matrices, and k and v of both layers and KV heads at the middle of the continuation
    matrices = 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48) + 258 * 32
    assert decode["bytes_per_token"] == 4 * (matrices + 2 * 2 * 2 * 8 * 24)
    gigabytes = decode["bytes_per_token"] * decode["tokens_per_s"]["median"] / 1e9
    assert decode["gb_per_s"]["median"] == pytest.approx(gigabytes)
    assert len(decode["all_reduce_share_per_rank"]) == len(result["memory"]["private_bytes_per_rank"]) == 2
    for own, peak in zip(
        *[result["memory"][f"{kind}_bytes_per_rank"] for kind in ("private", "peak")], strict=True
    ):
        assert 1e7 < own <= peak < 2e9
    assert result["profile"]["decode_s"].keys() == result["profile"]["prefill_s"].keys()
    text = "\n".join(lines(result))
    for value in (f"{decode['tokens_per_s']['median']:.1f} tokens/s", "mlp.gate up", "rank 1"):
        assert value in text
    result["prefill"]["share_of_limit"]["median"] = 1.5
    assert lines(result)[-1].startswith("A speed is above its limit: the machine was busy with other work")


@pytest.mark.parametrize(
    "measured",
    [
        {"prefill": {"share_of_limit": {"median": 1.01}}, "decode": {"share_of_limit": {"median": 0.7}}},
        {"prefill": {"share_of_limit": {"median": 0.9}}, "decode": {"share_of_limit": {"median": 1.2}}},
        {"requests": {"share_of_limit": 1.05}},
        {"sweep": {"points": [{"tokens_per_s": 8, "limit_tokens_per_s": 9},
                              {"tokens_per_s": 9, "limit_tokens_per_s": 8}]}},
    ],
)  # fmt: skip
def test_a_speed_above_its_limit_is_noticed(measured):
    assert above_limit(measured)
    text = json.dumps(measured)
    for above, below in (("1.01", "1.0"), ("1.2", "0.9"), ("1.05", "0.5"), ('_per_s": 9', '_per_s": 8')):
        text = text.replace(above, below)
    assert not above_limit(json.loads(text))


def test_a_long_sweep_is_announced(tiny, monkeypatch, capsys):
    argv = ["bench", "--model", str(tiny), "--as-rank", "0", "--of", "1", "--rounds", "1", "-n", "2"]
    argv += ["--sweep", "context", "--max-context", "34", "--json"]
    assert main(argv) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("minitp.cli.bench.ANNOUNCED_S", 0)
    assert main(argv) == 0
    assert re.fullmatch(r"minitp: measuring takes about \d+ seconds?\n", capsys.readouterr().err)


def test_the_expected_time_counts_rounds_points_and_tokens(tmp_path):
    """The limits are such that each pass takes a second per token, and the products of attention nothing."""
    model = counted_model(tmp_path, 1, SingleRank())
    read = 2 * model.device.dtype.itemsize
    limits = {"bytes_per_token": 1e9 * read, "bandwidth_gb_per_s": read, "matrix_gflop_per_s": 4}
    job = Job(prompt_tokens=10, new_tokens=4, rounds=3, profile=False, sweep=None)
    bare = 2 * LEAST_S + 10
    assert expected_seconds(job, limits, model) == pytest.approx(3 * (SLOWER * (10 + 4) + bare), rel=1e-3)
    batches = replace(job, sweep="batch", points=(1, 8))
    more = 3 * (SLOWER * (8 * 10 + 8 * 4) + bare)
    assert expected_seconds(batches, limits, model) == pytest.approx(
        expected_seconds(job, limits, model) + more, rel=1e-3
    )
    contexts = replace(job, sweep="context", points=(10, 20))
    more = 3 * (SLOWER * (20 + 4) + bare + 10)
    assert expected_seconds(contexts, limits, model) == pytest.approx(
        expected_seconds(job, limits, model) + more, rel=1e-3
    )


@pytest.mark.parametrize(("over", "suffix"), [("context", ".svg"), ("batch", ".png")])
def test_a_sweep_and_its_picture(tiny, tmp_path, over, suffix):
    picture = tmp_path / f"sweep{suffix}"
    more = ["--max-context", 100] if over == "context" else ["--prompt-tokens", 8]
    result = bench("--model", tiny, "--tp", 1, "--sweep", over, "--plot", picture, *more)
    points = result["sweep"]["points"]
    assert [p[over] for p in points] == ([32, 64, 84] if over == "context" else [1, 2, 4, 8, 16, 32])
    for p in points:
        assert 0 < p["tokens_per_s"] < p["limit_tokens_per_s"]
        for name in ("tokens_per_s", "ttft_s" if over == "context" else "step_s"):
            assert p[f"{name}_range"][0] <= p[name] <= p[f"{name}_range"][1]
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in content[:1000]
    text = "\n".join(lines(result))
    assert all(f"{p['tokens_per_s']:.1f}" in text for p in points)


SWEEP = [
    {"context": 2**n, "ttft_s": n, "limit_ttft_s": 1, "tokens_per_s": 9, "limit_tokens_per_s": 10}
    for n in range(5, 8)
]  # fmt: skip


def svg_of(points, path):
    conditions = {"model": "a model", "dtype": "float32", "tp": 2, "machine": "a machine"}
    plot(conditions | {"sweep": {"over": "context", "points": points}}, str(path))
    return path.read_text()


def test_a_picture_has_every_point(tmp_path):
    """Count the markers, which are the only <use> elements of the SVG."""
    counts = [svg_of(points, tmp_path / "x.svg").count("<use ") for points in (SWEEP[:1], SWEEP)]
    assert counts[1] > counts[0]


def test_a_picture_has_the_range_the_labels_and_the_origin_of_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["minitp", "bench", "--sweep", "context", "--tp", "2"])
    plain = svg_of(SWEEP, tmp_path / "x.svg")
    ranges = {"tokens_per_s_range": [8, 9.5], "ttft_s_range": [1, 9]}
    banded = svg_of([point | ranges for point in SWEEP], tmp_path / "x.svg")
    assert banded.count("FillBetween") == plain.count("FillBetween") + 2
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", banded)
    for text in ("a model on 2 ranks, float32", "minitp", "limit", "seconds, logarithmic"):
        assert text in texts
    origin = "\n".join(texts)
    assert re.search(rf"a machine · 20\d\d-\d\d-\d\d · minitp {re.escape(minitp.__version__)}", origin)
    assert "minitp bench --sweep context --tp 2" in origin
    assert "legend" not in banded


@pytest.mark.mpi
@pytest.mark.parametrize("tp", [1, 2])
def test_requests_at_once_and_one_by_one(tiny, tp):
    result = bench(
        "--model", tiny, "--tp", tp, "--requests", 5, "--prompt-tokens", 9, "-n", 7, "--rounds", 1
    )["requests"]  # fmt: skip
    assert (result["count"], result["prompt_tokens"], result["new_tokens"]) == (5, 9, 7)
    assert result["steps"] == 7  # all prompts in the first, then a token of each
    # Only a quiet machine could tell which is faster. With one round, each ratio is that of two speeds.
    one_by_one, together, limit = (
        result[f"{name}_tokens_per_s"] for name in ("one_by_one", "together", "limit")
    )
    assert min(one_by_one, together, limit) > 0
    assert result["times_one_by_one"] == pytest.approx(together / one_by_one)
    assert result["share_of_limit"] == pytest.approx(together / limit)


@pytest.mark.parametrize("rank", [0, 2])
def test_one_rank_alone(tiny, rank):
    result = bench(
        "--model", tiny, "--as-rank", rank, "--of", 3, "--rounds", 1, "--prompt-tokens", 4, "-n", 4
    )
    assert (result["tp"], result["as_rank"]) == (3, rank)
    source = open_model(str(tiny), 3)
    elements = sum(np.prod(shard.shape_on(rank)) for shard in source.plan.tensors.values())
    assert result["weight_bytes_per_rank"] == [4 * elements]
    assert result["limits"]["all_reduce"] == []
    assert f"only rank {rank} of 3 ranks" in "\n".join(lines(result))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["-n", "1"], "--max-new-tokens 1: expected 2 or more"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0: expected 1 or more"),
        (["--prompt-tokens", "500"], "--prompt-tokens 500 and 64 new tokens exceed the context of 512"),
        (["--sweep", "rank"], "--sweep"),
        (["--sweep", "context", "--max-context", "16"], "a context of 16"),
        (["--plot", "x.png"], "--sweep"),
        (["--requests", "0"], "--requests 0: expected 1 or more"),
        (["--requests", "2", "--sweep", "batch"], "--sweep and --requests cannot be combined"),
        (["--profile", "--sweep", "batch"], "--sweep and --profile cannot be combined"),
        (["--profile", "--requests", "2"], "--requests and --profile cannot be combined"),
        (["--prompt-tokens", "9", "--sweep", "context"], "--sweep context and --prompt-tokens cannot be"),
        (["--as-rank", "0", "--of", "0"], "--of 0: expected at least 1 rank"),
        (["--sweep", "batch", "--plot", "x.pdf"], "x.pdf: expected a name that ends in .png or .svg"),
        (["--sweep", "batch", "--plot", "/nowhere/x.png"], "/nowhere/x.png"),
        (["--as-rank", "1"], "--as-rank R and --of N must be given together"),
        (["--of", "3"], "--as-rank R and --of N must be given together"),
        (["--as-rank", "3", "--of", "3"], "--as-rank 3 --of 3: expected a rank from 0 to 2"),
        (["--as-rank", "-1", "--of", "3"], "--as-rank -1 --of 3"),
        (["--as-rank", "0", "--of", "3", "--tp", "3"], "omit --tp"),
        (["--as-rank", "0", "--of", "3", "--split", "auto"], "--split auto measures all ranks"),
        (["--as-rank", "0", "--of", "9"], "4 attention heads"),
    ],
)
def test_errors_are_one_line(tiny, refused, argv, words):
    assert words in refused("bench", "--model", tiny, *argv)
