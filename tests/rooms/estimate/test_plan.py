"""Tests of `minitp plan`: the measurement of this machine, and the command's output."""

import dataclasses
import doctest
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
from hub import OWNER_NAME, Hub, run_command
from llama_shapes import llama
from paths import DOCS
from tiny import CONFIG, write_tiny

from minitp.bench import this_machine
from minitp.bench.this_machine import sample
from minitp.cli import plan_text
from minitp.cli.main import main
from minitp.estimate.estimate import Estimate
from minitp.estimate.hardware import GPUS, cpu
from minitp.estimate.work import ITEM_BYTES, weight_bytes
from minitp.loading.config import parse_config, read_config
from minitp.loading.demo import demo_directory
from minitp.loading.source import open_config
from minitp.util import environment, format

TINY = parse_config(CONFIG, "tiny")

# --- this machine ---------------------------------------------------------------------------------------


def test_real_measurement():
    """Check that the figures are plausible on any machine; docs/performance.md has the accuracy."""
    # A separate process, because it sets the number of BLAS threads before importing NumPy.
    command = [sys.executable, "-m", "minitp", "plan", "--tp", "1", "--layers", "10", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    machine, row = result["hardware"], result["estimates"][0]
    assert machine["cores"] == environment.cores()
    assert 1e8 < machine["memory_bytes_per_s"] < 1e13
    assert 1e9 < machine["flops_per_s"] < 1e15
    assert machine["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    decode_bytes = result["weight_bytes"] + 513 * result["kv_cache_bytes_per_token"]
    limit = row["decode_limit_tokens_per_s"]
    assert limit == pytest.approx(machine["memory_bytes_per_s"] / decode_bytes, rel=0.01)
    assert row["decode_expected_tokens_per_s"] < limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measurement_of_few_heads(monkeypatch, dtype):
    """Measure a model of four heads on eight cores: four threads run, and the matrix rate is scaled up."""
    seen = []
    monkeypatch.setattr(this_machine, "cores", lambda: 8)
    monkeypatch.setattr(this_machine, "bandwidth", lambda comm, products: seen.append(comm.size) or 7e9)
    monkeypatch.setattr(this_machine, "matrix_rate", lambda comm, products, rows: 5e9)
    machine = this_machine.measure_cpu(TINY, dtype)
    assert seen == [4] * 4
    assert (machine.cores, machine.memory_bytes_per_s) == (8, 7e9)
    assert machine.flops_per_s == {dtype: 10e9}


@pytest.mark.parametrize(("model", "layers"), [("smollm2", 18), ("random:mistral-7b", 1)])
def test_sample_exceeds_the_caches_and_is_small(model, layers):
    config = open_config(model)
    part, plan = sample(config, "float32", 2)
    assert part.num_hidden_layers == layers
    assert plan.tp == 2
    held = sum(weight_bytes(plan, rank, "float32") for rank in range(2))
    assert 256e6 < held < 1.1e9
    assert (part.hidden_size, part.intermediate_size) == (config.hidden_size, config.intermediate_size)


def test_sample_of_a_huge_layer_is_a_share_of_it():
    huge = llama(16384, 53248, 126, 128, 8, 128256)
    _, plan = sample(huge, "float32", 2)
    assert plan.tp == 32
    assert 256e6 < sum(weight_bytes(plan, rank, "float32") for rank in range(2)) < 1.1e9
    part, _ = sample(TINY, "float32", 2)
    assert part.num_hidden_layers == 2, "a small model stays in the caches when it runs, too"


def test_blas_threads_are_one_while_this_machine_is_measured():
    """Check the BLAS variables, which have an effect only if set before NumPy is imported."""
    code = (
        "import os, sys; from minitp.util import environment; from minitp.cli.main import main\n"
        "assert 'numpy' not in sys.modules\n"
        "main(['plan', '--layers', '1', '--gpu', sys.argv[1], '--json'])\n"
        "print([os.environ.get(name) for name in environment.BLAS_THREADS])"
    )
    clean = {k: v for k, v in os.environ.items() if k not in environment.BLAS_THREADS}
    for name, threads in (("cpu", "1"), ("h100", None)):
        done = subprocess.run([sys.executable, "-c", code, name], env=clean, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == str([threads] * 4), done.stderr


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def fixed(monkeypatch):
    """Replace the measurement of `--gpu cpu` with fixed figures."""
    for name in environment.BLAS_THREADS:
        monkeypatch.setenv(name, "1")
    rates = dict.fromkeys(ITEM_BYTES, 190e9)
    monkeypatch.setattr("minitp.cli.plan_result.measure_cpu", lambda config, dtype: cpu(2, 24e9, 43e9, rates))


def printed(capsys, *argv):
    """Run the command twice; return its JSON object and its text."""
    assert main(["plan", *map(str, argv), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert main(["plan", *map(str, argv)]) == 0
    return json.loads(out), capsys.readouterr().out


def joined(text):
    return " ".join(text.split())


EXAMPLES = {
    "demo": ["--tp", 2],
    "not a usual size": ["--model", "random:mistral-7b", "--gpu", "a100-40gb", "--tp", 5],
    "nodes": ["--model", "random:mistral-7b", "--gpu", "h200", "--tp", 8, "--nodes", 4],
    "some do not fit": ["--model", "random:llama-3-8b", "--gpu", "rtx-4090", "--batch", 24, "--tp", 1],
    "nothing fits": ["--model", "random:mistral-7b", "--gpu", "cpu"],
    "long": ["--model", "random:mistral-7b", "--gpu", "b200", "--context", 32768, "--prompt-tokens", 32000],
}


@pytest.mark.parametrize("argv", EXAMPLES.values(), ids=EXAMPLES)
def test_table_agrees_with_json(fixed, capsys, argv):
    result, text = printed(capsys, *argv)
    assert max(map(len, text.splitlines())) <= 110
    blocks = [block.splitlines() for block in text.rstrip().split("\n\n")]
    rows = result["estimates"]
    memory = [line.split() for line in blocks[2][2:]]
    assert len(memory) == len(rows)
    for cells, row in zip(memory, rows, strict=True):
        asked = (row["tp"], row["nodes"]) == (result["tp"], result["nodes"])
        assert (cells[0] == ">") == asked
        cells = cells[1:] if asked else cells
        assert cells[:2] == [str(row["tp"]), str(row["nodes"])]
        sizes = (row["weight_bytes_per_rank"], row["kv_cache_bytes_per_token_per_rank"])
        assert cells[2:6] == " ".join(map(format.size, sizes)).split()
        assert cells[6:9] == [
            str(row["longest_context_tokens"]),
            row["longest_context_limited_by"],
            str(row["largest_batch"]),
        ]
        smallest = result["smallest_tp_that_fits"]
        refusal = "does not fit" + (f"; TP={smallest} does" if smallest else "")
        assert " ".join(cells[9:]) == ("" if row["fits"] else refusal)
    fitting = [row for row in rows if row["fits"]]
    assert len(blocks) == (5 if fitting else 4)
    if not fitting:
        return
    speed = [line.replace(">", " ").split() for line in blocks[3][2:]]
    assert len(speed) == len(fitting)
    for cells, row in zip(speed, fitting, strict=True):
        texts = [str(row["tp"]), str(row["nodes"])]
        texts += [plan_text.duration(row[f"prefill_{kind}_s"]) for kind in ("limit", "expected")]
        texts += [plan_text.rounded(row[f"decode_{kind}_tokens_per_s"]) for kind in ("limit", "expected")]
        texts += [str(row["batch"])]
        texts += [plan_text.rounded(row[f"batch_{kind}_tokens_per_s"]) for kind in ("limit", "expected")]
        texts += [f"{row[f'collective_share_{kind}']:.0%}" for kind in ("limit", "expected")]
        assert cells == " ".join(texts).split()


def test_json_is_complete(fixed, capsys):
    result, text = printed(capsys, "--model", "random:mistral-7b", "--gpu", "h100", "--tp", 4)
    assert (result["model"], result["dtype"], result["layers"]) == ("random:mistral-7b", "bfloat16", 32)
    assert result["parameters"] == 7241732096
    assert result["weight_bytes"] == 2 * result["parameters"]
    assert result["kv_cache_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert (result["model_context_tokens"], result["sliding_window_tokens"]) == (32768, 4096)
    assert (result["context_tokens"], result["prompt_tokens"], result["batch"]) == (4096, 512, None)
    assert result["hardware"]["flops_per_s"] == 989e12
    assert result["hardware"]["link"]["name"] == "NVLink 4"
    assert {key for row in result["estimates"] for key in row} == {
        field.name for field in dataclasses.fields(Estimate)
    }
    for note in result["notes"]:
        assert note in joined(text).replace(" - ", " ")
    assert "7.24 billion parameters in 32 layers, 14.48 GB in bfloat16" in joined(text)
    assert "at TP=4: q, k and v 7.3, attention 6.0, o and down 16.0, gate and up 22.9, norms 5.8." in joined(
        text
    )
    assert "one H100" in result["hardware"]["measured_with_minitp"]
    assert "gpt-fast" in result["hardware"]["published"]
    for gpu, own, published in (("a100", False, True), ("cpu", True, False)):
        other, text_of_other = printed(capsys, "--model", "random:mistral-7b", "--gpu", gpu)
        sources = other["hardware"]["measured_with_minitp"], other["hardware"]["published"]
        assert tuple(map(bool, sources)) == (own, published)
        assert ("measured with minitp" in text_of_other) == own
        assert ("published by others" in text_of_other) == published
        assert "expected kernel times" not in text_of_other
    for source in ("measured with minitp", "one H100", "published by others", "gpt-fast", "InfiniBand"):
        assert source in text, "the origin of the figures"


def test_rows(fixed, capsys):
    def sizes(*argv):
        result, text = printed(capsys, *argv)
        return [(row["tp"], row["nodes"]) for row in result["estimates"]], joined(text)

    one_node, more = [(1, 1), (2, 1), (4, 1), (8, 1)], [(16, 2), (32, 4)]
    mistral = ["--model", "random:mistral-7b", "--gpu", "h100"]
    assert sizes(*mistral)[0] == one_node + more
    assert sizes(*mistral, "--tp", 12)[0] == [*one_node, (12, 2), *more]
    assert sizes(*mistral, "--tp", 16, "--nodes", 4)[0] == [*one_node, (16, 2), (16, 4), (32, 4)]
    assert sizes("--model", "random:tinyllama-1.1b")[0] == one_node, "a CPU is one node"
    rows, text = sizes("--gpu", "h100", "--tp", 9)
    assert rows == [*one_node, (9, 2)]
    assert "TP=16 and 32 left out: the model has only 9 attention heads." in text


def test_answer(fixed, capsys):
    llama = ["--model", "random:llama-3-8b", "--gpu", "rtx-4090"]
    result, text = printed(capsys, *llama, "--tp", 1)
    speed = plan_text.rounded(result["estimates"][0]["decode_expected_tokens_per_s"])
    assert "TP=1 fits with 1 sequence of 4096 tokens; expect " in joined(text)
    assert f"then {speed} tokens/s." in joined(text)
    _, text = printed(capsys, *llama, "--tp", 1, "--batch", 13)
    refusal = "TP=1 does not fit with 13 sequences of 4096 tokens; the smallest TP that does is 2."
    assert refusal in joined(text)
    _, text = printed(capsys, "--model", "random:mistral-7b", "--tp", 2)
    assert "TP=2 does not fit with 1 sequence of 4096 tokens; nor does any other TP." in joined(text)
    _, text = printed(capsys, "--model", "random:mistral-7b", "--gpu", "h100", "--tp", 16)
    assert "TP=16 over 2 nodes fits" in joined(text)


def test_replicas_of_gpus_add_their_speeds(fixed, capsys):
    argv = ["--model", "random:mistral-7b", "--gpu", "h100", "--tp", 2, "--batch", 8]
    (alone, _), (several, text) = printed(capsys, *argv), printed(capsys, *argv, "--replicas", 3)
    assert several["estimates"] == alone["estimates"]
    assert (alone["all_replicas"], several["all_replicas"]["ranks"]) == (None, 6)
    row = next(row for row in alone["estimates"] if row["tp"] == 2)
    together = several["all_replicas"]["expected_tokens_per_s"]
    assert together == 3 * row["batch_expected_tokens_per_s"]
    speed = f"3 replicas (6 ranks) with 24 sequences give {plan_text.rounded(together)} tokens/s in all."
    assert speed in joined(text)
    result, _ = printed(capsys, *argv, "--replicas", 3, "--split", "3,1")
    equal, unequal = (row["batch_expected_tokens_per_s"] for row in result["estimates"])
    assert equal != unequal
    assert result["all_replicas"]["expected_tokens_per_s"] == 3 * unequal


def test_replicas_divide_a_cpu(fixed, capsys):
    argv = ["--model", "random:tinyllama-1.1b", "--tp", 1, "--batch", 2]
    (alone, _), (several, text) = printed(capsys, *argv), printed(capsys, *argv, "--replicas", 2)
    assert several["hardware"] == alone["hardware"], "the whole machine"
    one, of_two = (result["estimates"][0] for result in (alone, several))
    assert of_two["decode_limit_tokens_per_s"] == pytest.approx(one["decode_limit_tokens_per_s"] / 2)
    assert of_two["largest_batch"] < one["largest_batch"] / 2, "each replica has its own weights"
    assert "Each row is one replica, on 1/2 of the machine." in joined(text)
    too_large, text = printed(capsys, *argv, "--replicas", 9)
    assert too_large["all_replicas"] is None
    assert "in all" not in text.split("\n\n")[1]


def test_dtype_depends_on_the_hardware_unless_given(fixed, capsys, tmp_path):
    def dtype(*argv):
        result, _ = printed(capsys, *argv)
        assert result["weight_bytes"] == result["parameters"] * ITEM_BYTES[result["dtype"]]
        return result["dtype"]

    directory = tmp_path / "model"  # in float32
    write_tiny(directory)
    assert dtype() == "float32"
    assert dtype("--gpu", "h100") == "float16", "as the demo is stored"
    assert dtype("--gpu", "h100", "--model", "random:mistral-7b") == "bfloat16"
    assert dtype("--gpu", "h100", "--model", directory) == "bfloat16"
    assert dtype("--gpu", "h100", "--model", directory, "--dtype", "float32") == "float32"
    assert dtype("--dtype", "float16") == "float16"


def test_short_contexts(capsys, tmp_path):
    """Check that the default lengths shrink to the model's context."""
    directory = write_tiny(tmp_path / "model", max_position_embeddings=100)
    result, _ = printed(capsys, "--gpu", "h100", "--model", directory)
    assert (result["context_tokens"], result["prompt_tokens"]) == (100, 99)


def test_layers(capsys):
    few, _ = printed(capsys, "--gpu", "h100", "--model", "random:mistral-7b", "--layers", 3)
    assert few["layers"] == 3
    assert few["estimates"][1]["collectives_per_token"] == 8


def test_config_json_is_enough(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "novelty": 3}))
    result, text = printed(capsys, "--gpu", "h100", "--model", tmp_path, "--tp", 3)
    assert result["parameters"] == 32032
    assert "config.json has a field 'novelty' unknown to minitp" in joined(text)


def test_the_demo_needs_no_download(capsys, tmp_path, monkeypatch):
    """Compare the built-in shapes with the demo's config.json."""
    kept = read_config(demo_directory())
    assert dataclasses.replace(open_config("smollm2"), eos_token_ids=kept.eos_token_ids) == kept
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result, _ = printed(capsys, "--gpu", "h100")
    assert result["parameters"] == 134515008
    assert list(tmp_path.iterdir()) == []


def test_output_in_the_docs(capsys):
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    argv, output = re.search(r"```console\n\$ minitp (plan .*)\n((?s:.*?))```", page).groups()
    assert main(argv.split()) == 0
    assert capsys.readouterr().out == output


def test_examples_in_docstrings():
    for module in (format, plan_text):
        assert doctest.testmod(module).failed == 0


# --- Hugging Face ids -----------------------------------------------------------------------------------


def test_hub_id(tmp_path):
    """Check that only config.json is downloaded, and that it is cached."""
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"large", "README.md": b""}
    hub = Hub(files)
    argv = ["plan", "--gpu", "h100", "--model", OWNER_NAME, "--json"]
    try:
        first = run_command(tmp_path / "home", hub.address, *argv)
        assert (first.returncode, first.stderr) == (0, "")
        assert json.loads(first.stdout)["parameters"] == 32032
        assert hub.fetched() == ["config.json"]
        hub.requests.clear()
        offline = run_command(tmp_path / "home", hub.address, *argv, HF_HUB_OFFLINE="1")
        assert offline.stdout == first.stdout
        nothing = run_command(tmp_path / "empty", hub.address, *argv, HF_HUB_OFFLINE="1")
        assert (nothing.returncode, nothing.stdout, nothing.stderr.count("\n")) == (2, "", 1)
        assert f"minitp: --model {OWNER_NAME}: " in nothing.stderr
        assert "unset HF_HUB_OFFLINE to download it" in nothing.stderr
        assert hub.requests == []
    finally:
        hub.close()
    down = run_command(tmp_path / "home", hub.address, *argv)
    assert down.stdout == first.stdout, "the hub may also be down"


def test_unequal_gpus_and_shares(fixed, capsys):
    llama = ["--model", "random:llama-3-8b", "--gpu", "l40s,rtx-4090"]
    result, text = printed(capsys, *llama, "--split", "auto")
    assert result["split"] == "1,1.2", "864 and 1008 GB/s"
    assert [(row["tp"], row["split"]) for row in result["estimates"]] == [(2, None), (2, "1,1.2")]
    equal, unequal = (row["decode_limit_tokens_per_s"] for row in result["estimates"])
    assert unequal > equal, "the L40S is slower"
    assert "TP=2 with --split 1,1.2 fits" in joined(text)
    first, second = result["ranks"]
    assert (first["query_heads"], second["query_heads"]) == ([0, 15], [15, 32])
    assert f"1 rtx-4090 24.00 GB {format.size(second['weight_bytes'])} 81.9 kB 15:32 3:8" in joined(text)
    slowest = max(rank["decode_limit_s"] for rank in result["ranks"])
    collectives = result["estimates"][1]["collective_share_limit"]
    assert 1 / unequal == pytest.approx(slowest / (1 - collectives), rel=1e-6)
    result, _ = printed(capsys, *llama, "--split", "memory")
    assert result["split"] == "2,1", "47 and 23 GB after the reserve"
    result, _ = printed(capsys, *llama)
    assert (result["split"], len(result["estimates"]), len(result["ranks"])) == (None, 1, 2)


def test_a_rank_gets_no_more_than_fits(fixed, capsys):
    """An H100 reads three times as fast as an L40S, but holds no more than 63 GB of weights."""
    model = ["--model", "random:llama-3-8b", "--dtype", "float32", "--gpu"]
    assert printed(capsys, *model, "l40s,h100", "--split", "auto")[0]["split"] == "1,5"
    result, text = printed(capsys, *model, "rtx-4090,h100", "--split", "3,1")
    assert not result["estimates"][1]["fits"]
    assert "TP=2 with --split 3,1 does not fit with 1 sequence" in joined(text)
    assert "--split memory gives each rank what its memory holds" in joined(text)
    assert "measured with minitp: for h100, the kernels" in joined(text)
    assert "for rtx-4090, 74% of the bandwidth" in joined(text)


def test_shares_of_equal_hardware(fixed, capsys):
    result, text = printed(capsys, "--model", "random:mistral-7b", "--gpu", "a100", "--split", "3,1")
    assert (result["tp"], result["split"]) == (2, "3,1")
    assert "0:24" in text
    for split in ("auto", "memory"):
        result, _ = printed(capsys, "--gpu", "h100", "--split", split, "--tp", 2)
        assert (result["tp"], result["split"], result["ranks"]) == (2, None, [])
    result, _ = printed(capsys, "--split", "3,1")
    assert [rank["query_heads"] for rank in result["ranks"]] == [[0, 7], [7, 9]]


def test_without_tp_the_fewest_ranks_that_fit_are_marked(fixed, capsys, monkeypatch):
    large = ["--model", "random:llama-3-8b", "--gpu", "rtx-4090"]
    result, text = printed(capsys, *large, "--batch", 24)
    assert result["tp"] == result["smallest_tp_that_fits"] > 1
    assert f"TP={result['tp']} fits with 24 sequences" in joined(text)
    result, _ = printed(capsys, *large, "--nodes", 3)
    assert (result["tp"], result["nodes"]) == (3, 3), "a rank on each node at least"
    result, text = printed(capsys, *large, "--batch", 10_000)
    assert (result["tp"], result["smallest_tp_that_fits"]) == (8, None)
    assert "nor does any other TP" in joined(text)
    monkeypatch.setattr(environment, "physical_cores", lambda: 3)
    result, _ = printed(capsys, "--model", "random:tinyllama-1.1b")
    assert result["tp"] == 3, "on this machine what generate would start"


# --- errors ---------------------------------------------------------------------------------------------

REFUSED = {
    "unknown gpu": (["--gpu", "h300"], "invalid choice: 'h300' (choose from "),
    "unknown dtype": (["--dtype", "int8"], "invalid choice: 'int8'"),
    "tp too large": (["--tp", 5], "--tp 5: this model has 4 attention heads"),
    "tp too large for a cpu": (["--gpu", "cpu", "--tp", 5], "--tp 5: this model has 4 attention heads"),
    "tp no number": (["--tp", "many"], "--tp many: expected a number"),
    "tp 0": (["--tp", 0], "--tp 0: expected at least 1"),
    "layers": (["--layers", 3], "has 2 layers; choose from 1 to 2"),
    "context 1": (["--context", 1], "--context 1: this model's context is 512 tokens; give 2 to 512"),
    "context too long": (["--context", 513], "--context 513: this model's context is 512"),
    "prompt 0": (["--prompt-tokens", 0], "--prompt-tokens 0: a prompt and one more token must fit"),
    "prompt fills it": (["--context", 64, "--prompt-tokens", 64], "must fit --context 64; give 1 to 63"),
    "batch 0": (["--batch", 0], "--batch 0: expected at least 1 sequence"),
    "nodes 0": (["--tp", 4, "--nodes", 0], "--nodes 0: expected 1 to 4 for --tp 4"),
    "more nodes than ranks": (["--tp", 2, "--nodes", 3], "--nodes 3: expected 1 to 2 for --tp 2"),
    "one gpu of several": (["--gpu", "h100,h300"], "invalid choice: 'h300'"),
    "cpu among gpus": (["--gpu", "h100,cpu"], "invalid choice: 'cpu'"),
    "other tp": (["--gpu", "h100,a100", "--tp", 3], "--tp 3, but --gpu has 2 GPUs; give a GPU for each rank"),
    "other split": (["--gpu", "h100,a100", "--split", "1,1,1"], "--split '1,1,1', but --gpu has 2 GPUs"),
    "split and tp": (["--split", "3,1", "--tp", 3], "--tp 3, but --split '3,1' is for 2 ranks; omit --tp"),
    "share 0": (["--split", "3,0"], "--split '3,0': the share of rank 1 is '0'"),
    "shares of more than the heads": (["--split", "1,1,1,1,2"], "--split with 5 shares: this model has 4"),
    "nodes of a cpu": (["--gpu", "cpu", "--nodes", 1], "--nodes 1: --gpu cpu is this machine only"),
    "no such model": (["--model", "/nowhere"], "--model /nowhere: no such directory"),
    "unknown shapes": (["--model", "random:gpt-5"], "random:gpt-5: unknown model; choose from"),
}


@pytest.fixture
def refused(refused, monkeypatch):
    """Return `refused` for this command, which must fail before it measures anything."""

    def never(*_):
        raise AssertionError("this machine was measured")

    monkeypatch.setattr("minitp.cli.plan_result.measure_cpu", never)
    for name in environment.BLAS_THREADS:
        monkeypatch.setenv(name, "1")

    return partial(refused, "plan")


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options(refused, tiny, case):
    argv, expected = REFUSED[case]
    gpu = [] if "--gpu" in argv else ["--gpu", "h100"]
    assert expected in refused("--model", tiny, *gpu, *argv)


def test_choices_are_listed(refused):
    line = refused("--gpu", "h300")
    for name in ("cpu", *GPUS):
        assert re.search(rf"\b{name}\b", line)


def test_directory_without_a_config(refused, tmp_path):
    assert f"--model {tmp_path}: the directory is empty" in refused("--gpu", "h100", "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model_type 'mamba'" in refused("--gpu", "h100", "--model", tmp_path)
