"""Hooks on a model of vLLM, in the process of the worker that runs it."""

from contextlib import ExitStack, contextmanager

import numpy as np

from minitp.errors import InputError, shown
from minitp.mapping.vllm import ROUNDINGS, VLLM
from minitp.probe.hooks import add_hooks
from minitp.probe.recorder import ProbeRecorder, to_numpy
from minitp.trace.names import full_name


def is_vllm_model(model):
    """Return whether a model is one of vLLM."""
    return hasattr(model, "compute_logits") and hasattr(model, "logits_processor")


class VllmRecorder(ProbeRecorder):
    """The steps of a vLLM model's forward passes over one sequence."""

    engine, recipes, known_roundings = "vLLM", VLLM, ROUNDINGS

    @staticmethod
    def fields_of(model):
        """Return the object in the config.json of a model."""
        return model.config.to_dict()

    @contextmanager
    def hooked(self, model, recipe):
        """Record what the modules of a model get and return, within a `with` block."""
        with ExitStack() as stack:
            add_hooks(stack, model, dict(model.named_modules()), recipe, self)
            yield

    def begin(self, module, args, kwargs):
        """Begin a forward pass, which gets the tokens [T] and their positions [T]."""
        inputs = dict(zip(("input_ids", "positions"), args, strict=False)) | kwargs
        token_ids, positions = (to_numpy(inputs[name]).tolist() for name in ("input_ids", "positions"))
        pass_name, start, stop = self.begin_pass(token_ids)
        if positions != list(range(start, stop)):
            raise InputError(
                f"{pass_name} has positions {shown(positions)}, expected {start} to {stop - 1}: record one "
                "prompt, alone in its batch and without prefix caching (enable_prefix_caching=False)"
            )
        self.keep("positions", None, np.array(positions, np.int64))

    def write(self, path, recipe):
        """Write all steps, or raise an InputError if no hook of a module was called."""
        if self.passes and full_name("prefill", None, "embed") not in self.arrays:
            raise InputError(
                "vLLM ran a compiled graph, which calls no hooks; give its LLM enforce_eager=True"
            )
        super().write(path, recipe)
