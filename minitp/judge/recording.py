"""A recording of another engine, in the form in which the replay of `check` reads a rank's steps."""

import numpy as np

from minitp.check.passes import RecordedPass
from minitp.compare.files import open_dump
from minitp.compare.pairing import MAY_DIFFER, differing, read_metadata
from minitp.errors import InputError, shown
from minitp.trace.names import full_name

# Steps that the replay needs as arrays, because the operations after them cannot bridge a missing one.
NEEDED = ("q_rope", "k_rope", "k_cache", "v_cache", "v")


class EngineRecording:
    """A trace made by `minitp.probe` or by another program with its metadata.

    Attributes
    ----------
    metadata : TraceMetadata
    dtype : numpy dtype
        The engine's dtype.
    engine, model : str
        The names of the engine and of the model in the recording.
    passes : list of RecordedPass

    Raises
    ------
    InputError
        If the file is not a trace, or lacks a step that nothing else can replace.
    """

    def __init__(self, path):
        self._file = open_dump(path)
        self.metadata = read_metadata(self._file)
        if self.metadata is None:
            raise InputError(
                f"{path}: not a trace; record the engine with minitp.probe, or use minitp compare for arrays "
                "without metadata"
            )
        facts = self._file.metadata
        self.dtype, self.engine, self.model = np.dtype(facts["dtype"]), facts["source"], facts["model"]
        self.passes, cached = [], ()
        for name, (start, stop) in self.metadata.passes.items():
            logits = self._file.entries.get(f"{name}/logits")
            rows = logits.shape[0] if logits else 0
            self.passes.append(RecordedPass(name, 0, start, stop, cached, logit_rows=rows))
            cached += self.passes[-1].origins
        self._check()

    def __contains__(self, name):
        return name in self._file.entries

    def read(self, name):
        """Return an array in the dtype in which it was recorded."""
        return self._file.read(name).astype(self._file.entries[name].dtype)

    def check_model(self, source):
        """Reject a ModelSource whose config differs from the engine's; the message names the field."""
        for name, ours, theirs in differing(source.config, self.metadata.config):
            if name not in MAY_DIFFER:
                raise InputError(
                    f"{self._file.path}: the engine's config has {name} {shown(theirs)}, and that of "
                    f"{source.name} {shown(ours)}: it runs another model, or reads its config wrongly"
                )

    def _check(self):
        for pass_ in self.passes:
            for layer in range(self.metadata.layers):
                prefix = full_name(pass_.name, layer, "")
                if not any(name.startswith(prefix) for name in self._file.entries):
                    raise InputError(
                        f"{self._file.path}: it has no steps of layer {layer} in {pass_.name}; if all layers "
                        "were recorded, the engine skips this one"
                    )
                for step in NEEDED:
                    name = full_name(pass_.name, layer, f"attn.{step}")
                    unrotated = step.endswith("rope") and layer in self.metadata.config.layers_without_rope
                    if name not in self and not unrotated:
                        raise InputError(f"{self._file.path}: it lacks {name}, which judge needs")
