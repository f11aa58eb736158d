"""A recording of another engine, in the form in which the replay of `check` reads a rank's steps."""

import numpy as np

from minitp.check.passes import RecordedPass
from minitp.compare.files import open_dump
from minitp.compare.pairing import MAY_DIFFER, differing, read_metadata
from minitp.errors import InputError, shown
from minitp.trace.names import INTEGERS, full_name
from minitp.util.format import counted

DTYPES = ("float32", "float16", "bfloat16", "float64")
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
        missing = [name for name in ("dtype", "source", "model") if name not in facts]
        if missing:
            raise InputError(f"{path}: the metadata of a trace needs {', '.join(missing)}, too")
        if facts["dtype"] not in DTYPES:
            raise InputError(f"{path}: dtype {shown(facts['dtype'])}: judge needs {', '.join(DTYPES)}")
        self.dtype, self.engine, self.model = np.dtype(facts["dtype"]), facts["source"], facts["model"]
        self._check_passes()
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
        """Return an array in the dtype in which it was recorded; token ids and positions are int64."""
        dtype = np.int64 if name.endswith(INTEGERS) else self._file.entries[name].dtype
        return self._file.read(name).astype(dtype)

    def check_model(self, source):
        """Reject a ModelSource whose config differs from the engine's; the message names the field."""
        for name, ours, theirs in differing(source.config, self.metadata.config):
            if name not in MAY_DIFFER:
                raise InputError(
                    f"{self._file.path}: the engine's config has {name} {shown(theirs)}, and that of "
                    f"{source.name} {shown(ours)}: it runs another model, or reads its config wrongly"
                )

    def _check_passes(self):
        path, ids, stop = self._file.path, self.metadata.token_ids, 0
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise InputError(f"{path}: token_ids {shown(ids)}: expected a list of numbers")
        for name, (start, end) in self.metadata.passes.items():
            if start != stop or not isinstance(end, int) or not start < end <= len(ids):
                raise InputError(
                    f"{path}: {name} has positions {start} to {end}: passes must follow each other from 0, "
                    f"within the {counted(len(ids), 'token')} of token_ids"
                )
            stop = end
        if not stop:
            raise InputError(f"{path}: its metadata has no passes; record at least one forward pass")

    def _check(self):
        for pass_ in self.passes:
            for layer in range(self.metadata.layers):
                prefix = full_name(pass_.name, layer, "attn.")
                if not any(name.startswith(prefix) for name in self._file.entries):
                    raise InputError(
                        f"{self._file.path}: it has no attention steps of layer {layer} in {pass_.name}; if "
                        "all layers were recorded, the engine skips this one"
                    )
                for step in NEEDED:
                    name = full_name(pass_.name, layer, f"attn.{step}")
                    unrotated = step.endswith("rope") and layer in self.metadata.config.layers_without_rope
                    if name not in self and not unrotated:
                        raise InputError(f"{self._file.path}: it lacks {name}, which judge needs")
