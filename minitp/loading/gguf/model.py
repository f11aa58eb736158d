"""A GGUF file of the llama architecture as if it were a Hugging Face directory: config, tensors, tokenizer.

Nothing is converted on disk: a rank reads the blocks of its own rows and columns. GGUF differs in three ways:

- Names. See NAMES; `output` is missing where embeddings are tied.
- RoPE. GGUF turns neighbours (2i, 2i + 1) of a head, Hugging Face the halves (i, i + d/2), so the rows of q
  and k lie in another order, which `read` puts back.
- RoPE scaling. Llama 3's factors are a tensor, instead of the parameters they come from (`gguf.config`).
"""

import json
import re

import numpy as np
from safetensors.numpy import save_file

from minitp.errors import InputError
from minitp.loading.checkpoint import Checkpoint, TensorInfo
from minitp.loading.gguf.config import ROPE_FACTORS, make_fields
from minitp.loading.gguf.file import GgufFile
from minitp.loading.gguf.tokenizer import make_tokenizer

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


class GgufModel:
    """A file that has been opened and understood.

    Attributes
    ----------
    fields : dict
        What config.json would have.
    tensors : GgufCheckpoint

    Raises
    ------
    InputError
        if it cannot be read, or is of another architecture than llama, a mixture of experts, or its RoPE is
        scaled in a way that is not supported.
    """

    def __init__(self, path):
        self.file = GgufFile(path)
        self.fields = make_fields(self.file)
        self.tensors = GgufCheckpoint(self.file, self.fields)

    def tokenizer(self):
        """A tokenizers.Tokenizer, or None if the file has none."""
        return make_tokenizer(self.file.metadata, self.file.path)

    def tokenizer_fields(self):
        """What tokenizer_config.json would have: the chat template and the tokens that it writes."""
        metadata = self.file.metadata
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        found = {"chat_template": metadata.get("tokenizer.chat_template")}
        for name in ("bos", "eos"):
            number = metadata.get(f"tokenizer.ggml.{name}_token_id")
            found[f"{name}_token"] = tokens[number] if number is not None and number < len(tokens) else None
        return found

    def write_directory(self, directory):
        """Write it as a Hugging Face directory, tensors in float16; it must exist."""
        tensors = {}
        for name, info in self.tensors.tensors.items():
            whole = self.tensors.read(name, tuple(slice(0, n) for n in info.shape))
            tensors[name] = np.ascontiguousarray(whole, dtype=np.float16)
        save_file(tensors, directory / "model.safetensors")
        write_json(directory / "config.json", self.fields | {"dtype": "float16"})
        write_json(directory / "tokenizer_config.json", self.tokenizer_fields())
        tokenizer = self.tokenizer()
        if tokenizer is not None:
            tokenizer.save(str(directory / "tokenizer.json"))


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file under Hugging Face's names and in its order of rows.

    Parameters
    ----------
    file : GgufFile
    fields : dict
        From `make_fields`.
    """

    def __init__(self, file, fields):
        self.directory, self._file = file.path, file
        names = {name: hugging_face_name(name, file.path) for name in file.tensors if name != ROPE_FACTORS}
        self._names = {there: here for here, there in names.items()}
        self.tensors = {
            there: TensorInfo(file.path, file.tensors[here].dtype, file.tensors[here].shape)
            for here, there in names.items()
        }
        self._head_dim = fields["head_dim"]

    def read(self, name, index):
        """One slice of a tensor, as Checkpoint.read; of a quantized one in float32."""
        here, (*rows, columns) = self._names[name], index
        turned = re.search(r"\.self_attn\.[qk]_proj\.", name)
        if not rows:  # a vector, which the file has as a matrix of one row
            columns = np.arange(columns.start, columns.stop)  # [n]
            whole = self._file.read(here, slice(0, 1), slice(0, self.tensors[name].shape[0]))[0]  # [all]
            return whole[paired(columns, self._head_dim) if turned else columns]  # [n]
        rows = rows[0]
        if turned:
            rows = paired(np.arange(rows.start, rows.stop), self._head_dim)  # [n]
        return self._file.read(here, rows, columns)  # [n, m]


def paired(rows, head_dim):
    """Where GGUF has the rows of q or k that Hugging Face has at `rows`: int [n] -> int [n].

    Row i + j d/2 of a head (j = 0: first half, 1: second) is half j of pair i: row 2 i + j.

    >>> paired(np.arange(8), 4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    head, row = np.divmod(rows, head_dim)  # [n] each
    half, pair = np.divmod(row, head_dim // 2)  # [n] each
    return head * head_dim + 2 * pair + half  # [n]


def hugging_face_name(name, where):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in NAMES:
        raise InputError(f"{where}: tensor {name} is none that a Llama model has; it is not supported")
    prefix = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{prefix}{NAMES[found[2]]}.{found[3]}"


def write_json(path, value):
    """One JSON object, readable."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
