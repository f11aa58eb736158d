"""Fixtures for models of the hub."""

import pytest
from hub import OWNER_NAME, Hub
from huggingface_hub import constants


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """Start a hub with these files for this process, whose cache is tmp_path/cache; return the Hub."""
    hubs = []
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def serve(files, **more):
        hub = Hub(files, **more)
        hubs.append(hub)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setenv("HF_ENDPOINT", hub.address)  # for processes that the test starts
        monkeypatch.setenv("HF_HUB_CACHE", constants.HF_HUB_CACHE)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hub

    yield serve
    for hub in hubs:
        hub.close()


@pytest.fixture
def refusal(refused):
    """Return the line with which `generate` refuses OWNER_NAME, or a model and options of the test."""

    def run(*more, model=OWNER_NAME):
        line = refused("generate", "hi", "--tp", "1", "--model", model, *more)
        assert len(line) < 300, line
        return line.removeprefix("minitp: ").strip()

    return run
