"""Hooks on a PyTorch model that record its steps, and the file that gets them.

PyTorch is not imported: the model brings it. A model needs `named_modules`, modules with
`register_forward_hook` and `register_forward_pre_hook`, and a Hugging Face `config`.
"""

import json
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minitp.errors import InputError, shown
from minitp.mapping.convert import split_joined, to_step
from minitp.mapping.table import IN
from minitp.mapping.transformers import LAYERS, TRANSFORMERS
from minitp.trace.names import full_name
from minitp.trace.write import FORMAT
from minitp.util.format import counted

NOT_A_MODEL = (
    "the probe needs a causal language model of transformers itself, without a wrapper (of torch.compile: "
    "model._orig_mod; of PEFT: model.merge_and_unload())"
)
ROPE, ATTENTION = "apply_rotary_pos_emb", "eager_attention_forward"


@contextmanager
def record(model, path, recipe="auto"):
    """Record the forward passes of a model within a `with` block, and write them to a file at its end.

    The file is a trace (see `trace.write`), which `minitp compare` reads. Passes are called `prefill`,
    `decode.1`, .. as in traces of minitp; a second prompt is an error.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of Hugging Face transformers. Eager attention is switched on meanwhile.
    path : str or Path
        The .safetensors file to write.
    recipe : str
        A model_type of `mapping.transformers.TRANSFORMERS`; "auto" takes that of the model's config.

    Raises
    ------
    InputError
        If there is no recipe for the model, a pass has several sequences, padding or a static cache, a
        later pass does not read the cache, or the file cannot be written.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise InputError(f"{NOT_A_MODEL}, not a {type(model).__name__}")
    fields = model.config.to_dict()
    name = fields.get("model_type") if recipe == "auto" else recipe
    if name not in TRANSFORMERS:
        raise InputError(f"recipe {shown(name)}: there are recipes for {', '.join(TRANSFORMERS)}")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}; create it first")
    recorder = ProbeRecorder(fields)
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = [f"{LAYERS.format(i=layer)}.self_attn" for layer in range(recorder.layers)]
    missing = [path for path in ("lm_head", *attention) if path not in modules]
    if missing and missing[0] in ("lm_head", attention[0]):
        raise InputError(f"{NOT_A_MODEL}; this {type(model).__name__} has no {missing[0]}")
    if missing:
        raise InputError(
            f"the config has {counted(recorder.layers, 'layer')}, and the model has no {missing[0]}"
        )
    with ExitStack() as stack:
        stack.callback(partial(model.set_attn_implementation, model.config._attn_implementation))
        model.set_attn_implementation("eager")
        stack.enter_context(hooked(model, modules, TRANSFORMERS[name], recorder))
        yield recorder
    recorder.write(path, name)


@contextmanager
def hooked(model, modules, recipe, recorder):
    """Give a recorder what the modules and functions of a model get and return, within a `with` block."""
    path_of = {}  # the path of each module that has a hook
    with ExitStack() as stack:

        def add(register, hook, **options):
            stack.callback(register(hook, **options).remove)

        # The hooks of one module run in this order, so the pass begins before its first input is recorded.
        add(model.register_forward_pre_hook, recorder.begin, with_kwargs=True)
        for pattern, sources in recipe.items():
            layers = range(recorder.layers) if "{i}" in pattern else [None]
            for layer in layers:
                path = pattern.format(i=layer)
                module = modules.get(path)
                if module is None:
                    continue  # a joined projection takes its place
                first = path_of.setdefault(module, path)
                if first != path:
                    raise InputError(
                        f"{first} and {path} are one module, so the probe cannot tell their steps apart; "
                        "make one of them a copy (copy.deepcopy)"
                    )
                for source in sources:
                    if source.where == IN:
                        hook = partial(recorder.take_input, source, layer)
                        add(module.register_forward_pre_hook, hook, with_kwargs=True)
                    else:
                        add(module.register_forward_hook, partial(recorder.take_output, source, layer))
        for layer in range(recorder.layers):
            attention = modules[f"model.layers.{layer}.self_attn"]
            add(attention.register_forward_pre_hook, partial(recorder.enter_layer, layer))
        functions = sys.modules[type(attention).__module__]
        for name in (ROPE, ATTENTION):
            original = getattr(functions, name)
            stack.callback(setattr, functions, name, original)
            setattr(functions, name, recorder.observed(name, original))
        yield


class ProbeRecorder:
    """The steps of a model's forward passes.

    Parameters
    ----------
    fields : dict
        The object in config.json.

    Attributes
    ----------
    arrays : dict of str to array
        The steps by full name.
    passes : list of (name, start, stop)
    token_ids : list of int
    """

    def __init__(self, fields):
        self.fields, self.layers = fields, fields["num_hidden_layers"]
        heads = fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
        self.sizes = {"H": heads, "K": fields.get("num_key_value_heads") or heads, "d": head_dim}
        self.arrays, self.passes, self.token_ids, self.layer = {}, [], [], None

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
        start = len(self.token_ids)
        self.token_ids += ids[0].tolist()
        name = f"decode.{len(self.passes)}" if self.passes else "prefill"
        self.passes.append((name, start, len(self.token_ids)))
        self.keep("tokens", None, np.array(ids[0].tolist(), np.int64))

    def enter_layer(self, layer, module, args):
        self.layer = layer

    def take_input(self, source, layer, module, args, kwargs):
        """Record a module's first input."""
        self.take(source, layer, args[0] if args else next(iter(kwargs.values())))
        if source.step == "embed" and kwargs.get("position_ids") is not None:
            self.keep("positions", None, to_numpy(kwargs["position_ids"])[0].astype(np.int64))

    def take_output(self, source, layer, module, args, output):
        """Record a module's output, or the first of several."""
        output = output.logits if hasattr(output, "logits") else output
        self.take(source, layer, output[0] if isinstance(output, tuple) else output)
        if source.step == "logits":  # with logits_to_keep, as in `generate`, those of the last positions
            pass_name = self.passes[-1][0]
            logits = self.arrays[full_name(pass_name, None, "logits")]  # [n, V]
            norm = self.arrays[full_name(pass_name, None, "final_norm")]  # [T, D]
            self.keep("final_norm", None, norm[len(norm) - len(logits) :])  # [n, D]

    def take(self, source, layer, tensor):
        """Record an array of a layout that the source describes."""
        array, steps = to_numpy(tensor), source.step.split()
        parts = [(steps[0], array)] if len(steps) == 1 else split_joined(steps, array, self.sizes)
        for step, part in parts:
            layout = source.layout
            if step in ("attn.k", "attn.v"):
                layout = layout.replace("Hd", "Kd")
            self.keep(step, layer, to_step(step, part, layout, self.sizes))

    def observed(self, name, function):
        """Return a function that records arguments and results of the model's RoPE or attention function."""

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

        return observed_rope if name == ROPE else observed_attention

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
            "source": f"transformers, {recipe}",
            "model": str(self.fields.get("_name_or_path") or "model"),
            "config": json.dumps(self.fields, default=str),
            "tp": "1",
            "dtype": self.arrays[full_name("prefill", None, "embed")].dtype.name,
            "layers": str(self.layers),
            "token_ids": json.dumps(self.token_ids),
            "passes": json.dumps(self.passes),
        }
        try:
            save_file(self.arrays, str(path), metadata)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be written: {error}") from error


def to_numpy(tensor):
    """Return a copy of a tensor as a NumPy array of the same dtype; bfloat16 is that of ml_dtypes."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
