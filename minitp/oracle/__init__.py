"""The oracle: a whole transformer in float64 NumPy that imports nothing else from this package.

model.py     the forward pass, layer by layer, which yields every named step
families.py  the families' settings from config.json: defaults, windows, RoPE, names of experts
ops.py       its operations, written independently of minitp.ops
gguf.py      the tensors of a GGUF file, read with the gguf library
"""

from minitp.oracle.model import Oracle

__all__ = ["Oracle"]
