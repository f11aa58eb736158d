"""The reference: a whole transformer in float64 NumPy, which imports nothing else of this package.

model.py   the forward pass, layer by layer, yielding every step by its name
ops.py     its operations, written apart from the model's
gguf.py    the tensors of a GGUF file, read with the gguf library
"""

from minitp.oracle.model import Oracle

__all__ = ["Oracle"]
