"""The steps of a model's forward passes, as its hooks and wrapped functions give them."""

import json
import sys

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minitp.errors import InputError
from minitp.mapping.convert import split_joined, to_step
from minitp.trace.names import full_name
from minitp.trace.write import FORMAT, UNNAMED
from minitp.util.format import counted


class ProbeRecorder:
    """The steps of a model's forward passes.

    Parameters
    ----------
    fields : dict
        The object in config.json.
    rank, ranks : int
        The number of this process and the number of processes among which the model is sharded.

    Attributes
    ----------
    arrays : dict of str to array
        The steps by full name.
    passes : list of (name, start, stop)
    token_ids : list of int
    roundings : dict of str to str or None
        The dtypes of steps whose inputs or results the engine rounds to a smaller one than its own; None if
        to 8 bits or less.
    """

    engine = ""  # the name of the engine
    recipes = None  # the table of its steps by model_type
    known_roundings = None  # the roundings that it is known for, by model_type

    def __init__(self, fields, rank=0, ranks=1):
        self.fields, self.layers = fields, fields["num_hidden_layers"]
        self.rank, self.ranks = rank, ranks
        heads = fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
        self.sizes = {"H": heads, "K": fields.get("num_key_value_heads") or heads, "d": head_dim}
        self.arrays, self.passes, self.token_ids = {}, [], []
        self.roundings = dict((self.known_roundings or {}).get(fields.get("model_type"), {}))
        self.layer = None  # the number of the layer whose steps are recorded
        self.attention = ""  # the kind of attention that the model has when it is not recorded, if known

    def begin_pass(self, token_ids):
        """Begin a forward pass over some tokens, a list of int, and return its (name, start, stop)."""
        start = len(self.token_ids)
        self.token_ids += token_ids
        name = f"decode.{len(self.passes)}" if self.passes else "prefill"
        self.passes.append((name, start, len(self.token_ids)))
        self.keep("tokens", None, np.array(token_ids, np.int64))
        return self.passes[-1]

    def take_input(self, source, layer, module, args, kwargs):
        """Record an input of a module."""
        self.take(source, layer, [*args, *kwargs.values()][source.index])

    def take_output(self, source, layer, module, args, output):
        """Record a module's output, or one of several."""
        outputs = output if isinstance(output, tuple) else (getattr(output, "logits", output),)
        if source.step == "logits":  # a loss may come first
            outputs = [one for one in outputs if len(getattr(one, "shape", ())) > 1]
        if source.index >= len(outputs) or outputs[source.index] is None:
            return  # a norm that adds nothing, or logits that another rank gets
        self.take(source, layer, outputs[source.index])
        pass_name = self.passes[-1][0]
        norm = self.arrays.get(full_name(pass_name, None, "final_norm"))  # [T, D]
        if source.step == "logits" and norm is not None:  # there may be logits of the last positions alone
            rows = len(self.arrays[full_name(pass_name, None, "logits")])
            self.keep("final_norm", None, norm[len(norm) - rows :])  # [n, D]

    def take(self, source, layer, tensor):
        """Record an array of a layout that the source describes."""
        array, steps = to_numpy(tensor), source.step.split()
        sizes = self.local_sizes(steps, source.layout, array)
        parts = [(steps[0], array)] if len(steps) == 1 else split_joined(steps, array, sizes)
        for step, part in parts:
            layout = source.layout
            if step in ("attn.k", "attn.v"):
                layout = layout.replace("Hd", "Kd")
            self.keep_in_layout(step, layer, part, layout, sizes)

    def local_sizes(self, steps, layout, array):
        """Return `sizes` with the numbers of heads that this rank's array of some joined steps has."""
        letter = layout.split()[-1][0]
        if letter not in "HK":
            return self.sizes
        whole = {"H": self.sizes["H"], "K": self.sizes["K"]}
        widths = [whole["K" if step in ("attn.k", "attn.v") else letter] for step in steps]
        if array.shape[-1] % self.sizes["d"]:
            width = counted(array.shape[-1], "column")
            raise InputError(
                f"{' '.join(steps)} of rank {self.rank} has {width}, not whole heads of {self.sizes['d']}; "
                "use a number of ranks that divides the KV heads"
            )
        heads = array.shape[-1] // self.sizes["d"]  # of all the joined steps
        return self.sizes | {name: size * heads // sum(widths) for name, size in whole.items()}

    def keep_in_layout(self, step, layer, array, layout, sizes):
        """Keep an array of a layout; if it has other axes, keep it as it is, because `judge` knows others."""
        if array.ndim == len(layout.split()) and (layout[0] != "1" or len(array) == 1):
            array = to_step(step, array, layout, sizes)
        self.keep(step, layer, np.ascontiguousarray(array))

    def keep(self, step, layer, array):
        """Keep a step of the current pass."""
        if not self.passes:
            raise InputError("the probe records passes of the whole model; call the model, not a part of it")
        self.arrays[full_name(self.passes[-1][0], layer, step)] = array

    def write(self, path, recipe):
        """Write all steps to a safetensors file with the metadata of a trace."""
        if not self.passes:
            raise InputError(
                f"{path}: no forward pass was run while the probe recorded, so nothing is written"
            )
        metadata = {
            "format": FORMAT,
            "source": f"{self.engine}, {recipe}",
            "model": str(self.fields.get("_name_or_path") or UNNAMED),
            "config": json.dumps(self.fields, default=str),
            "tp": str(self.ranks),
            "rank": str(self.rank),
            "dtype": self.arrays[full_name("prefill", None, "embed")].dtype.name,
            "layers": str(self.layers),
            "token_ids": json.dumps(self.token_ids),
            "passes": json.dumps(self.passes),
            "roundings": json.dumps(self.roundings),
            "attention": self.attention,
        }
        try:
            if self.ranks > 1:
                path.parent.mkdir(exist_ok=True)
            save_file(self.arrays, str(path), metadata)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be written: {error}") from error


def to_numpy(tensor):
    """Return a copy of a tensor as a NumPy array of the same dtype; bfloat16 is that of ml_dtypes."""
    if str(tensor.dtype) == "mlx.core.bfloat16":
        return np.array(tensor.view(sys.modules["mlx.core"].uint16)).view(ml_dtypes.bfloat16)
    if not hasattr(tensor, "detach"):  # an array of MLX
        return np.array(tensor)
    if hasattr(tensor, "to_local"):  # a DTensor, of which this rank has a part
        tensor = tensor.to_local()
    if getattr(tensor, "is_meta", False):
        raise InputError("the model is on the meta device, which has no numbers; load its weights first")
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
