"""The total errors of a run, compared with the oracle's own run from the tokens, and their bounds.

Errors add up, so the bound of a total error must follow from the model: some amplify a rounding a hundred
times, others do not. The oracle shows how much: it runs the tokens once more, with every step rounded to the
run's dtype. The total error of this second run has the size that one rounding per step has at the end. If the
steps of a run may have larger errors, say L where a rounding has u, then its total error may be L / u times
as large. So with

    e   the relative total error of the rounded run, the largest so far; see `noise`
    L   the largest bound of a local error so far, on any rank; at least u, the rounding of the weights
    u   the unit roundoff of the run's dtype

the bound is SAFETY * L * max(1, e / u). "So far" means the steps before this one, in all passes of its
sequence. If the cache has a smaller dtype, the oracle runs the tokens a third time, with exact sums but with
keys and values rounded as in the cache, and the bound is larger by SAFETY times the total error of this run.
Because errors of either sign add up by chance, two runs with errors of the same size may end with
totals that differ by a small factor, which SAFETY covers.

A bound above LARGEST is not used, because the reasoning takes errors to be small: that twice the error in
has twice the error out. Scores, probabilities and context have no such bound either, because a softmax turns
an error of a score into a factor, up to a choice of another key. Nor has any step after a router has chosen
another expert than the oracle, which is right if two experts are equally good up to rounding, and makes a
large difference.
"""

import numpy as np

from minitp.check.difference import difference_of
from minitp.check.expected import dequantized
from minitp.check.tolerance import roundoff
from minitp.oracle import ops as oracle_ops
from minitp.trace.names import AFTER, FLOAT32, INTEGERS, full_name, split_name
from minitp.trace.reference import pass_steps

SAFETY = 8
LARGEST = 0.5
SOFTMAX = ("attn.scores", "attn.probs", "attn.context")
CACHES = ("attn.k_cache", "attn.v_cache")


class Totals:
    """The total errors and their bounds, which `measure` enters into a rank's findings.

    Parameters
    ----------
    reference : Oracle
    comm : Comm
    recording : Recording
    kinds : dict of str to Kind
    dtype : numpy.dtype
        The dtype of the run.
    kv_dtype : str
    """

    def __init__(self, reference, comm, recording, kinds, dtype, kv_dtype):
        self.reference, self.comm, self.recording, self.kinds = reference, comm, recording, kinds
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self._so_far = {}  # group of sequences -> the largest L, e / u, and error of the cache's dtype so far
        self._unbounded = set()  # groups of sequences in which a router has chosen another expert

    def measure(self, findings, recorded, progress):
        """Enter total errors into `findings`; rank 0 runs the oracle while the other ranks wait.

        Parameters
        ----------
        findings : dict of str to Finding
            This rank's findings by full name, with their local errors.
        recorded : callable
            A function from a full name to this rank's array.
        progress : callable
            Function that is called with 1 after each layer.
        """
        every = self.comm.allgather_object({name: finding.bounds[0] for name, finding in findings.items()})
        local = {name: max(bounds.get(name, 0.0) for bounds in every) for name in findings}
        layers = self._layers() if self.comm.rank == 0 else iter(())
        for number in range(self.reference.layers + 2):  # the embedding, the layers, the logits
            with self.comm.agreed():
                mine = next(layers, None)
            for sequence, name, arrays in self.comm.allgather_object(mine)[0]:
                for pass_ in self.recording.passes:
                    if pass_.sequence == sequence:
                        self._measure_step(pass_, name, arrays, findings, recorded, local)
            progress(1 if 0 < number <= self.reference.layers else 0)

    def _layers(self):
        """Yield the steps of a layer of all sequences: a list of (sequence, name, arrays of the runs)."""
        self.reference.tensor = one_layer_cached(self.reference.tensor)
        changes = [unchanged, self._rounded, *([self._stored] if self.kv_dtype != "auto" else [])]
        sequences = [
            [by_layer(self.reference, ids, change) for change in changes] for ids in self.recording.sequences
        ]
        for _ in range(self.reference.layers + 2):
            found = []
            for sequence, runs in enumerate(sequences):
                for steps in zip(*map(next, runs), strict=True):  # the same step of each run
                    found.append((sequence, steps[0][0], [array for _, array in steps]))
            yield found

    def _rounded(self, step, array):
        if step in INTEGERS:
            return array
        with np.errstate(over="ignore"):
            return array.astype(np.float32 if step in FLOAT32 else self.dtype)

    def _stored(self, step, array):
        return dequantized(array, self.kv_dtype) if step in ("attn.k_rope", "attn.v") else array

    def _measure_step(self, pass_, name, arrays, findings, recorded, local):
        """Enter the total errors of all steps of a pass that are parts of the oracle's step `name`."""
        exact, *others = arrays
        typical = [typical_error(other, exact) for other in others]
        for layer, step, index in pass_steps(self.reference, name, pass_.start, pass_.stop):
            if step in AFTER and pass_.logits == 0:
                continue
            for recorded_step in (step, "logits_partial") if step == "logits" else (step,):
                name = full_name(pass_.name, layer, recorded_step)
                if name in findings:
                    kind = self.kinds[recorded_step]
                    parts = [rank_part(kind, whole[index], self.comm.rank) for whole in arrays]
                    if step in AFTER:
                        parts = [part[-pass_.logits :] for part in parts]
                    errors = [noise(parts[0], *pair) for pair in zip(parts[1:], typical, strict=True)]
                    self._enter(findings[name], pass_.sequence, recorded(name), parts[0], errors, local[name])

    def _enter(self, finding, sequence, array, exact, errors, local):
        group = min(sequence, 1)  # the sequences in the engine share blocks of the cache
        if array.shape == exact.shape:
            finding.total = difference_of(array, exact)
            if finding.step == "mlp.router" and self._flipped(array, exact):
                self._unbounded.add(group)
        if finding.step in INTEGERS:
            return
        u = roundoff(self.dtype)
        rounding, *stored = errors
        local = 0.0 if stored and finding.step in CACHES else local
        so_far = self._so_far.get(group, [u, 1.0, 0.0])
        allowed, growth, cache = np.fmax(so_far, [local, rounding / u, *(stored or [0.0])])
        self._so_far[group] = allowed, growth, cache
        bound = float(SAFETY * (allowed * growth + cache))
        if group not in self._unbounded and finding.step not in SOFTMAX and bound <= LARGEST:
            finding.total_bound = bound

    def _flipped(self, router, exact):
        experts = self.reference.experts_per_token
        ours, theirs = (oracle_ops.choose_experts(x, experts) for x in (router, exact))  # [T, E] each
        return not np.array_equal(ours, theirs)


