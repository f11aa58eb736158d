"""A recording of another engine, in the form in which the replay of `check` reads each rank's steps."""

import numpy as np

from minitp.check.passes import RecordedPass
from minitp.compare.pairing import MAY_DIFFER, differing
from minitp.compare.rank_folder import refuse_too_many
from minitp.errors import InputError, shown
from minitp.judge.dump import FLOATS, dtype_of_dump, passes_of_dump
from minitp.judge.rank_steps import RankSteps
from minitp.judge.roundings import cache_dtype, read_roundings
from minitp.judge.sizes import own_sizes, plan_of, rows_of_logits, sizes_of, whole_sizes
from minitp.trace.names import LAYER, full_name, kinds, split_name
from minitp.util.format import counted

NORM_HAS_STREAM = ("transformers", "mlx-lm")  # engines whose residual stream is the input of a norm
SHOWN = 3  # number of fields in an error message


def check_model(files, source):
    """Reject a ModelSource whose config differs from that in the metadata; the message names the fields."""
    if files.metadata is None:
        return
    fields = [
        (name, shown(theirs), shown(ours))
        for name, ours, theirs in differing(source.config, files.metadata.config)
        if name not in MAY_DIFFER
    ]
    if fields:
        name, theirs, ours = fields[0]
        others = "".join(f"; {name} {theirs}, not {ours}" for name, theirs, ours in fields[1:SHOWN])
        others += f"; and {len(fields) - SHOWN} more" if len(fields) > SHOWN else ""
        raise InputError(
            f"{files.path}: the engine's config has {name} {theirs}, and that of {source.name} {ours}"
            f"{others}: it runs another model, or reads its config wrongly"
        )


