"""Fixtures of the tests of `minitp compare`."""

import json
from functools import partial

import pytest
from dump_files import write
from engine_dumps import PROMPT, TP, Reference
from safetensors import safe_open
from tiny import UNEVEN, write_tiny

from minitp.cli.main import main
from minitp.comm import run_threads
from minitp.compare.run import compare_files
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.record import passes_of, wanted_steps
from minitp.trace.write import write_trace


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


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return a function that makes the Reference of a model on TP ranks, which it also caches."""
    root, made = tmp_path_factory.mktemp("references"), {}

    def make(split=None, **overrides):
        key = json.dumps([split, overrides])
        if key not in made:
            directory = write_tiny(root / str(len(made)), tokenizer=False, **{**UNEVEN, **overrides})
            path, source = root / f"{len(made)}.safetensors", open_model(str(directory), TP, split=split)
            passes, device = passes_of(len(PROMPT), 1), open_device()
            wanted = wanted_steps(source.plan, passes, ["*"])

            def rank(comm):
                model = load_model(source, comm, device)
                write_trace(path, source, model, PROMPT, passes, wanted, per_rank=True)

            run_threads(TP, rank)
            made[key] = Reference(path, source.plan)
        return made[key]

    return make


@pytest.fixture
def oracle_like(tmp_path):
    """Return a function that writes a reference's whole arrays alone, with its metadata."""

    def make(reference):
        with safe_open(reference.path, framework="np") as file:
            metadata = file.metadata()
        whole = {name: x for name, x in reference.arrays.items() if not name.startswith("rank")}
        return write(tmp_path / "oracle.safetensors", whole, **metadata)

    return make
