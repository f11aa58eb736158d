"""GGUF files, read as a checkpoint.

file.py        where each tensor lies, and its numbers
config.py      the metadata as the fields of a config.json
tokenizer.py   the metadata as a tokenizer
model.py       all of it together, as `loading.source` wants it
"""
