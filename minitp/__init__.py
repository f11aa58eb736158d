"""Tensor-parallel LLM inference, written out and checked step by step."""

import importlib
import os
import sys

from minitp.util.environment import divide_cores

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams"]

_HOMES = {
    "LLM": "minitp.llm",
    "Completion": "minitp.engine.completion",
    "SamplingParams": "minitp.sampling",
}


def __getattr__(name):
    """Import a public name on first use; a command needs few of them and should start quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minitp' has no attribute {name!r}")
    if "numpy" not in sys.modules:  # NumPy's BLAS fixes its number of threads on import
        divide_cores(os.environ)
    return getattr(importlib.import_module(_HOMES[name]), name)
