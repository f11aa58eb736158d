"""The recording of a model by hooks on its modules.

PyTorch is not imported: the model brings it. A model of PyTorch needs `named_modules`, modules with
`register_forward_hook` and `register_forward_pre_hook`, and a Hugging Face `config`.
"""

from contextlib import contextmanager

from minitp.errors import InputError, shown
from minitp.probe.mlx import MlxRecorder, is_mlx_model
from minitp.probe.ranks import check_target, path_of_rank, rank_of
from minitp.probe.transformers import TransformersRecorder
from minitp.probe.vllm import VllmRecorder, is_vllm_model


@contextmanager
def record(model, path, recipe="auto", rank=None, ranks=None):
    """Record the forward passes of a model within a `with` block, and write them to a file at its end.

    The file is a trace (see `trace.write`), which `minitp judge` and `minitp compare` read. Passes are called
    `prefill`, `decode.1`, .. as in traces of minitp; a second prompt is an error. If the model is sharded
    over several processes, all of them call this, and each writes a file with its own arrays. If an exception
    leaves the block, nothing is written.

    Parameters
    ----------
    model : torch.nn.Module or mlx.nn.Module
        A causal language model of Hugging Face transformers, vLLM or mlx-lm. In transformers, eager attention
        is switched on meanwhile.
    path : str or Path
        The .safetensors file to write. Several ranks write rank0.safetensors, rank1.safetensors, .. to a
        folder of this name without .safetensors.
    recipe : str
        A model_type of the engine's table (`mapping.transformers.TRANSFORMERS`, for example); "auto" takes
        that of the model's config.
    rank, ranks : int or None
        The number of this process and the number of processes among which the model is sharded. By default
        they are those of torch.distributed, if it has been initialized, else 0 and 1.

    Raises
    ------
    InputError
        If there is no recipe for the model, a pass has several sequences, padding or a static cache, a
        later pass does not read the cache, or the file cannot be written.
    """
    kind = (
        MlxRecorder if is_mlx_model(model) else VllmRecorder if is_vllm_model(model) else TransformersRecorder
    )
    fields = kind.fields_of(model)
    name = fields.get("model_type") if recipe == "auto" else recipe
    if name not in kind.recipes:
        raise InputError(f"recipe {shown(name)}: there are recipes for {', '.join(kind.recipes)}")
    check_target(path)
    rank, ranks = rank_of(model, rank, ranks)
    recorder = kind(fields, rank, ranks)
    with recorder.hooked(model, kind.recipes[name]):
        yield recorder
    recorder.write(path_of_rank(path, rank, ranks), name)
