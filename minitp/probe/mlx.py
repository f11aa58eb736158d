"""Hooks on the modules of an mlx-lm model, for which the calls of their classes are wrapped meanwhile."""

import dataclasses
import sys
from contextlib import ExitStack, contextmanager
from functools import partial, wraps

from minitp.errors import InputError
from minitp.mapping.mlx import MLX, ROUNDINGS
from minitp.mapping.transformers import LAYERS
from minitp.probe.hooks import add_hooks
from minitp.probe.recorder import ProbeRecorder, to_numpy
from minitp.trace.names import full_name


def is_mlx_model(model):
    """Return whether a model is one of mlx-lm, with its arguments and modules."""
    return dataclasses.is_dataclass(getattr(model, "args", None)) and hasattr(model, "named_modules")


@contextmanager
def replaced(kind, name, wrap):
    """Replace a method of a class by wrap(method) within a `with` block."""
    is_inherited, method = name not in vars(kind), getattr(kind, name)
    setattr(kind, name, wrap(method))
    try:
        yield
    finally:
        delattr(kind, name) if is_inherited else setattr(kind, name, method)


def observed_call(hooks, call):
    """Return the `__call__` of a class that also runs the hooks of its modules, id -> MlxModule."""

    @wraps(call)
    def observed(module, *args, **kwargs):
        found = hooks.get(id(module))
        for hook, with_kwargs in found.before if found else ():
            hook(module, args, kwargs) if with_kwargs else hook(module, args)
        output = call(module, *args, **kwargs)
        for hook in found.after if found else ():
            hook(module, args, output)
        return output

    return observed


class MlxModule:
    """A module of MLX with the methods that register hooks on one of PyTorch."""

    def __init__(self, module):
        self.module, self.before, self.after = module, [], []

    def register_forward_pre_hook(self, hook, with_kwargs=False):
        """Call `hook` with a module's arguments before each of its calls."""
        return Registered(self.before, (hook, with_kwargs))

    def register_forward_hook(self, hook):
        """Call `hook` with a module's arguments and its output after each of its calls."""
        return Registered(self.after, hook)


class Registered:
    """A registered hook, which `remove` takes away."""

    def __init__(self, hooks, hook):
        hooks.append(hook)
        self.remove = partial(hooks.remove, hook)


class MlxRecorder(ProbeRecorder):
    """The steps of an mlx-lm model's forward passes."""

    engine, recipes, known_roundings = "mlx-lm", MLX, ROUNDINGS

    @staticmethod
    def fields_of(model):
        """Return the arguments of a model, which mlx-lm has read from config.json."""
        return dataclasses.asdict(model.args)

    @contextmanager
    def hooked(self, model, recipe):
        """Record what the modules of a model and its caches get and return, within a `with` block."""
        modules = {path: MlxModule(module) for path, module in model.named_modules()}
        caches = sys.modules["mlx_lm.models.cache"]
        with ExitStack() as stack:
            add_hooks(stack, modules[""], modules, recipe, self)
            for layer in range(self.layers):
                attention = f"{LAYERS.format(i=layer)}.self_attn"
                modules[attention].register_forward_pre_hook(partial(self.enter_attention, layer))
                modules[f"{attention}.rope"].register_forward_hook(self.take_rope)
            for kind in {type(module.module) for module in modules.values()}:
                hooks = {id(one.module): one for one in modules.values() if type(one.module) is kind}
                stack.enter_context(replaced(kind, "__call__", partial(observed_call, hooks)))
            for kind in (caches.KVCache, caches.RotatingKVCache):
                stack.enter_context(replaced(kind, "update_and_fetch", self.observed_cache))
            yield

    def begin(self, module, args, kwargs):
        """Begin a forward pass, which gets the tokens [1, T] and a list of caches."""
        inputs = dict(zip(("inputs", "cache"), args, strict=False)) | kwargs
        ids, caches = inputs["inputs"], inputs.get("cache")
        if ids.shape[0] != 1:
            raise InputError("the probe records passes of one sequence, with inputs [1, T]")
        if self.passes and caches is None:
            raise InputError(
                "record one prompt in a file, and give its later passes the cache of the first (cache=..)"
            )
        self.begin_pass(ids[0].tolist())

    def enter_attention(self, layer, module, args):
        """Note the layer whose attention begins."""
        self.layer = layer

    def take_rope(self, module, args, output):
        """Record rotated queries, and the rotated keys at the second call in a layer."""
        is_second = full_name(self.passes[-1][0], self.layer, "attn.q_rope") in self.arrays
        step, letter = ("attn.k_rope", "K") if is_second else ("attn.q_rope", "H")
        self.keep_in_layout(step, self.layer, to_numpy(output), f"1 {letter} T d", self.sizes)

    def observed_cache(self, update_and_fetch):
        """Return the method of a cache that also records the keys and values that it returns.

        A RotatingKVCache that has overwritten its first positions returns others first, and is not recorded.
        """

        @wraps(update_and_fetch)
        def observed(cache, keys, values):
            found = update_and_fetch(cache, keys, values)
            if cache.offset <= getattr(cache, "max_size", cache.offset):
                for step, array in zip(("attn.k_cache", "attn.v_cache"), found, strict=True):
                    self.keep_in_layout(step, self.layer, to_numpy(array), "1 K S d", self.sizes)
            return found

        return observed
