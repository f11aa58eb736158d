"""The recording of llama.cpp, through the callback that its scheduler calls after each operation.

llama.cpp is not imported: the caller has loaded it, with llama-cpp-python or another binding. Its contexts
have a field `cb_eval` for a function of C that gets each array of the graph before and after it is computed.
"""

import re
import sys
from contextlib import ExitStack, contextmanager

import numpy as np

from minitp.errors import InputError, shown
from minitp.loading.source import open_model
from minitp.mapping.convert import half_split, split_joined, to_step
from minitp.mapping.llama_cpp import IN_F16, PRODUCTS, llama_cpp_steps
from minitp.mapping.table import IN
from minitp.probe.ggml import CALLBACK, DTYPES, Ggml
from minitp.probe.ranks import check_target
from minitp.probe.recorder import ProbeRecorder
from minitp.trace.names import AFTER, BEFORE

LAYER_NUMBER = re.compile(r"(?:-|\bblk\.)(\d+)\b")
NOT_IN_PAIRS = 2  # the bit of RoPE's mode that is set if it rotates (x[i], x[i + d/2])
IN_HEADS = ("attn.q", "attn.k", "attn.q_norm", "attn.k_norm", "attn.q_rope", "attn.k_rope", "attn.k_cache")
CHOSEN_EXPERTS = "ffn_moe_topk-{i}"


