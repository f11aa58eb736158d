"""A recorder of the steps of a forward pass on a rank."""

from fnmatch import fnmatchcase

import numpy as np

from minitp.errors import InputError
from minitp.generate import host_logits, next_token
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.trace.names import AFTER, BEFORE, INTEGERS, LARGE, LAYER, WEIGHTS, full_name, step_names


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
    wanted : container of str or None
        Full names of the wanted steps; None for all.
    take : callable
        Function that is called as take(full name, this rank's array) for each wanted step.
    """

    def __init__(self, device, wanted, take):
        self._device, self._wanted, self._take = device, wanted, take
        self._names, self._rows, self._logit_rows = [], [], []

    def begin(self, *names, rows=(), logit_rows=()):
        """Begin a pass over some sequences; the steps of each are recorded under its own pass name.

        Parameters
        ----------
        names : str
            A pass name for each sequence.
        rows, logit_rows : list of int
            The numbers of tokens and of rows of logits of each sequence, if there are several.
        """
        self._names, self._rows, self._logit_rows = names, rows, logit_rows

    def __call__(self, block=None, layer=None, sequence=None):
        """Return a namespace whose attribute NAME is the step `layers.{layer}.{block}.NAME`, or just NAME."""
        before = "" if block is None else f"{block}."

        def observe(step, array):
            step = before + step
            names = self._names if sequence is None else [self._names[sequence]]
            names = [full_name(name, layer, step) for name in names]
            if not any(map(self._is_wanted, names)):
                return
            array = self._device.to_host(array)
            if step in INTEGERS:
                array = array.astype(np.int64)  # the fused path has int32
            for name, part in zip(names, self._parts(step, array, len(names)), strict=True):
                if self._is_wanted(name) and part is not None:
                    self._take(name, part)

        return ObservedSteps(observe)

    def _is_wanted(self, name):
        return self._wanted is None or name in self._wanted

    def _parts(self, step, array, sequences):
        """Split an array of all tokens, or of all rows of logits, by sequence; None for one without rows."""
        if sequences == 1:
            return [array]
        axis = (BEFORE | LAYER | AFTER)[step].split().index("T")
        stops = np.cumsum(self._logit_rows if step in AFTER else self._rows)
        parts = np.split(array, stops, axis=axis)[:sequences]  # a decode graph may have rows of padding
        return [part if part.shape[axis] else None for part in parts]


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
    """Run the prompt, then one token per pass, chosen as `generate` does; return all token ids that were run.

    The token is the most probable one.
    """
    ids, cache = list(token_ids), model.new_cache(passes[-1][2])
    request, logits = greedy_request(ids, passes[-1][2]), None
    for name, start, stop in passes:
        if start == len(ids):
            token, _ = next_token(model.comm, request, host_logits(model, logits)[-1])
            ids.append(token)
        record.begin(name)
        logits = model.forward(ids[start:stop], cache, logits_at=slice(None), record=record)  # [T, V]
    return ids


def greedy_request(prompt_ids, positions):
    """Return a Request for the most probable tokens, up to `positions` positions in all."""
    params = SamplingParams(max_new_tokens=max(1, positions - len(prompt_ids)), ignore_eos=True)
    return Request(params, (), list(prompt_ids), positions + 1)
