"""GGUF files, read as a checkpoint.

file.py        the file format: metadata, and tensors by slices
header.py      the header of a file: metadata, and the type, shape and place of each tensor
config.py      the metadata as the fields of a config.json
tokenizer.py   the metadata as a tokenizer
splits.py      the rules by which byte-level BPE splits a text into words
model.py       a GGUF file as a model: config, tensors and tokenizer
"""
