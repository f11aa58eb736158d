"""Fixtures of the tests of `minitp compare`."""

import json
from functools import partial

import pytest
from dump_files import write
from tiny import write_tiny

from minitp.cli.main import main
from minitp.compare.run import compare_files


@pytest.fixture
def two(tmp_path):
    """Return a function that writes A and B and compares them."""

    def run(a, b, tolerance=None, mapped=None, kind="safetensors", rope=None):
        map_path = None
        if mapped is not None:
            map_path = tmp_path / "map.json"
            map_path.write_text(json.dumps(mapped))
        a, b = write(tmp_path / f"a.{kind}", a), write(tmp_path / f"b.{kind}", b)
        return compare_files(a, b, map_path, tolerance, rope=rope)

    return run


@pytest.fixture
def refused(refused):
    """Return a function that runs `minitp compare`, expects an error and returns its line."""
    return partial(refused, "compare")


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Return a function that runs `minitp trace` with options and returns the file, which it also caches."""
    directory = tmp_path_factory.mktemp("traces")
    write_tiny(directory / "model")
    write_tiny(directory / "theta", rope_theta=20000.0)
    write_tiny(directory / "seed", seed=1)
    qwen3 = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8, attention_bias=True)
    write_tiny(directory / "qwen3", **qwen3)
    partial = dict(model_type="phi3", architectures=["Phi3ForCausalLM"], partial_rotary_factor=0.75)
    write_tiny(directory / "partial", **partial)  # 6 of 8 dimensions
    made = {}

    def make(*options, tokens="5,6,7,8,9", model="model"):
        key = (*options, tokens, model)
        if key not in made:
            path = directory / f"{len(made)}.safetensors"
            argv = ["--tokens", tokens, "--model", str(directory / model), "--tp", "1", "-o", str(path)]
            assert main(["trace", *argv, *options]) == 0
            made[key] = path
        return made[key]

    return make
