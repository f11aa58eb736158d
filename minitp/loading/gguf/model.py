"""A GGUF model of the llama architecture, read like a Hugging Face directory: config, tensors, tokenizer.

Nothing is converted on disk: a rank reads the blocks of its own rows and columns. GGUF differs from Hugging
Face's files in three ways:

- Names: NAMES translates them. `output` is missing if the embeddings are tied.
- RoPE: GGUF rotates pairs (2i, 2i + 1) of a head, Hugging Face pairs (i, i + d/2), so the rows of q and k
  have a different order. `read` restores Hugging Face's order.
- RoPE scaling: GGUF stores Llama 3's factors as a tensor; `gguf.config` recovers the parameters.
"""

import json
import re

import numpy as np

from minitp.errors import InputError
from minitp.loading.checkpoint import Checkpoint, TensorInfo
from minitp.loading.gguf.config import ROPE_FACTORS, make_fields
from minitp.loading.gguf.file import GgufFile
from minitp.loading.gguf.tokenizer import make_tokenizer
from minitp.loading.safetensors_writer import TensorWriter

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Special tokens that chat templates use, and GGUF's names for them.
TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}


class GgufModel:
    """A GGUF file that has been opened and checked.

    Attributes
    ----------
    fields : dict
        The fields of the equivalent config.json.
    tensors : GgufCheckpoint

    Raises
    ------
    InputError
        if the file cannot be read, its architecture is not llama, it is a mixture of experts, or its RoPE
        scaling is not supported.
    """

    def __init__(self, path):
        self.file = GgufFile(path)
        self.fields = make_fields(self.file)
        self.tensors = GgufCheckpoint(self.file, self.fields)

    def tokenizer(self):
        """Return a tokenizers.Tokenizer, or None if the file has none."""
        return make_tokenizer(self.file.metadata, self.file.path)

    def tokenizer_fields(self):
        """Return the fields of a tokenizer_config.json: the chat template and the tokens that it uses."""
        metadata = self.file.metadata
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        fields = {"chat_template": metadata.get("tokenizer.chat_template")}
        for name, key in TOKENS.items():
            number = metadata.get(f"tokenizer.ggml.{key}_token_id")
            fields[f"{name}_token"] = tokens[number] if number is not None and number < len(tokens) else None
        return fields

    def write_directory(self, directory):
        """Write the model as a Hugging Face directory in float16; `directory` must exist."""
        infos = self.tensors.tensors
        with TensorWriter(directory / "model.safetensors", infos, {"format": "pt"}) as file:
            for name, info in infos.items():
                whole = self.tensors.read(name, tuple(slice(0, n) for n in info.shape))
                file.write(name, whole.astype(np.float16, copy=False))
        write_json(directory / "config.json", self.fields | {"dtype": "float16"})
        write_json(directory / "tokenizer_config.json", self.tokenizer_fields())
        tokenizer = self.tokenizer()
        if tokenizer is not None:
            tokenizer.save(str(directory / "tokenizer.json"))


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file under Hugging Face's names, with rows in Hugging Face's order.

    Parameters
    ----------
    file : GgufFile
    fields : dict
        The result of `make_fields`.
    """

    def __init__(self, file, fields):
        self.directory, self._file = file.path, file
        names = {name: hugging_face_name(name, file.path) for name in file.tensors if name != ROPE_FACTORS}
        self._names = {name: gguf_name for gguf_name, name in names.items()}
        self.tensors = {
            name: TensorInfo(tensor.file.path, tensor.dtype, tensor.shape)
            for name, tensor in ((name, file.tensors[gguf_name]) for gguf_name, name in names.items())
        }
        self._head_dim = fields["head_dim"]

    def read(self, name, index):
        """Read one slice of a tensor, like Checkpoint.read; quantized tensors are returned in float32."""
        gguf_name, (*rows, columns) = self._names[name], index
        reordered = re.search(r"\.self_attn\.[qk]_proj\.", name)
        if not rows:  # a vector, which GgufFile.read treats as a matrix of one row
            columns = np.arange(columns.start, columns.stop)  # [n]
            length = self.tensors[name].shape[0]
            whole = self._file.read(gguf_name, slice(0, 1), slice(0, length))[0]  # [length]
            return whole[gguf_rows(columns, self._head_dim) if reordered else columns]  # [n]
        rows = rows[0]
        if reordered:
            rows = gguf_rows(np.arange(rows.start, rows.stop), self._head_dim)  # [n]
        return self._file.read(gguf_name, rows, columns)  # [n, m]

    def read_into(self, name, index, out):
        """Read the slice `index` of a tensor into `out`, like Checkpoint.read_into."""
        out[...] = self.read(name, index)


def gguf_rows(rows, head_dim):
    """Return the GGUF row of each of Hugging Face's `rows` of q or k: int [n] -> int [n].

    Row i + j d/2 of a head (pair i, half j) is row 2 i + j in GGUF.

    >>> gguf_rows(np.arange(8), 4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    head, row = np.divmod(rows, head_dim)  # [n] each
    half, pair = np.divmod(row, head_dim // 2)  # [n] each
    return head * head_dim + 2 * pair + half  # [n]


def hugging_face_name(name, where):
    """Translate a tensor name: `blk.3.attn_q.weight` becomes `model.layers.3.self_attn.q_proj.weight`."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        raise InputError(f"{where}: tensor {name} is not supported: a Llama model has no such tensor")
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{prefix}{NAMES[match[2]]}.{match[3]}"


def write_json(path, value):
    """Write a JSON object with indentation."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
