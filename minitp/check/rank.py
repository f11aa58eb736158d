"""A rank's check of its own weights and steps: the local errors, and the bits that ranks must share."""

import hashlib
from itertools import zip_longest

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
    """A check of a rank's own weights and steps.

    Parameters
    ----------
    source : ModelSource
    reference : Oracle
    model : Model
    run : RecordedRun
    step_file : StepFile
        The file with the steps that this rank has recorded.

    Attributes
    ----------
    findings : dict of str to Finding
        This rank's findings by full name.
    kinds : dict of str to Kind
        The distribution of each step over the ranks.
    rounding : RoundingStatistic
    """

    def __init__(self, source, reference, model, run, step_file):
        self.plan, self.comm, self.reference = source.plan, model.comm, reference
        self.fused, self.dtype, self.kv_dtype = model.fused, model.device.dtype, model.kv_dtype
        self.sums = sums_of(model.device)
        self.weights, self.run, self.step_file = HostWeights(model, source.plan), run, step_file
        self.kinds = kinds(source.plan, source.config.head_dim) | {BLOCK_TABLE: Kind("replicated")}
        self.findings = {}
        self.rounding = RoundingStatistic()
        self._not_recorded = {}  # full name -> NotRecorded, for steps inside a fused operation
        self._hashes = []  # (full name, hash of the inputs, hash of the array) of each replicated step

    def recorded_array(self, pass_name, layer, step):
        """Return this rank's array of a step, or a NotRecorded inside a fused operation."""
        name = full_name(pass_name, layer, step)
        return self._not_recorded[name] if name in self._not_recorded else self.step_file.read(name)

    def check_weights(self, progress):
        """Compare each weight with its slice of the checkpoint, which the oracle reads."""
        done = set()  # layers that `progress` has counted; None stands for tensors outside the layers
        for name in self.weights:
            array, shard = self.weights[name], self.plan.tensors[name]
            kind = "replicated" if shard.axis is None else "sharded"
            layer = split_name(name.removeprefix("model."))[1]
            finding = Finding("weights", layer, name, self.comm.rank, kind, local=None)
            self.findings[finding.name] = finding
            expected = np.empty(shard.shape_on(self.comm.rank), array.dtype)
            if expected.size:
                expected = self.reference.tensor(name, shard.index(self.comm.rank)).astype(array.dtype)
            if array.shape == expected.shape:
                finding.local = difference_of(array, expected)
            else:
                finding.note = _other_shape(array, expected)
            progress(int(layer not in {None, *done}))
            done.add(layer)

    def check_locally(self, progress):
        """Compare every step with the oracle's operation on this rank's inputs, layer by layer.

        Returns
        -------
        bool
            False if a rank has other passes or another number of tokens, which is then its only finding: the
            arrays of the ranks do not fit together.
        """
        if not self._has_all_tokens():
            return False
        expected_tokens = self._expected_tokens()
        replay = Replay(
            self.reference,
            self.plan,
            self.comm,
            weights=self.weights,
            recorded=self.recorded_array,
            sequences=expected_tokens,
            kv_dtype=self.kv_dtype,
            sums=self.sums,
        )
        for pass_ in self.run.passes:
            self._check_steps(pass_, None, replay.before(pass_))
        for i in range(self.plan.layers):
            for pass_ in self.run.passes:
                self._check_steps(pass_, i, replay.attention(i, pass_))
                self._check_steps(pass_, i, replay.mlp(i, pass_))
            progress(1)
        for pass_ in self.run.passes:
            self._check_steps(pass_, None, replay.after(pass_))
        self._check_cached_tokens()
        self._check_results(expected_tokens)
        return True

    def _has_all_tokens(self):
        """Check that all ranks have run all passes, with the right number of tokens."""
        wrong = False
        for pass_ in self.run.passes:
            name, expected = full_name(pass_.name, None, "tokens"), np.empty(pass_.stop - pass_.start)  # [T]
            note = "this rank has not run this pass"
            if name in self.step_file:
                array = self.step_file.read(name)  # [T]
                note = _other_shape(array, expected) if array.shape != expected.shape else ""
            if note:
                wrong, kind = True, self.kinds["tokens"].kind
                finding = Finding(pass_.name, None, "tokens", self.comm.rank, kind, local=None, note=note)
                self.findings[name] = finding
        return not any(self.comm.allgather_object(wrong))

    def _expected_tokens(self):
        """Return the tokens of each sequence: the prompt, then the most probable ones of rank 0's logits."""
        lengths = zip(self.run.sequences, self.run.prompt_lengths, strict=True)
        expected = [ids[:length] for ids, length in lengths]
        if self.comm.rank == 0:
            for pass_ in self.run.passes:
                ids = expected[pass_.sequence]
                # Other passes with logits give a token that an earlier pass has given: that of the second
                # chunk, or one that computes a preempted sequence again.
                if pass_.stop == len(ids) and pass_.logit_rows:
                    logits = self.step_file.read(f"{pass_.name}/logits")  # [n, V]
                    if len(logits):  # else a finding says that there are none
                        ids.append(int(np.argmax(logits[-1])))
        return self.comm.broadcast(expected)

    def _check_steps(self, pass_, layer, steps):
        """Enter a finding for each of `steps`, some (step, Expected, inputs) of a pass as in `replay`."""
        ids = self.run.sequences[pass_.sequence][pass_.start : pass_.stop]
        repeats = len(ids) / len(set(ids))  # the average number of times that a token occurs
        for step, expected, inputs in steps:
            name, dtype = full_name(pass_.name, layer, step), self._dtype_of(step)
            if self.fused and name not in self.step_file:
                self._not_recorded[name] = expected.not_recorded(dtype)
                continue
            array = self.step_file.read(name)
            finding = Finding(pass_.name, layer, step, self.comm.rank, self.kinds[step].kind, local=None)
            self.findings[finding.name] = finding
            if array.shape != expected.value.shape:
                finding.note = _other_shape(array, expected.value)
                continue
            if array.dtype != dtype:
                finding.note = f"dtype {array.dtype}, expected {dtype}"
            finding.bounds = expected.bounds(dtype, repeats)
            if isinstance(expected, Stored):
                self._check_stored(finding, array, expected)
            else:
                finding.local = difference_of(array, expected.value)
                self.rounding.add(step, array, expected, dtype, repeats)
            if inputs is not None and not any(isinstance(x, NotRecorded) for x in inputs):
                self._hashes.append((finding.name, _hash(*inputs), _hash(array)))

    def _check_stored(self, finding, array, expected):
        """Check a cache of a smaller dtype: its bits, or else the error of each number."""
        overflow = np.isinf(array) & np.isfinite(expected.value)  # [K_r, S, d]
        same = same_bits(array, expected.read) and not overflow.any()
        finding.local = difference_of(array, expected.read if same else expected.value)
        index = None if same else expected.first_outside(array)
        if index is not None:
            finding.note = f"at {list(index)} the error is larger than a {self.kv_dtype} cache allows"
        elif not same and np.array_equal(array, expected.value):
            finding.note = f"the cache is not {self.kv_dtype}: it has the numbers as they were written"

    def _dtype_of(self, step):
        if step in INTEGERS:
            return np.dtype(np.int64)
        return np.dtype(np.float32) if step in FLOAT32 else self.dtype

    def _check_cached_tokens(self):
        """Check that each cached key was written for the same tokens, up to and including its position."""
        passes = {pass_.name: pass_ for pass_ in self.run.passes}
        for pass_ in self.run.passes:
            ids = self.run.sequences[pass_.sequence]
            for position, (name, row) in enumerate(pass_.cached):
                writer = passes.get(name)  # None: UNWRITTEN
                tokens = writer and self.run.sequences[writer.sequence][: writer.start + row + 1]
                if tokens != ids[: position + 1]:
                    fault = f"has the key of other tokens, those of {name}" if writer else "was never written"
                    finding = self.findings[full_name(pass_.name, None, "positions")]
                    finding.note = f"position {position} of the cache {fault}"
                    break

    def _check_results(self, expected_tokens):
        """Check that each request on rank 0 got the tokens that were chosen, including the last one."""
        if self.comm.rank != 0:
            return
        for number, result in enumerate(self.run.results):
            expected = expected_tokens[number][: len(result)]
            if result != expected:
                pairs = enumerate(zip_longest(result, expected))
                position, (got, chosen) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
                what = "no token was chosen" if chosen is None else f"the most probable one is {chosen}"
                last = [pass_.name for pass_ in self.run.passes if pass_.sequence == number][-1]
                finding = self.findings[full_name(last, None, "tokens")]
                note = f"position {position} of the result is token {got}, but {what}"
                finding.note = finding.note or note

    def check_bits(self):
        """Check that replicated steps with the same inputs have the same bits on all ranks.

        If they differ, the right array is one within bounds; of several, the one that most ranks have; and if
        that does not decide, the one nearest to the expected value.
        """
        ratios = {name: np.inf if f.note else f.ratio for name, f in self.findings.items()}
        own = {name: (*hashes, ratios[name]) for name, *hashes in self._hashes}
        every = self.comm.allgather_object(own)
        for name in own:
            if not all(name in hashes for hashes in every):  # an array of another shape is already blamed
                continue
            inputs, arrays, step_ratios = zip(*(hashes[name] for hashes in every), strict=True)
            pairs = zip(arrays, step_ratios, strict=True)
            merits = [(ratio <= 1, arrays.count(array), -ratio) for array, ratio in pairs]
            right = arrays[merits.index(max(merits))]
            if len(set(inputs)) == 1 and arrays[self.comm.rank] != right and not self.findings[name].note:
                self.findings[name].note = "not the same bits as on the other ranks"


class HostWeights:
    """A rank's slices by checkpoint name, [out, in] as in the file, copied to the host when read."""

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


def _other_shape(array, expected):
    """Return a note that an array does not have the shape of its expected value."""
    return f"shape {list(array.shape)}, expected {list(expected.shape)}"


def _hash(*arrays):
    """Return a hash of the dtypes, shapes and bits of some arrays."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.digest()
