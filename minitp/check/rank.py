"""A rank's check of its own weights and steps: the local errors, and the bits that ranks have in common."""

import hashlib

import numpy as np

from minitp.check.difference import difference_of, same_bits
from minitp.check.replay import Replay
from minitp.check.result import Finding
from minitp.check.rounding import RoundingStatistic
from minitp.check.sums import sums_of
from minitp.check.tolerance import NotRecorded, Stored
from minitp.loading.weights import named_slices
from minitp.trace.names import BLOCK_TABLE, FLOAT32, INTEGERS, Kind, full_name, kinds, split_name


class RankCheck:
    """A rank that checks its own steps, and its findings by full name.

    Parameters
    ----------
    source : ModelSource
    reference : Oracle
    model : Model
    recorded : StepFile
    recording : Recording
    """

    def __init__(self, source, reference, model, recorded, recording):
        self.plan, self.comm, self.reference = source.plan, model.comm, reference
        self.fused, self.dtype, self.kv_dtype = model.fused, model.device.dtype, model.kv_dtype
        self.sums = sums_of(model.device)
        self.not_recorded = {}  # full name -> NotRecorded, for steps inside a fused operation
        self.weights, self.recorded, self.recording = HostWeights(model, source.plan), recorded, recording
        self.kinds = kinds(source.plan, source.config.head_dim) | {BLOCK_TABLE: Kind("replicated")}
        self.findings = {}
        self.rounding = RoundingStatistic()
        self.bits = []  # (full name, hash of the inputs, hash of the output) of replicated steps

    def recorded_array(self, pass_name, layer, step):
        """Return this rank's array of a step, or a NotRecorded inside a fused operation."""
        name = full_name(pass_name, layer, step)
        return self.not_recorded[name] if name in self.not_recorded else self.recorded.read(name)

    def check_weights(self, progress):
        """Compare each weight with its slice of the checkpoint, which the oracle reads."""
        layers = set()
        for name in self.weights:
            array, shard = self.weights[name], self.plan.tensors[name]
            expected = np.empty(array.shape, array.dtype)
            if array.size:
                expected = self.reference.tensor(name, shard.index(self.comm.rank)).astype(array.dtype)
            kind = "replicated" if shard.axis is None else "sharded"
            layer = split_name(name.removeprefix("model."))[1]
            finding = Finding("weights", layer, name, self.comm.rank, kind, difference_of(array, expected))
            self.findings[finding.name] = finding
            progress(int(layer not in {None, *layers}))
            layers.add(layer)

    def check_locally(self, progress):
        """Compute the local error of every step, layer by layer."""
        replay = Replay(
            self.reference,
            self.plan,
            self.comm,
            weights=self.weights,
            recorded=self.recorded_array,
            sequences=self._expected_tokens(),
            kv_dtype=self.kv_dtype,
            sums=self.sums,
        )
        for pass_ in self.recording.passes:
            self._judge(pass_, None, replay.before(pass_))
        for i in range(self.plan.layers):
            for pass_ in self.recording.passes:
                self._judge(pass_, i, replay.attention(i, pass_))
                self._judge(pass_, i, replay.mlp(i, pass_))
            progress(1)
        for pass_ in self.recording.passes:
            self._judge(pass_, None, replay.after(pass_))
        self._check_shared_blocks()

    def _expected_tokens(self):
        """Return the tokens of each sequence: the prompt, then the most probable ones of rank 0's logits."""
        expected = [
            ids[:prompt] for ids, prompt in zip(self.recording.sequences, self.recording.prompts, strict=True)
        ]
        if self.comm.rank == 0:
            for pass_ in self.recording.passes:
                ids = expected[pass_.sequence]
                # A later pass may end where an earlier one did: a chunk, or a sequence that was preempted.
                if pass_.stop == len(ids) and pass_.logits:
                    logits = self.recorded.read(f"{pass_.name}/logits")  # [n, V]
                    ids.append(int(np.argmax(logits[-1])))
        return self.comm.broadcast(expected)

    def _judge(self, pass_, layer, steps):
        ids = self.recording.sequences[pass_.sequence][pass_.start : pass_.stop]
        repeats = len(ids) / len(set(ids))
        for step, expected, inputs in steps:
            name, dtype = full_name(pass_.name, layer, step), self._dtype_of(step)
            if self.fused and name not in self.recorded:
                self.not_recorded[name] = expected.not_recorded(dtype)
                continue
            array = self.recorded.read(name)
            finding = Finding(pass_.name, layer, step, self.comm.rank, self.kinds[step].kind, local=None)
            self.findings[finding.name] = finding
            if array.shape != expected.value.shape:
                finding.note = f"shape {list(array.shape)}, expected {list(expected.value.shape)}"
                continue
            if array.dtype != dtype:
                finding.note = f"dtype {array.dtype}, expected {dtype}"
            finding.bounds = expected.bounds(dtype, repeats)
            if isinstance(expected, Stored):
                self._judge_stored(finding, array, expected)
            else:
                finding.local = difference_of(array, expected.value)
                self.rounding.add(step, array, expected, dtype, repeats)
            if inputs is not None and not any(isinstance(x, NotRecorded) for x in inputs):
                self.bits.append((finding.name, _digest(*inputs), _digest(array)))

    def _judge_stored(self, finding, array, expected):
        """Judge a cache of a smaller dtype: by its bits, or else by the error that the dtype allows."""
        exact = same_bits(array, expected.read)
        finding.local = difference_of(array, expected.read if exact else expected.value)
        beyond = None if exact else expected.beyond(array)
        if beyond is not None:
            finding.note = f"at {list(beyond)} the error is larger than a {self.kv_dtype} cache allows"

    def _dtype_of(self, step):
        if step in INTEGERS:
            return np.dtype(np.int64)
        return np.dtype(np.float32) if step in FLOAT32 else self.dtype

    def _check_shared_blocks(self):
        """Check that each cached position was written for the same tokens, up to and including its own."""
        passes = {pass_.name: pass_ for pass_ in self.recording.passes}
        for pass_ in self.recording.passes:
            ids = self.recording.sequences[pass_.sequence]
            for position, (name, row) in enumerate(pass_.cached):
                origin = passes.get(name)  # None: UNWRITTEN
                tokens = origin and self.recording.sequences[origin.sequence][: origin.start + row + 1]
                if tokens != ids[: position + 1]:
                    whose = f"has the key of other tokens, those of {name}" if origin else "was never written"
                    finding = self.findings[full_name(pass_.name, None, "positions")]
                    finding.note = f"position {position} of the cache {whose}"
                    break

    def check_bits(self):
        """Check that replicated steps with the same inputs have the same bits on all ranks.

        If they differ, an array within bounds is right; if there are several, the one that most ranks have;
        and if that does not decide, the one nearest to the expected value.
        """
        ratios = {name: np.inf if f.note else f.ratio for name, f in self.findings.items()}
        mine = [(name, *digests, ratios[name]) for name, *digests in self.bits]
        for ranks in zip(*self.comm.allgather_object(mine), strict=True):  # one step on all ranks
            name = ranks[0][0]
            results = [result for _, _, result, _ in ranks]
            likely = [(ratio <= 1, results.count(result), -ratio) for _, _, result, ratio in ranks]
            right = results[likely.index(max(likely))]
            inputs = {digest for _, digest, _, _ in ranks}
            if len(inputs) == 1 and results[self.comm.rank] != right and not self.findings[name].note:
                self.findings[name].note = "not the same bits as on the other ranks"


class HostWeights:
    """The slices of a rank by checkpoint name, [out, in] as in the file, copied to the host when read."""

    def __init__(self, model, plan):
        self._to_host = model.device.to_host
        self._slices = dict(named_slices(model.weights, plan, model.comm.rank))

    def __iter__(self):
        return iter(self._slices)

    def __getitem__(self, name):
        return self._to_host(self._slices[name])

    def get(self, name, default=None):
        """Return a slice, or `default` if the model has no such tensor."""
        return self[name] if name in self._slices else default


def _digest(*arrays):
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()
