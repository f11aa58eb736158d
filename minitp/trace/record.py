"""A recorder of the steps of a forward pass on a rank."""

from fnmatch import fnmatchcase

from minitp.errors import InputError
from minitp.trace.names import LARGE, WEIGHTS, full_name, step_names


class ObservedSteps:
    """A namespace for the arrays of a block that calls observe(step, array) when one is assigned."""

    def __init__(self, observe):
        object.__setattr__(self, "_observe", observe)

    def __setattr__(self, step, array):
        object.__setattr__(self, step, array)
        self._observe(step, array)


class Recorder:
    """A recorder that gives the wanted steps of a rank to a callback, as NumPy arrays.

    Parameters
    ----------
    device : Device
    wanted : container of str
        Full names of the wanted steps.
    take : callable
        Function that is called as take(full name, this rank's array) for each wanted step.

    Attributes
    ----------
    pass_name : str
        Name of the current pass.
    """

    def __init__(self, device, wanted, take):
        self.pass_name = None
        self._device, self._wanted, self._take = device, wanted, take

    def __call__(self, block=None, layer=None):
        """Return a namespace whose attribute NAME is the step `layers.{layer}.{block}.NAME`, or just NAME."""
        before = "" if block is None else f"{block}."

        def observe(step, array):
            name = full_name(self.pass_name, layer, before + step)
            if name in self._wanted:
                self._take(name, self._device.to_host(array))

        return ObservedSteps(observe)


def passes_of(tokens, decode):
    """Return (name, start, stop) of each pass: a prefill of `tokens` tokens, then `decode` passes of one."""
    later = [(f"decode.{n}", tokens + n - 1, tokens + n) for n in range(1, decode + 1)]
    return [("prefill", 0, tokens), *later]


def wanted_steps(plan, passes, globs=None, oracle=False):
    """Return the full names that match one of `globs`, in order; by default all but large steps and weights.

    With `oracle`, names of weights and partial steps are left out, because the oracle records none.

    Raises
    ------
    InputError
        if one of the globs matches nothing.
    """
    steps = [f"{name}/{step}" for name, _, _ in passes for step in step_names(plan)]
    if oracle:
        steps = [name for name in steps if not name.endswith("_partial")]
    if globs is None:
        return [name for name in steps if not name.endswith(LARGE)]
    names = [*([] if oracle else [WEIGHTS + name for name in plan.tensors]), *steps]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            error = "the oracle has no such step" if oracle else "this run has no such step"
            raise InputError(
                f"--steps {glob!r}: {error}; valid names look like {names[0]}, {steps[5]}, {steps[-1]}"
            )
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def run_passes(model, token_ids, passes, record):
    """Run the prompt, then the most probable token of each pass; return all token ids that were run."""
    ids, cache = list(token_ids), model.new_cache(passes[-1][2])
    for name, start, _ in passes:
        record.pass_name = name
        logits = model.forward(ids[start:], cache, logits_at=slice(None), record=record)  # [T, V]
        last = model.device.to_host(logits[-1])  # [V]
        ids.append(model.comm.broadcast(int(last.argmax()) if model.comm.rank == 0 else None))
    return ids[:-1]
