"""GGUF files, read as a checkpoint.

file.py        the file format: metadata, and tensors by slices
config.py      the metadata as the fields of a config.json
tokenizer.py   the metadata as a tokenizer
model.py       a GGUF file as a model: config, tensors and tokenizer
"""
