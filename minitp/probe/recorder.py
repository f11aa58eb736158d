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
from minitp.trace.write import FORMAT
from minitp.util.format import counted

ROPE, ATTENTION, ALL_REDUCE = "apply_rotary_pos_emb", "eager_attention_forward", "all_reduce"


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

    engine = "transformers"

    def __init__(self, fields, rank=0, ranks=1):
        self.fields, self.layers = fields, fields["num_hidden_layers"]
        self.rank, self.ranks = rank, ranks
        heads = fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
        self.sizes = {"H": heads, "K": fields.get("num_key_value_heads") or heads, "d": head_dim}
        self.arrays, self.passes, self.token_ids, self.roundings = {}, [], [], {}
        self.block, self.layer = None, None  # "attn" or "mlp" while such a block of this layer runs

    def begin(self, module, args, kwargs):
        """Begin a forward pass of the whole model, whose tokens are its first argument or input_ids."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.shape[0] != 1:
            raise InputError("the probe records passes of one sequence, with input_ids [1, T]")
        if not isinstance(kwargs.get("logits_to_keep", 0), int):
            raise InputError("the probe needs logits of the last positions; pass logits_to_keep as an int")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if getattr(mask, "ndim", 0) == 2 and not bool(mask.all()):
            raise InputError("the attention_mask hides tokens; pass the sequence without padding")
        if getattr(cache, "is_compileable", False):
            raise InputError(
                f"the probe cannot record a {type(cache).__name__}, which has positions that are not written "
                'yet; use a DynamicCache (in generate: cache_implementation="dynamic")'
            )
        self.begin_pass(ids[0].tolist())

    def begin_pass(self, token_ids):
        """Begin a forward pass over some tokens, a list of int, and return its (name, start, stop)."""
        start = len(self.token_ids)
        self.token_ids += token_ids
        name = f"decode.{len(self.passes)}" if self.passes else "prefill"
        self.passes.append((name, start, len(self.token_ids)))
        self.keep("tokens", None, np.array(token_ids, np.int64))
        return self.passes[-1]

    def enter_block(self, block, layer, module, args):
        """Note that a block of a layer begins."""
        self.block, self.layer = block, layer

    def leave_block(self, module, args, output):
        """Note that the block has ended."""
        self.block = None

    def take_input(self, source, layer, module, args, kwargs):
        """Record an input of a module."""
        self.take(source, layer, [*args, *kwargs.values()][source.index])
        if source.step == "embed" and kwargs.get("position_ids") is not None:
            self.keep("positions", None, to_numpy(kwargs["position_ids"])[0].astype(np.int64))

    def take_output(self, source, layer, module, args, output):
        """Record a module's output, or one of several."""
        outputs = output if isinstance(output, tuple) else (getattr(output, "logits", output),)
        if source.index >= len(outputs) or outputs[source.index] is None:
            return  # a norm that adds nothing, or logits that another rank gets
        self.take(source, layer, outputs[source.index])
        if source.step == "logits":  # with logits_to_keep, as in `generate`, those of the last positions
            pass_name = self.passes[-1][0]
            logits = self.arrays[full_name(pass_name, None, "logits")]  # [n, V]
            norm = self.arrays[full_name(pass_name, None, "final_norm")]  # [T, D]
            self.keep("final_norm", None, norm[len(norm) - len(logits) :])  # [n, D]

    def take(self, source, layer, tensor):
        """Record an array of a layout that the source describes."""
        array, steps = to_numpy(tensor), source.step.split()
        sizes = self.local_sizes(steps, source.layout, array)
        parts = [(steps[0], array)] if len(steps) == 1 else split_joined(steps, array, sizes)
        for step, part in parts:
            layout = source.layout
            if step in ("attn.k", "attn.v"):
                layout = layout.replace("Hd", "Kd")
            self.keep(step, layer, to_step(step, part, layout, sizes))

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

    def observed(self, name, function):
        """Return a function that records arguments and results of a function.

        The functions are the model's RoPE and attention, and all_reduce, whose first argument within a block
        is a partial sum of the block's output.
        """

        def observed_rope(*args, **kwargs):
            q, k = function(*args, **kwargs)
            for step, tensor, letter in (("attn.q_rope", q, "H"), ("attn.k_rope", k, "K")):
                self.keep(step, self.layer, to_step(step, to_numpy(tensor), f"1 {letter} T d", self.sizes))
            return q, k

        def observed_attention(module, query, key, value, *args, **kwargs):
            pass_name, start, _ = self.passes[-1]
            if start > 0 and key.shape[2] == query.shape[2]:
                raise InputError(
                    f"{pass_name} reads no cache: record one prompt in a file, and give its later passes the "
                    "cache of the one before (use_cache=True, past_key_values)"
                )
            for step, tensor in (("attn.k_cache", key), ("attn.v_cache", value)):
                self.keep(step, self.layer, to_step(step, to_numpy(tensor), "1 K S d", self.sizes))
            output, probs = function(module, query, key, value, *args, **kwargs)
            self.keep("attn.probs", self.layer, to_step("attn.probs", to_numpy(probs), "1 H T S", self.sizes))
            return output, probs

        def observed_all_reduce(tensor, *args, **kwargs):
            step = f"{self.block}.out_partial"
            is_output = self.block and tensor.shape[-1] == self.fields["hidden_size"]
            if is_output and full_name(self.passes[-1][0], self.layer, step) not in self.arrays:
                partial_sum = to_numpy(tensor)  # [1, T, D] or [T, D]
                self.keep(step, self.layer, partial_sum.reshape(-1, partial_sum.shape[-1]))
            return function(tensor, *args, **kwargs)

        return {ROPE: observed_rope, ATTENTION: observed_attention, ALL_REDUCE: observed_all_reduce}[name]

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
            "model": str(self.fields.get("_name_or_path") or "model"),
            "config": json.dumps(self.fields, default=str),
            "tp": str(self.ranks),
            "rank": str(self.rank),
            "dtype": self.arrays[full_name("prefill", None, "embed")].dtype.name,
            "layers": str(self.layers),
            "token_ids": json.dumps(self.token_ids),
            "passes": json.dumps(self.passes),
            "roundings": json.dumps(self.roundings),
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
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
