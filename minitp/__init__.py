"""minitp: tensor-parallel LLM inference, written out and checked step by step."""

import importlib
import os
import sys

__version__ = "0.1.0.dev0"
__all__ = ["LLM", "Completion", "SamplingParams"]

_HOMES = {"LLM": "minitp.llm", "Completion": "minitp.llm", "SamplingParams": "minitp.sampling"}


def __getattr__(name):
    """What `from minitp import ..` offers, imported when it is wanted: a command needs little of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minitp' has no attribute {name!r}")
    _share_cores()
    return getattr(importlib.import_module(_HOMES[name]), name)


def _share_cores():
    """Under a user's own mpirun this is a rank; its BLAS decides about threads when numpy is imported."""
    from minitp.environment import limit_blas_threads, local_ranks, world_size

    world = world_size(os.environ)
    if world is not None and "numpy" not in sys.modules:
        limit_blas_threads(os.environ, local_ranks(os.environ, world))
