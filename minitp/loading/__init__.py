"""Model loading, from the value of `--model` to the arrays that a rank holds.

source.py              the model sources: a directory, a GGUF file, a Hugging Face id, the demo, random:NAME
locate.py              the directory or GGUF file that a value of --model names
hub.py                 downloads from the Hugging Face Hub
kinds.py               files that are not a model in Hugging Face's format
config.py              a checked config.json: one Config for all families
config_reader.py       the checks of config.json's fields, one by one
config_fields.py       the fields without an effect, or with one supported value
families.py            the differences between families, as a table
rope_config.py         the part of config.json about rotary position embedding
quantized.py           the refusal of quantized checkpoints
checkpoint.py          the tensors of safetensors files, read slice by slice
file_bytes.py          bytes from anywhere in a file, read by several threads at once
weights.py             a rank's slices, in the layout that `model` multiplies by
random_weights.py      weights drawn from a counter, for true shapes without a file
demo.py                the demo model, downloaded once
gguf/                  GGUF files: their tensors, config and tokenizer
export.py              rank{r}.safetensors for another engine
safetensors_writer.py  safetensors files written tensor by tensor
"""
