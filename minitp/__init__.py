"""minitp: tensor-parallel LLM inference, written out and checked step by step."""

__version__ = "0.1.0.dev0"
