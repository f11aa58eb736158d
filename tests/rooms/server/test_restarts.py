"""Tests of the server's restarts of single replicas, with a fake LLM."""

import asyncio
from types import SimpleNamespace

import pytest

from minitp.errors import RankError
from minitp.server import backend as backend_module
from minitp.server.backend import AdmissionLimits, Backend


@pytest.fixture
def ready(monkeypatch):
    """A server that is ready, and tries again at once."""
    monkeypatch.setattr(backend_module, "RETRY_S", 0)
    backend = Backend(None, str, AdmissionLimits(9, 60), restart=True)
    backend.state = "ready"
    return backend


def restart(backend, *results, error=None):
    """Let the restarts of an LLM have these results in turn; return how many there were."""
    left = list(results)

    def next_result():
        result = left.pop(0)
        if isinstance(result, Exception):
            backend.state = getattr(result, "state", backend.state)
            raise result
        return result

    llm = SimpleNamespace(restart=next_result, error=error)
    asyncio.run(backend._restart_replicas(llm))
    return len(results) - len(left)


def test_a_restart_that_fails_is_repeated(ready, capsys):
    assert restart(ready, RankError("replica 1: died again"), RankError("replica 1: no memory"), [1]) == 3
    assert ready.restarts == 1
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["minitp: replica 1: died again", "minitp: restarting again in 0 s"]
    assert said[-1] == "minitp: restarted: replica 1"


def test_a_restart_is_not_repeated_if_all_ranks_end(ready, capsys):
    closed = RankError("the ranks exited with code 3")
    assert restart(ready, closed, error=closed) == 0, "the loop of the LLM reports it"
    closed.state = "draining"
    assert restart(ready, closed) == 1
    assert capsys.readouterr().err == ""
