"""The recording of llama.cpp, through the callback that its scheduler calls after each operation.

llama.cpp is not imported: the caller has loaded it, with llama-cpp-python or another binding. Its contexts
have a field `cb_eval` for a function of C that gets each array of the graph before and after it is computed.
"""

import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minitp.compare.heads import half_split
from minitp.errors import InputError
from minitp.loading.source import open_model
from minitp.mapping.convert import split_joined, to_step
from minitp.mapping.llama_cpp import PHI3, STEPS
from minitp.mapping.table import IN
from minitp.probe.ggml import CALLBACK, Ggml
from minitp.probe.recorder import ProbeRecorder

LAYER_NUMBER = re.compile(r"(?:-|blk\.)(\d+)(?=\b)")
IN_PAIRS = 2  # the bit of RoPE's mode that is not set if it rotates (x[2i], x[2i + 1])
EXPERTS = b"ffn_moe_topk-"  # the numbers of each token's experts
OF_HEADS = ("attn.q", "attn.k", "attn.q_norm", "attn.k_norm", "attn.q_rope", "attn.k_rope", "attn.k_cache")


@contextmanager
def record_llama_cpp(path, model, ggml=None):
    """Record the forward passes of a llama.cpp context within a `with` block, and write them to a file.

    Contexts that llama-cpp-python creates within the block are recorded. With another binding, set `cb_eval` of
    the context's parameters to the `callback` of the recorder that the block gets.

    Parameters
    ----------
    path : str or Path
        The .safetensors file to write.
    model : str
        The model, as for `--model`: a Hugging Face directory or a GGUF file of the architecture llama.
    ggml : ctypes.CDLL, optional
        The ggml library that llama.cpp uses; by default that of llama-cpp-python.

    Raises
    ------
    InputError
        If a pass has several sequences or other positions than the next ones, has no logits of some tokens, or
        the file cannot be written.
    """
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}; create it first")
    bindings = sys.modules.get("llama_cpp.llama_cpp")
    if ggml is None:
        if bindings is None:
            raise InputError("import llama_cpp before the recording, or give it the ggml library of your llama.cpp")
        from llama_cpp._ggml import libggml as ggml
    recorder = LlamaCppRecorder(open_model(str(model), 1), Ggml(ggml))
    if bindings is None:
        yield recorder
    else:
        create = bindings.llama_init_from_model

        def create_recorded(model, params):
            params.cb_eval = bindings.ggml_backend_sched_eval_callback(recorder.observe)
            recorder.kept.append(params.cb_eval)
            return create(model, params)

        bindings.llama_init_from_model = create_recorded
        try:
            yield recorder
        finally:
            bindings.llama_init_from_model = create
    if recorder.error is not None:
        raise recorder.error
    recorder.write(path, recorder.fields["model_type"])