def unchanged(step, array):
    """Return the array of an exact run."""
    return array


def by_layer(oracle, token_ids, change):
    """Yield lists of the steps (name, array) of each layer, and of the steps before and after the layers.

    Each array is replaced by change(step, array) before the oracle continues with it.
    """
    group = []
    for name, array in oracle.steps(token_ids):
        array[...] = change(split_name(name)[2], array)
        group.append((name, array))
        if name == "embed" or name.endswith("mlp.residual"):
            yield group
            group = []
    yield group


def one_layer_cached(tensor):
    """Wrap an oracle's `tensor` so that it keeps the tensors of one layer in float64 for several runs."""
    kept, layer = {}, None

    def read(name, *index):
        nonlocal kept, layer
        if not name.startswith("model.layers.") or index:
            return tensor(name, *index)
        number = name.split(".")[2]
        if number != layer:
            kept, layer = {}, number
        if name not in kept:
            kept[name] = np.asarray(tensor(name), np.float64)
        return kept[name]

    return read


def rank_part(kind, whole, rank):
    """Return a rank's part of a whole array of a step."""
    if kind.kind != "sharded":
        return whole
    return whole[(slice(None),) * kind.axis + (slice(*kind.ranges[rank]),)]


def typical_error(noisy, exact):
    """Return the root mean square error of an element in a typical vector along the last axis."""
    squares = np.square(np.where(np.isfinite(exact) & np.isfinite(noisy), noisy - exact, 0.0))
    return float(np.median(np.atleast_1d(squares.mean(axis=-1)))) ** 0.5 if squares.size else 0.0


def noise(exact, noisy, typical):
    """Return the relative error of a part of a step in the rounded run.

    By chance the error of a part with few elements may be close to zero. So the typical error of the whole
    step's elements is added to it.
    """
    finite = np.isfinite(exact) & np.isfinite(noisy)
    size = np.linalg.norm(exact[finite])
    if size == 0:
        return 0.0
    return float((np.linalg.norm(noisy[finite] - exact[finite]) + typical * finite.sum() ** 0.5) / size)
