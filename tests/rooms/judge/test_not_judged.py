"""Tests that `judge` says what it cannot tell, or refuses it, and never calls it right."""

import json
import re

import numpy as np
import pytest
from paths import GOLDENS, PROBED
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.cli.main import main


def recording(name):
    """Return the arrays and the metadata of a right recording of transformers."""
    with safe_open(PROBED / f"{name}.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def judge(tmp_path, capsys):
    """Return a function that judges arrays, of several ranks if they are a list, and returns what it says."""

    def judge(arrays, metadata=None, golden="llama2", **options):
        path = tmp_path / "engine.safetensors"
        save_file(arrays, path, metadata)
        argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        code = main(["judge", str(path), "--model", str(GOLDENS / golden), *argv])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return judge


def test_a_bound_that_allows_everything_says_nothing(judge):
    """The rounding of 16 bits grows over the steps in between, up to any error of the logits."""
    arrays, _ = recording("llama2")
    kept = ("tokens", "attn.q", "logits")
    arrays = {name: x for name, x in arrays.items() if name.startswith("prefill") and name.endswith(kept)}
    arrays["prefill/logits"] = np.random.default_rng(0).permuted(arrays["prefill/logits"], axis=-1)
    code, out = judge(arrays)
    assert (code, "first wrong operation: prefill/logits" in out) == (1, True), "float32 is exact enough"
    code, out = judge(arrays, dtype="bfloat16")
    assert code == 0
    assert "not judged, because too many steps before were not recorded: prefill/" in out
    assert "prefill/logits  " not in out


@pytest.mark.parametrize("part", [np.s_[-1:, :50], np.s_[-1, :10], np.s_[:0]])
def test_logits_of_a_part_of_the_vocabulary_are_not_judged(part, judge):
    arrays, _ = recording("llama2")
    arrays = {name: x for name, x in arrays.items() if name.startswith("prefill")}
    arrays["prefill/logits"] = np.ascontiguousarray(3 * arrays["prefill/logits"][part])
    code, out = judge(arrays)
    assert code == 0
    assert "not judged: prefill/logits" in out or "not recorded: " in out


@pytest.mark.parametrize("rows", [np.s_[:], np.s_[-1:]])
def test_logits_of_a_padded_vocabulary_are_judged(rows, judge):
    arrays, _ = recording("llama2")
    arrays = {name: x for name, x in arrays.items() if name.startswith("prefill")}
    right = np.pad(arrays["prefill/logits"][rows], ((0, 0), (0, 13)))
    arrays["prefill/final_norm"] = arrays["prefill/final_norm"][rows]
    for factor in (1, 3):
        code, out = judge(arrays | {"prefill/logits": factor * right})
        assert (code, "not judged" in out) == (int(factor > 1), False)


def test_missing_logits_are_mentioned(judge):
    arrays, _ = recording("llama2")
    arrays = {name: x for name, x in arrays.items() if "logits" not in name and "final_norm" not in name}
    code, out = judge(arrays)
    assert code == 0
    assert "final_norm, logits" in out


def test_an_engine_with_other_layers_is_refused(judge):
    arrays, metadata = recording("llama2")
    fields = json.loads(metadata["config"]) | {"num_hidden_layers": 1}
    arrays = {name: x for name, x in arrays.items() if "layers.1." not in name}
    code, out = judge(arrays, metadata | {"config": json.dumps(fields), "layers": "1"})
    assert code == 2
    assert "the engine's config has num_hidden_layers 1, and that of " in out
    assert "llama2 2: it runs another model, or only some of its layers" in out


@pytest.mark.parametrize("token", [10**6, -1, 10**30])
def test_tokens_outside_the_vocabulary_are_refused(token, judge):
    arrays, metadata = recording("llama2")
    ids = [token, *json.loads(metadata["token_ids"])[1:]]
    code, out = judge(arrays, metadata | {"token_ids": json.dumps(ids)})
    assert code == 2
    assert re.search(r"token id \S+: the vocabulary has \d+ entries", out)


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"layers": "1"}, {"config": None}])
def test_ranks_of_another_run_are_refused(changed, tmp_path, capsys):
    arrays, metadata = recording("llama2")
    fields = json.loads(metadata["config"]) | {"rms_norm_eps": 1e-2}
    changed = {key: json.dumps(fields) if value is None else value for key, value in changed.items()}
    for rank in range(2):
        own = metadata | {"tp": "2", "rank": str(rank)} | (changed if rank else {})
        save_file(arrays, tmp_path / f"rank{rank}.safetensors", own)
    assert main(["judge", str(tmp_path), "--model", str(GOLDENS / "llama2")]) == 2
    error = capsys.readouterr().err
    assert "rank1.safetensors: its config, layers or dtype are not those of rank 0" in error


def test_the_own_attention_of_the_model_is_not_judged(judge):
    arrays, metadata = recording("llama2")
    code, out = judge(arrays, metadata | {"attention": "sdpa"})
    assert code == 0
    assert "recorded with eager attention; the model's own, sdpa, is not judged" in out
    assert "eager attention" not in judge(arrays, metadata | {"attention": "eager"})[1]


def test_longrope_beyond_its_original_context_is_refused(judge):
    arrays, metadata = recording("phi3")
    fields = json.loads((GOLDENS / "phi3-longrope/config.json").read_text())
    limit = fields["original_max_position_embeddings"]
    ids = [1] * (limit + 1)
    passes = json.dumps([["prefill", 0, limit + 1]])
    facts = {"token_ids": json.dumps(ids), "passes": passes, "config": json.dumps(fields)}
    code, out = judge(arrays, metadata | facts, golden="phi3-longrope")
    assert code == 2
    assert f"longrope is known up to its original context of {limit}" in out
