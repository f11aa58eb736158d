"""The tiny checkpoints that the shards are cut from."""

import engine_shards
import pytest


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """The Model of each name in engine_shards.MODELS."""
    folder = tmp_path_factory.mktemp("models")
    return {name: engine_shards.Model(folder / name, name) for name in engine_shards.MODELS}
