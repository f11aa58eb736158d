"""Hooks on a model of vLLM, in the process of the worker that runs it."""

from contextlib import ExitStack, contextmanager

import numpy as np

from minitp.errors import InputError, shown
from minitp.mapping.vllm import VLLM
from minitp.probe.hooks import add_hooks
from minitp.probe.recorder import ProbeRecorder, to_numpy
from minitp.trace.names import full_name


def is_vllm_model(model):
    """Return whether a model is one of vLLM."""
    return hasattr(model, "compute_logits") and hasattr(model, "logits_processor")


def vllm_recorder(model, recipe, rank, ranks):
    """Return the recorder for a model of vLLM, and the name of its recipe."""
    fields = model.config.to_dict()
    name = fields["model_type"] if recipe == "auto" else recipe
    if name not in VLLM:
        raise InputError(f"recipe {shown(name)}: for vLLM there are recipes for {', '.join(VLLM)}")
    return VllmRecorder(fields, rank, ranks), name


@contextmanager
def hooked_vllm(model, recipe, recorder):
    """Give a recorder what the modules of a vLLM model get and return, within a `with` block."""
    with ExitStack() as stack:
        add_hooks(stack, model, dict(model.named_modules()), VLLM[recipe], recorder)
        yield


class VllmRecorder(ProbeRecorder):
    """The steps of a vLLM model's forward passes over one sequence."""

    engine = "vLLM"

    def begin(self, module, args, kwargs):
        """Begin a forward pass, whose tokens [T] and positions [T] are its first two arguments."""
        inputs = [*args, *kwargs.values()][:2]
        token_ids, positions = (
            to_numpy(kwargs.get(name, value)) for name, value in zip(NAMES, inputs, strict=True)
        )
        pass_name, start, stop = self.begin_pass(token_ids.tolist())
        if positions.tolist() != list(range(start, stop)):
            raise InputError(
                f"{pass_name} has positions {shown(positions.tolist())}, expected {start} to {stop - 1}: record "
                "one prompt, alone in its batch and without prefix caching (enable_prefix_caching=False)"
            )
        self.keep("positions", None, positions.astype(np.int64))

    def write(self, path, recipe):
        """Write all steps, or raise an InputError if the modules' hooks were not called."""
        if self.passes and full_name("prefill", None, "embed") not in self.arrays:
            raise InputError(
                "vLLM ran a compiled graph, which calls no hooks; give its LLM enforce_eager=True"
            )
        super().write(path, recipe)


NAMES = ("input_ids", "positions")