class EngineRecording:
    """A trace made by `minitp.probe`, or arrays of another program.

    Parameters
    ----------
    files : RecordedFiles
    source : ModelSource
        The model that the engine should run, with the layers of the files.
    tokens : list of int or None
        The token ids, if the files do not have them.
    dtype : str or None
        The engine's dtype; None takes that of the metadata or of the arrays.
    rope : str
        "interleaved" converts the recorded heads to half-split ones; "half" leaves them.

    Attributes
    ----------
    path : Path
    config : Config
    attention : str
        The kind of attention that the engine has when it is not recorded; empty if it is not known.
    token_ids : list of int
    dtype : numpy dtype
        The engine's dtype.
    matmul_dtype : numpy dtype
        The dtype in which it multiplies matrices: that of the queries, if they have a smaller one.
    is_trace : bool
        Whether the files have the metadata of a trace.
    rope : str
        The RoPE layout of the recorded heads.
    engine : str
        The name of the engine.
    reads_stream_from_norm : bool
        Whether `attn.residual` was recorded as the input of the next norm.
    plan : Plan
        Which heads, columns and rows each rank has.
    passes : list of RecordedPass
    roundings : dict of str to dtype or None
        The result of `read_roundings`.
    kv_dtype : str
        The dtype of the cache, "auto" for the engine's.
    ranks : list of RankSteps
    unknown : list of str
        The names of arrays that are no steps.
    unused : list of str
        Recorded steps that the model does not have.
    has_end : bool
        Whether the last recorded layer is the model's last, so that the steps after the layers follow it.

    Raises
    ------
    InputError
        If the metadata is damaged, or a step is missing that nothing can replace.
    """

    def __init__(self, files, source, tokens=None, dtype=None, rope="half"):
        self.path, self.config, self.assembled_from = files.path, source.config, files.assembled_from
        is_trace = self.is_trace = files.metadata is not None
        self.rope = rope
        if is_trace:
            self._read_metadata(files, tokens, dtype)
            spans = files.metadata.passes
        else:
            self.engine, self.dtype = "arrays without metadata", np.dtype(dtype or dtype_of_dump(files))
            self.token_ids, spans = passes_of_dump(files, self.config, tokens)
        self.attention = files.facts.get("attention", "") if is_trace else ""
        self.reads_stream_from_norm = self.engine.startswith(NORM_HAS_STREAM)
        self.roundings = read_roundings(files.facts.get("roundings", "{}") if is_trace else "{}", self.path)
        self._check_passes(spans)
        refuse_too_many(self.path, len(files.ranks), self.config, "arrays")
        self.has_end = is_trace or source.fields().get("num_hidden_layers") == files.layers
        sizes = [sizes_of(files.ranks, rank, self.config, spans) for rank in range(len(files.ranks))]
        self.plan = plan_of(self.config, sizes)
        by_step = kinds(self.plan, self.config.head_dim)
        self.passes, cached = [], ()
        for name, (start, stop) in spans.items():
            rows = rows_of_logits(files.ranks, name, self.config) if self.has_end else 0
            self.passes.append(RecordedPass(name, 0, start, stop, cached, logit_rows=rows))
            cached += self.passes[-1].origins
        cached = files.ranks[0].entries.get(full_name(self.passes[0].name, 0, "attn.k_cache"))
        self.kv_dtype = cache_dtype(cached.dtype if cached else self.dtype, self.dtype)
        passes = {pass_.name: pass_ for pass_ in self.passes}
        interleaved_dim = self.config.rotary_dim if rope == "interleaved" else None
        self.ranks = [
            RankSteps(
                file,
                rank,
                by_step,
                passes,
                own=sizes[rank] | own_sizes(self.plan, rank),
                whole=whole_sizes(self.config),
                dtype=self.dtype,
                dtype_is_given=dtype is not None,
                rotary_dim=interleaved_dim,
            )
            for rank, file in enumerate(files.ranks)
        ]
        self._check_steps()
        self.unknown, steps = files.unknown, {split_name(name)[2] for name in self.ranks[0].names}
        self.unused = [step for step in LAYER if step in steps and step not in by_step]
        queries = files.ranks[0].entries.get(full_name(self.passes[0].name, 0, "attn.q"))
        self.matmul_dtype = self.dtype
        if dtype is None and queries is not None and queries.dtype in FLOATS:
            self.matmul_dtype = min(self.dtype, np.dtype(queries.dtype), key=lambda one: one.itemsize)

    def _read_metadata(self, files, tokens, dtype):
        facts, path = files.facts, self.path
        missing = [name for name in ("dtype", "source", "model") if name not in facts]
        if missing:
            raise InputError(f"{path}: the metadata of a trace needs {', '.join(missing)}, too")
        if facts["dtype"] not in FLOATS:
            raise InputError(f"{path}: dtype {shown(facts['dtype'])}: judge needs {', '.join(FLOATS)}")
        self.dtype, self.engine = np.dtype(dtype or facts["dtype"]), facts["source"]
        self.token_ids = tokens or files.metadata.token_ids

    def _check_passes(self, spans):
        ids, stop = self.token_ids, 0
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise InputError(f"{self.path}: token_ids {shown(ids)}: expected a list of numbers")
        vocabulary = range(self.config.vocab_size)
        outside = next((token for token in ids if token not in vocabulary), None)
        if outside is not None:
            raise InputError(
                f"{self.path}: token id {shown(outside)}: the vocabulary has {len(vocabulary)} entries"
            )
        limit = self.config.max_position_embeddings
        if self.config.rope.rope_type == "longrope" and len(ids) > limit:
            raise InputError(
                f"{self.path}: it has {counted(len(ids), 'token')}, and longrope is known up to its original "
                f"context of {limit}; record a shorter prompt"
            )
        for name, (start, end) in spans.items():
            if start != stop or not isinstance(end, int) or not start < end <= len(ids):
                raise InputError(
                    f"{self.path}: {name} has positions {start} to {end}: passes must follow each other from "
                    f"0, within the {counted(len(ids), 'token')} of token_ids"
                )
            stop = end
        if not stop:
            raise InputError(f"{self.path}: its metadata has no passes; record at least one forward pass")

    def _check_steps(self):
        """Check that every layer has steps of attention, and of a mixture the router's logits."""
        for pass_ in self.passes:
            for layer in range(self.plan.layers):
                for rank in self.ranks:
                    self._check_layer(rank, pass_, layer)

    def _check_layer(self, rank, pass_, layer):
        prefix, path = full_name(pass_.name, layer, "attn."), rank.path
        if not any(name.startswith(prefix) for name in (*rank.names, *rank.unfit)):
            raise InputError(
                f"{path}: it has no attention steps of layer {layer} in {pass_.name}; if "
                "all layers were recorded, the engine skips this one"
            )
        router = full_name(pass_.name, layer, "mlp.router")
        if self.config.num_local_experts and router not in rank:
            raise InputError(f"{path}: it lacks {router}, which shows the experts that the engine chose")
