"""Hooks on a PyTorch model that record its steps, and the file that gets them.

PyTorch is not imported: the model brings it. A model needs `named_modules`, modules with
`register_forward_hook` and `register_forward_pre_hook`, and a Hugging Face `config`.
"""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from minitp.errors import InputError, shown
from minitp.mapping.transformers import LAYERS, TRANSFORMERS
from minitp.probe.hooks import add_hooks
from minitp.probe.mlx import hooked_mlx, is_mlx_model, mlx_recorder
from minitp.probe.ranks import path_of_rank, rank_of
from minitp.probe.recorder import ALL_REDUCE, ATTENTION, ROPE, ProbeRecorder
from minitp.probe.vllm import hooked_vllm, is_vllm_model, vllm_recorder
from minitp.util.format import counted

NOT_A_MODEL = (
    "the probe needs a causal language model of transformers itself, without a wrapper (of torch.compile: "
    "model._orig_mod; of PEFT: model.merge_and_unload())"
)


@contextmanager
def record(model, path, recipe="auto", rank=None, ranks=None):
    """Record the forward passes of a model within a `with` block, and write them to a file at its end.

    The file is a trace (see `trace.write`), which `minitp judge` and `minitp compare` read. Passes are called
    `prefill`, `decode.1`, .. as in traces of minitp; a second prompt is an error. If the model is sharded
    over several processes, all of them call this, and each writes a file with its own arrays.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of Hugging Face transformers. Eager attention is switched on meanwhile.
    path : str or Path
        The .safetensors file to write. Several ranks write rank0.safetensors, rank1.safetensors, .. to a
        folder of this name without .safetensors.
    recipe : str
        A model_type of `mapping.transformers.TRANSFORMERS`; "auto" takes that of the model's config.
    rank, ranks : int or None
        The number of this process and the number of processes among which the model is sharded. By default
        they are those of torch.distributed, if it has been initialized, else 0 and 1.

    Raises
    ------
    InputError
        If there is no recipe for the model, a pass has several sequences, padding or a static cache, a
        later pass does not read the cache, or the file cannot be written.
    """
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}; create it first")
    if is_mlx_model(model):
        recorder, name = mlx_recorder(model, recipe)
        with hooked_mlx(model, name, recorder):
            yield recorder
        recorder.write(path, name)
        return
    if is_vllm_model(model):
        rank, ranks = rank_of(model, rank, ranks)
        recorder, name = vllm_recorder(model, recipe, rank, ranks)
        with hooked_vllm(model, name, recorder):
            yield recorder
        recorder.write(path_of_rank(path, rank, ranks), name)
        return
    if not hasattr(model, "set_attn_implementation"):
        raise InputError(f"{NOT_A_MODEL}, not a {type(model).__name__}")
    fields = model.config.to_dict()
    name = fields.get("model_type") if recipe == "auto" else recipe
    if name not in TRANSFORMERS:
        raise InputError(f"recipe {shown(name)}: there are recipes for {', '.join(TRANSFORMERS)}")
    rank, ranks = rank_of(model, rank, ranks)
    recorder = ProbeRecorder(fields, rank, ranks)
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
    recorder.write(path_of_rank(path, rank, ranks), name)


@contextmanager
def hooked(model, modules, recipe, recorder):
    """Give a recorder what the modules and functions of a model get and return, within a `with` block."""
    with ExitStack() as stack:
        add_hooks(stack, model, modules, recipe, recorder)

        def add(register, hook):
            stack.callback(register(hook).remove)

        for layer in range(recorder.layers):
            for block, part in (("attn", "self_attn"), ("mlp", "mlp")):
                module = modules[f"{LAYERS.format(i=layer)}.{part}"]
                add(module.register_forward_pre_hook, partial(recorder.enter_block, block, layer))
                add(module.register_forward_hook, recorder.leave_block)
        attention = modules[f"{LAYERS.format(i=0)}.self_attn"]
        functions = sys.modules[type(attention).__module__]
        observed = [(functions, ROPE), (functions, ATTENTION)]
        if recorder.ranks > 1 and "torch" in sys.modules:
            observed.append((sys.modules["torch"].distributed, ALL_REDUCE))
        for module, name in observed:
            original = getattr(module, name)
            stack.callback(setattr, module, name, original)
            setattr(module, name, recorder.observed(name, original))
        yield
