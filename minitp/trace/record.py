"""The recording of a rank's steps, and the passes of a trace."""

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
    callback : callable
        Function that is called as callback(full name, this rank's array) for each wanted step.
    """

    def __init__(self, device, wanted, callback):
        self._device, self._wanted, self._callback = device, wanted, callback
        self._names, self._rows, self._logit_rows = [], [], []

    def begin(self, *names, rows=(), logit_rows=()):
        """Begin a forward pass over one or more sequences, each of which has its own pass name in the trace.

        Parameters
        ----------
        names : str
            The pass name of each sequence.
        rows, logit_rows : list of int
            The number of tokens, and of rows of logits, of each sequence; needed only for several sequences.
        """
        self._names, self._rows, self._logit_rows = names, rows, logit_rows

    def __call__(self, block=None, layer=None, sequence=None):
        """Return a namespace whose attribute NAME is the step `layers.{layer}.{block}.NAME`, or just NAME.

        The arrays are those of all sequences of the pass, or only of number `sequence`.
        """
        before = "" if block is None else f"{block}."

        def observe(step, array):
            step = before + step
            names = self._names if sequence is None else [self._names[sequence]]
            names = [full_name(name, layer, step) for name in names]
            if not any(map(self._is_wanted, names)):
                return
            array = self._device.to_host(array)
            if step in INTEGERS and array.dtype == np.int32:
                array = array.astype(np.int64)  # the fused kernels use int32
            for name, part in zip(names, self._parts(step, array, len(names)), strict=True):
                if self._is_wanted(name):
                    self._callback(name, part)

        return ObservedSteps(observe)

    def _is_wanted(self, name):
        return self._wanted is None or name in self._wanted

    def _parts(self, step, array, count):
        """Split an array of all tokens, or of all rows of logits, into those of `count` sequences."""
        if count == 1:
            return [array]
        axis = (BEFORE | LAYER | AFTER)[step].split().index("T")
        stops = np.cumsum(self._logit_rows if step in AFTER else self._rows)
        return np.split(array, stops, axis=axis)[:count]  # a decode graph may have rows of padding


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
    """Run the prompt and then the most probable token of each pass; return all token ids that were run.

    Parameters
    ----------
    model : Model
    token_ids : list of int
        The prompt.
    passes : list of (name, start, stop)
        The passes as in `passes_of`. Tokens after the prompt are chosen as in `generate`.
    record : Recorder
    """
    ids, positions = list(token_ids), passes[-1][2]
    request, cache, logits = greedy_request(ids, positions), model.new_cache(positions), None
    for name, start, stop in passes:
        if start == len(ids):
            token, _ = next_token(model.comm, request, host_logits(model, logits)[-1])
            ids.append(token)
        record.begin(name)
        logits = model.forward(ids[start:stop], cache, logits_at=slice(None), record=record)  # [T, V]
    return ids


def greedy_request(prompt_ids, positions):
    """Return a Request for the most probable tokens: one or more, up to `positions` positions in all."""
    params = SamplingParams(max_new_tokens=max(1, positions - len(prompt_ids)), ignore_eos=True)
    return Request(params, (), list(prompt_ids), max_context=positions + 1)  # room for the one token