@contextmanager
def record_llama_cpp(path, model, ggml=None):
    """Record the forward passes of llama.cpp within a `with` block, and write them to a file at its end.

    Contexts that llama-cpp-python creates within the block are recorded. With another binding, set `cb_eval`
    of the context's parameters to the `callback` of the recorder that the block gets.

    Parameters
    ----------
    path : str or Path
        The .safetensors file to write.
    model : str or Path
        The model that llama.cpp runs, as for `--model`: its Hugging Face directory, or a GGUF file of the
        architecture llama.
    ggml : ctypes.CDLL, optional
        The ggml library that llama.cpp uses; by default that of llama-cpp-python.

    Raises
    ------
    InputError
        If a pass has several sequences, lacks the logits of some tokens, or does not continue the one before,
        or the file cannot be written.
    """
    check_target(path)
    bindings = sys.modules.get("llama_cpp.llama_cpp")
    if ggml is None:
        if bindings is None:
            raise InputError("import llama_cpp before the recording, or pass ggml=, your llama.cpp's library")
        from llama_cpp._ggml import libggml as ggml
    recorder = LlamaCppRecorder(open_model(str(model), 1), Ggml(ggml))
    with ExitStack() as stack:
        if bindings is not None:
            create = bindings.llama_init_from_model

            def create_recorded(model, params):
                params.cb_eval = bindings.ggml_backend_sched_eval_callback(recorder.observe)
                return create(model, params)

            stack.callback(setattr, bindings, "llama_init_from_model", create)
            bindings.llama_init_from_model = create_recorded
        try:
            yield recorder
        except Exception as error:  # perhaps of a binding, because the callback has ended a pass
            if recorder.error is None:
                raise
            raise recorder.error from error
        finally:
            recorder.ended = True
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
    ended : bool
        Whether the recording has ended; nothing more is recorded then.
    """

    engine = "llama.cpp"

    def __init__(self, source, ggml):
        super().__init__(source.fields() | {"_name_or_path": source.name})
        self.ggml, self.steps = ggml, llama_cpp_steps(self.fields["model_type"])
        self.callback = CALLBACK(self.observe)
        self.error, self.ended, self.experts = None, False, None
        self.pairs = None  # the number of dimensions that RoPE rotates in pairs (x[2i], x[2i + 1])

    def observe(self, address, ask, _):
        """Return whether an array is wanted (`ask`), or record it and return whether to go on."""
        if self.ended:
            return not ask
        try:
            tensor = self.ggml.tensor(address)
            layer, names = self.names_of(tensor)
            found = next((name for name in names if name in self.steps or name == CHOSEN_EXPERTS), None)
            if ask:
                self.note_roundings(tensor, names)
            elif found is not None:
                self.take_tensor(tensor, layer, found)
        except Exception as error:  # ctypes would print it and go on
            self.error = self.error or error
            return False
        return not ask or found is not None

    def names_of(self, tensor):
        """Return the number of a layer, or None, and an array's names, with {i} in place of the number."""
        operation, name = self.ggml.operation(tensor), tensor.name.decode()
        names = [f"{name} {operation}", name]
        if operation in ("MUL_MAT", "MUL_MAT_ID", "ADD", "GET_ROWS"):
            factor = self.ggml.source(tensor, 1 if operation == "ADD" else 0).name.decode()
            names += [factor] if factor.endswith((".weight", ".bias")) else []
        numbers = [found[1] for found in map(LAYER_NUMBER.search, names) if found]
        names = [LAYER_NUMBER.sub(lambda found: found[0].replace(found[1], "{i}"), each) for each in names]
        if operation == "GET_ROWS":
            names = ["embd"] if names[-1] == "token_embd.weight" else []
        return int(numbers[0]) if numbers else None, [*names, operation]

    def note_roundings(self, tensor, names):
        """Note that an operation rounds the inputs of a step, or its result, to fewer bits than float32."""
        for name in names:
            if name in PRODUCTS and self.ggml.operation(tensor) in ("MUL_MAT", "MUL_MAT_ID"):
                dtype = DTYPES.get(self.ggml.source(tensor, 0).type)
                if dtype is not np.float32:
                    self.roundings |= dict.fromkeys(PRODUCTS[name], dtype and np.dtype(dtype).name)
            self.roundings |= dict.fromkeys(IN_F16.get(name, []), "float16")

    def take_tensor(self, tensor, layer, name):
        """Record the steps that an array is, or that are inputs of its operation."""
        self.layer = self.layer if layer is None else layer
        if name == CHOSEN_EXPERTS:
            self.experts = self.ggml.read(tensor)[0, 0]  # int [T, X]
            return
        operation = self.ggml.operation(tensor)
        if operation == "GET_ROWS":
            self.begin_pass(self.ggml.read(self.ggml.source(tensor, 1)).ravel().tolist())
        if operation == "ROPE":
            self.take_positions(self.ggml.read(self.ggml.source(tensor, 1)).ravel().astype(np.int64))
            dimensions, mode = tensor.op_params[1:3]
            self.pairs = None if mode & NOT_IN_PAIRS else dimensions
        for source in self.steps[name]:
            array = self.ggml.source(tensor, source.index) if source.where == IN else tensor
            self.take_array(source, array)

    def take_array(self, source, tensor):
        """Record an array as a step, or as several that are joined along its last axis."""
        array, letters, steps = self.ggml.read(tensor), source.layout.split(), source.step.split()
        array = array.reshape(array.shape[-len(letters) :])  # the axes before them have one element each
        if not self.passes:
            raise InputError("the recording begins within a pass; create the context within the block")
        _, start, stop = self.passes[-1]
        if "S" in letters:  # the cache has room for more positions
            array = array.take(range(stop), axis=letters.index("S"))
        tokens = array.shape[letters.index("T")] if "T" in letters else stop - start
        if tokens != stop - start:
            raise InputError(
                f"{tensor.name.decode()} has {tokens} of {stop - start} tokens, because llama.cpp leaves out "
                "those without logits; ask for the logits of all tokens (logits_all=True)"
            )
        if steps == ["mlp.experts"]:
            order = np.argsort(self.experts, axis=1)[:, :, None]  # [T, X, 1]
            array = np.take_along_axis(array, order, axis=1)  # [T, X, F]
        parts = split_joined(steps, array, self.sizes) if len(steps) > 1 else [(steps[0], array)]
        for step, part in parts:
            layer = None if step in BEFORE | AFTER else self.layer
            self.keep(step, layer, to_step(step, part, source.layout, self.sizes))

    def take_positions(self, positions):
        """Record the positions of a pass, int [T], which must be the next ones."""
        pass_name, start, stop = self.passes[-1]
        if positions.tolist() != list(range(start, stop)):
            raise InputError(
                f"{pass_name} has positions {shown(positions.tolist())}, expected {start} to {stop - 1}: "
                "record one sequence from its first token on, in a new context"
            )
        self.keep("positions", None, positions)

    def write(self, path, recipe):
        """Write all steps, in the half-split layout, to a safetensors file."""
        for name, array in self.arrays.items():
            step = ".".join(name.rsplit(".", 2)[1:])
            if step in IN_HEADS and self.pairs:
                self.arrays[name] = np.ascontiguousarray(half_split(array, self.pairs))
        super().write(path, recipe)
