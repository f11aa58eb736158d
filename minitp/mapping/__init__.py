"""The table of other engines: which of their arrays is which step, and which tensor is which weight.

The probe, `minitp lint` and `minitp compare --map` read it.

table.py          the words of the table: Source, an array that is a step; EngineTensor, a weight; OtherEngine
convert.py        from an engine's layout to that of a step
transformers.py   Hugging Face transformers, by model_type
"""
