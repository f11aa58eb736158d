"""The table of other engines: which of their arrays is which step, and which tensor is which weight.

The probe, `minitp judge`, `lint`, `bits` and `compare` read it.

table.py          the words of the table: Source, an array that is a step; EngineTensor, a weight
tensors.py        the tensors of each engine
lookup.py         an engine's tensor, looked up by its name
transformers.py, vllm.py, mlx.py, megatron.py: the steps of these engines' modules, by model_type
llama_cpp.py      the steps of llama.cpp's arrays, and its roundings
steps.py          a step, looked up by the name that an array has in an engine's dump
convert.py        the conversion from an engine's layout to that of a step
"""