class LlamaCppRecorder(ProbeRecorder):
    """The steps of the forward passes of a llama.cpp context.

    Parameters
    ----------
    source : ModelSource
    ggml : Ggml

    Attributes
    ----------
    callback : function of C
        The value for `cb_eval`.
    error : Exception or None
        The first error in the callback, which ends the pass.
    """

    engine = "llama.cpp"

    def __init__(self, source, ggml):
        super().__init__(source.fields() | {"_name_or_path": source.name})
        self.ggml, self.error, self.kept = ggml, None, []
        self.steps = STEPS | (PHI3 if self.fields["model_type"] == "phi3" else {})
        self.callback = CALLBACK(self.observe)
        self.in_pairs, self.experts = False, None

    def observe(self, address, ask, _):
        """Return whether an array is wanted (`ask`), or record it, and return whether to go on."""
        try:
            tensor = self.ggml.tensor(address)
            layer, found = self.find(tensor)
            if not ask and found is not None:
                self.take_tensor(tensor, layer, found)
        except Exception as error:  # ctypes would only print it
            self.error = self.error or error
            return False
        return self.error is None and (not ask or found is not None)

    def find(self, tensor):
        """Return the layer and the sources of an array, or None for sources if it is no step."""
        operation, name = self.ggml.operation(tensor), tensor.name.decode()
        names = [f"{name} {operation}", name]
        if operation in ("MUL_MAT", "ADD"):  # the product with a weight, or the sum with a bias
            factor = self.ggml.source(tensor, 0 if operation == "MUL_MAT" else 1).name.decode()
            names += [factor] if factor.startswith("blk.") else []
        if operation == "GET_ROWS" and self.ggml.source(tensor, 0).name == b"token_embd.weight":
            return None, self.steps["embd"]
        for name in names:
            layer, pattern = pattern_of(name)
            if pattern in self.steps:
                return layer, self.steps[pattern] or None
        return None, [] if operation == "FLASH_ATTN_EXT" or tensor.name.startswith(EXPERTS) else None

    def take_tensor(self, tensor, layer, sources):
        """Record the steps that an array is, or that are inputs of its operation."""
        self.layer = self.layer if layer is None else layer
        if sources == self.steps["embd"]:
            if self.ggml.operation(tensor) == "GET_ROWS":
                self.begin_pass(self.ggml.read(self.ggml.source(tensor, 1)).ravel().tolist())
            self.layer = None
        if self.ggml.operation(tensor) == "ROPE":
            self.take_positions(self.ggml.source(tensor, 1))
            self.in_pairs = not tensor.op_params[2] & IN_PAIRS
        if tensor.name.startswith(EXPERTS):
            self.experts = self.ggml.read(tensor)[0, 0]  # [T, X]
            return
        if self.ggml.operation(tensor) == "FLASH_ATTN_EXT":
            for number, step in ((1, "attn.k_cache"), (2, "attn.v_cache")):
                self.take_array(step, "K S d", self.layer, self.ggml.source(tensor, number))
        for source in sources:
            of = self.ggml.source(tensor, 0) if source.where == IN else tensor
            outside = source.step in ("embed", "final_norm", "logits")
            self.take_array(source.step, source.layout, None if outside else self.layer, of)

    def take_array(self, steps, layout, layer, tensor):
        """Record an array as a step, or as several that are joined along its last axis."""
        array, letters = self.ggml.read(tensor), layout.split()
        array = array.reshape(array.shape[-len(letters) :])  # the axes before them have one element each
        _, start, stop = self.passes[-1]
        if "S" in letters:  # the cache has room for more positions
            array = array.take(range(stop), axis=letters.index("S"))
        if "T" in letters and array.shape[letters.index("T")] != stop - start:
            raise InputError(
                f"{tensor.name.decode()} has {array.shape[letters.index('T')]} of {stop - start} tokens: llama.cpp "
                "leaves out those without logits; ask for the logits of all tokens (logits_all=True)"
            )
        if steps == "mlp.experts":
            order = np.argsort(self.experts, axis=1)[:, :, None]  # [T, X, 1]
            array = np.take_along_axis(array, order, axis=1)  # [T, X, F]
        parts = split_joined(steps.split(), array, self.sizes) if " " in steps else [(steps, array)]
        for step, part in parts:
            self.keep(step, layer, to_step(step, part, layout, self.sizes))

    def begin_pass(self, token_ids):
        start = len(self.token_ids)
        self.token_ids += token_ids
        name = f"decode.{len(self.passes)}" if self.passes else "prefill"
        self.passes.append((name, start, len(self.token_ids)))
        self.keep("tokens", None, np.array(token_ids, np.int64))

    def take_positions(self, tensor):
        """Record the positions of the current pass, which must be the next ones."""
        pass_name, start, stop = self.passes[-1]
        positions = self.ggml.read(tensor).ravel().astype(np.int64)  # [T]
        if positions.tolist() != list(range(start, stop)):
            raise InputError(
                f"{pass_name} has positions {positions.tolist()[:4]}.., expected {start} to {stop - 1}: record one "
                "sequence, from its first token on, without other prompts before or beside it"
            )
        self.keep("positions", None, positions)

    def write(self, path, recipe):
        """Write all steps, in the half-split layout, to a safetensors file."""
        for name, array in self.arrays.items():
            step = name.partition("/")[2].split(".", 2)[-1]
            if step in OF_HEADS and self.in_pairs:
                self.arrays[name] = np.ascontiguousarray(half_split(array))
        super().write(path, recipe)


def pattern_of(name):
    """Return the number of a layer in a name, or None, and the name with {i} in its place.

    >>> pattern_of("Qcur-1 ROPE"), pattern_of("blk.12.attn_output.weight"), pattern_of("result_norm")
    ((1, 'Qcur-{i} ROPE'), (12, 'blk.{i}.attn_output.weight'), (None, 'result_norm'))
    """
    found = LAYER_NUMBER.search(name)
    if found is None:
        return None, name
    return int(found[1]), name[: found.start(1)] + "{i}" + name[found.end(1) :]
