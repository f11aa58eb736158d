"""The judgement of recordings of llama.cpp, mlx-lm and vLLM, which make_engine_dumps.py has made."""

import json

import numpy as np
import pytest
from engine_models import FAMILIES, write_engine_gguf, write_engine_model
from paths import ENGINE_RECORDINGS
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.cli.main import main
from minitp.errors import InputError
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.trace.reference import open_oracle

RECORDINGS = sorted(path.stem for path in ENGINE_RECORDINGS.glob("*.safetensors"))
GGUF_KINDS = {"llama.cpp-llama": "F32", "llama.cpp-llama-f16": "F16", "llama.cpp-llama-q8": "Q8_0"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that gives the path of the model of a recording."""
    folder = tmp_path_factory.mktemp("models")
    paths = {family: write_engine_model(folder, family) for family in FAMILIES}

    def path_of(name):
        family = name.rpartition(".cpp")[2].split("-")[1]
        if name not in GGUF_KINDS:
            return paths[family]
        path = folder / f"{name}.gguf"
        return path if path.exists() else write_engine_gguf(path, paths[family], GGUF_KINDS[name])

    return path_of


def judged(path, model):
    source = open_model(str(model), 1)
    return judge(EngineRecording(RecordedFiles(path), source), open_oracle(source))


def changed(name, path, change, **metadata):
    """Write a recording whose arrays `change` has changed, a function of a dict, and return its path."""
    with safe_open(ENGINE_RECORDINGS / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = file.metadata()
    change(arrays)
    save_file(arrays, path, facts | metadata)
    return path


@pytest.mark.parametrize("name", RECORDINGS)
def test_nothing_is_blamed_in_a_recording_of_a_right_engine(name, models):
    judgement = judged(ENGINE_RECORDINGS / f"{name}.safetensors", models(name))
    assert judgement.result.blamed() == []
    assert len(judgement.result.findings) >= 48


def test_products_with_quantized_weights_are_not_judged_and_the_rest_is(models, tmp_path, capsys):
    name, step = "llama.cpp-llama-q8", "prefill/layers.1.{}"

    def wrong_act(arrays):
        for part in ("mlp.act", "attn.q"):
            arrays[step.format(part)] *= 1.01

    path = changed(name, tmp_path / "wrong.safetensors", wrong_act)
    assert main(["judge", str(path), "--model", str(models(name))]) == 1
    output = capsys.readouterr().out
    assert (
        "not judged, because they are computed in 8 bits: attn.q, attn.k, attn.v, attn.out, mlp.gate"
        in output
    )
    judgement = judged(path, models(name))
    assert {finding.step for finding in judgement.result.blamed()} == {"attn.q_rope", "mlp.act"}


def test_a_fault_is_larger_than_the_roundings_of_the_engine(models, tmp_path):
    """One percent is 20 roundings to float16."""
    for name, step in (("llama.cpp-llama", "attn.probs"), ("llama.cpp-llama-f16", "mlp.gate")):

        def wrong(arrays, step=step):
            arrays[f"prefill/layers.1.{step}"] *= 1.01

        judgement = judged(changed(name, tmp_path / "wrong.safetensors", wrong), models(name))
        assert judgement.result.blamed()[0].name == f"prefill/layers.1.{step}"


def test_a_rounding_is_allowed_only_where_the_metadata_says_so(models, tmp_path):
    name = "llama.cpp-llama-f16"
    path = changed(
        name, tmp_path / "other.safetensors", dict.copy, roundings=json.dumps({"attn.q": "float16"})
    )
    steps = {finding.step for finding in judged(path, models(name)).result.blamed()}
    assert steps >= {"attn.k", "attn.v", "mlp.up", "logits"}
    assert "attn.q" not in steps


def test_a_cache_in_float16_holds_what_was_rounded_to_it(models, tmp_path):
    def wrong(arrays):
        arrays["decode.1/layers.0.attn.v_cache"][0, 1, 3] += np.float16(0.01)

    name = "llama.cpp-llama"
    blamed = judged(changed(name, tmp_path / "wrong.safetensors", wrong), models(name)).result.blamed()
    assert blamed[0].name == "decode.1/layers.0.attn.v_cache"


@pytest.mark.parametrize("roundings", ["[]", "x", '{"attn.q": "int4"}', '{"attn.q": []}', "3"])
def test_damaged_roundings_are_refused(models, tmp_path, roundings):
    name = "llama.cpp-qwen3"
    path = changed(name, tmp_path / "damaged.safetensors", dict.copy, roundings=roundings)
    with pytest.raises(InputError, match=r"roundings .*: expected an object of float16 and bfloat16 by step"):
        judged(path, models(name))
