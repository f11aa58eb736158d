"""The table of other engines: which of their arrays is which step, and which tensor is which weight.

The probe, `minitp lint` and `minitp compare --map` read it.

table.py          the words of the table: Source, an array that is a step; EngineTensor, a weight; OtherEngine
tensors.py        the tensors of each engine
lookup.py         an engine's tensor, looked up by its name
transformers.py, vllm.py, mlx.py: the steps of these engines' modules, by model_type
llama_cpp.py      the steps of llama.cpp's arrays, and its roundings
convert.py        the conversion from an engine's layout to that of a step
"""
