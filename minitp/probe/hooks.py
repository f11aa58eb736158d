"""The hooks that give a recorder the inputs and outputs of a model's modules, as a recipe says."""

from functools import partial

from minitp.errors import InputError
from minitp.mapping.table import IN


def add_hooks(stack, model, modules, recipe, recorder):
    """Register hooks on a model and its modules, and let `stack` remove them.

    Parameters
    ----------
    stack : ExitStack
    model : torch.nn.Module
    modules : dict of str to torch.nn.Module
        The modules by path.
    recipe : dict of str to list of Source
    recorder : ProbeRecorder
    """
    path_of = {}  # the path of each module that has a hook

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
                of_step = (
                    (recorder.layers if layer is None else layer) + source.offset if source.offset else layer
                )
                if source.where == IN:
                    hook = partial(recorder.take_input, source, of_step)
                    add(module.register_forward_pre_hook, hook, with_kwargs=True)
                else:
                    add(module.register_forward_hook, partial(recorder.take_output, source, of_step))
