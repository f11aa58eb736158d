"""The total errors of a run, compared with the oracle's own run from the tokens, and their bounds.

Rounding errors add up, and some models amplify them a hundred times while others do not. So the bound of a
total error must follow from the model, and the oracle runs the tokens more than once:

    exact       in float64; the total errors are the differences from this run
    rounded     with every step rounded to the run's dtype
    quantized   with exact sums, but with keys and values rounded as in the cache; only if the cache has a
                smaller dtype than the run

The total error of the rounded run is the error that one rounding per step has grown to. If the steps of a
run may have larger local errors, L instead of a roundoff u, its total error may be L / u times as large. With

    e   the relative total error of the rounded run, the largest so far (see `part_error`)
    L   the largest bound of a local error so far, on any rank, without those of partial sums; at least u,
        the rounding of the weights
    u   the unit roundoff of the run's dtype
    q   the relative total error of the quantized run, the largest so far; 0 without such a run

the bound is SAFETY * (L * max(1, e / u) + q). "So far" means up to this step, in all passes of this sequence
and of those that share its cache. Errors of either sign add up by chance, so two runs with local errors of
the same size have total errors that differ by a small factor. SAFETY covers that factor.

A bound above MOST is not used, because the reasoning takes errors to be small: twice the error in the inputs
gives twice the error in the output. `attn.scores`, `attn.probs` and `attn.context` have no such bound,
because a softmax turns an error of a score into a factor of the probability, and two keys with nearly equal
scores may change places. Once a router has chosen another expert than the oracle's, no later step has a
bound: such a choice is right if two experts are equally good up to rounding, and it makes a large difference.
"""

from dataclasses import dataclass

import numpy as np

from minitp.check.difference import difference_of, norm
from minitp.check.expected import dequantized
from minitp.check.tolerance import roundoff
from minitp.oracle import ops as oracle_ops
from minitp.trace.names import AFTER, FLOAT32, INTEGERS, full_name, split_name
from minitp.trace.reference import pass_steps

SAFETY = 8
MOST = 0.25
SOFTMAX = ("attn.scores", "attn.probs", "attn.context")
CACHES = ("attn.k_cache", "attn.v_cache")


@dataclass
class LargestSoFar:
    """The quantities from which the bounds of total errors follow, each the largest so far.

    Attributes
    ----------
    local_bound : float
        L, a relative error; at first u.
    growth : float
        max(1, e / u).
    quantization : float
        q, a relative error.
    bounded : bool
        False once a router has chosen another expert than the oracle's.
    """

    local_bound: float
    growth: float = 1.0
    quantization: float = 0.0
    bounded: bool = True

    def add(self, *quantities):
        """Enter the next step's local bound, e / u and q."""
        so_far = self.local_bound, self.growth, self.quantization
        finite = np.where(np.isfinite(quantities), quantities, 0)  # the relative bound of zeros is infinite
        self.local_bound, self.growth, self.quantization = map(float, np.maximum(so_far, finite))

    @property
    def total_bound(self):
        """The largest relative total error allowed."""
        return SAFETY * (self.local_bound * self.growth + self.quantization)


class Totals:
    """The total errors and their bounds, which `measure` enters into a rank's findings.

    Parameters
    ----------
    reference : Oracle
    comm : Comm
    run : RecordedRun
    kinds : dict of str to Kind
        The distribution of each step over the ranks.
    dtype : numpy.dtype
        The dtype of the run.
    kv_dtype : str
        The dtype of the cache: auto, float16 or int8.
    """

    def __init__(self, reference, comm, run, kinds, dtype, kv_dtype):
        self.reference, self.comm, self.run, self.kinds = reference, comm, run, kinds
        self.dtype, self.kv_dtype = dtype, kv_dtype
        # One for the user's prompt, and one for the sequences in the engine, which share blocks of the cache.
        self._largest = [LargestSoFar(roundoff(dtype)) for _ in range(2)]

    def measure(self, findings, step_file, progress):
        """Enter total errors into `findings`; rank 0 runs the oracle while the other ranks wait.

        Parameters
        ----------
        findings : dict of str to Finding
            This rank's findings by full name, with their local errors.
        step_file : StepFile
            The file with this rank's steps.
        progress : callable
            Function that is called with 1 after each layer.
        """
        by_rank = self.comm.allgather_object({name: f.bounds[0] for name, f in findings.items()})
        local_bounds = {name: max(bounds.get(name, 0.0) for bounds in by_rank) for name in findings}
        layers = self._layers() if self.comm.rank == 0 else iter(())
        for number in range(self.reference.layers + 2):  # the embedding, the layers, the logits
            with self.comm.agreed():
                steps = next(layers, None)
            # Not `broadcast`, whose rank 0 gives up after a minute: a large layer may take longer.
            for sequence, step, arrays in self.comm.allgather_object(steps)[0]:
                typical = [typical_error(array, arrays[0]) for array in arrays[1:]]
                for pass_ in self.run.passes:
                    if pass_.sequence == sequence:
                        self._measure_pass(pass_, step, arrays, typical, findings, step_file, local_bounds)
            progress(1 if 0 < number <= self.reference.layers else 0)

    def _layers(self):
        """Yield lists of (sequence, the oracle's step, its arrays in the exact run and the other runs).

        Each list has the steps of one layer, or those before or after the layers, of all sequences.
        """
        # All runs go through a layer before the next one begins, so only one layer is in memory.
        self.reference.tensor = one_layer_cached(self.reference.tensor)
        changes = [unchanged, self._rounded, *([self._quantized] if self.kv_dtype != "auto" else [])]
        sequences = [
            [by_layer(self.reference, ids, change) for change in changes] for ids in self.run.sequences
        ]
        for _ in range(self.reference.layers + 2):
            found = []
            for sequence, runs in enumerate(sequences):
                for same_step in zip(*map(next, runs), strict=True):  # (name, array) in each run
                    found.append((sequence, same_step[0][0], [array for _, array in same_step]))
            yield found

    def _rounded(self, step, array):
        """Return an array of the rounded run."""
        if step in INTEGERS:
            return array
        with np.errstate(over="ignore"):
            return array.astype(np.float32 if step in FLOAT32 else self.dtype)

    def _quantized(self, step, array):
        """Return an array of the quantized run."""
        return dequantized(array, self.kv_dtype) if step in ("attn.k_rope", "attn.v") else array

    def _measure_pass(self, pass_, oracle_step, arrays, typical, findings, step_file, local_bounds):
        """Enter the total errors of the steps of a pass that are parts of the oracle's step.

        `arrays` are those of the exact run and the other runs, `typical` the typical errors of the others.
        """
        for layer, step, index in pass_steps(self.reference, oracle_step, pass_.start, pass_.stop):
            if step in AFTER and pass_.logit_rows == 0:
                continue
            for recorded_step in (step, "logits_partial") if step == "logits" else (step,):
                name = full_name(pass_.name, layer, recorded_step)
                if name not in findings:  # inside a fused kernel
                    continue
                kind = self.kinds[recorded_step]
                exact, *others = (rank_part(kind, whole[index], self.comm.rank) for whole in arrays)
                if step in AFTER:
                    exact, *others = (part[-pass_.logit_rows :] for part in (exact, *others))
                errors = [part_error(*pair, exact) for pair in zip(others, typical, strict=True)]
                largest = self._largest[min(pass_.sequence, 1)]
                self._enter(findings[name], step_file.read(name), exact, errors, local_bounds[name], largest)

    def _enter(self, finding, array, exact, errors, local_bound, largest):
        """Enter the total error of an array, and its bound if it has one.

        `errors` are the relative total errors of the rounded run and, if there is one, the quantized run.
        """
        if array.shape == exact.shape:
            finding.total = difference_of(array, exact)
            if finding.step == "mlp.router" and self._chooses_others(array, exact):
                largest.bounded = False
        if finding.step in INTEGERS:
            return
        of_rounded, *of_quantized = errors
        if of_quantized and finding.step in CACHES:
            local_bound = 0.0  # it allows for the quantization, which the quantized run has already
        largest.add(local_bound, of_rounded / roundoff(self.dtype), *(of_quantized or [0.0]))
        has_bound = largest.bounded and finding.step not in SOFTMAX and np.any(exact)  # zeros have no size
        if has_bound and largest.total_bound <= MOST:
            finding.total_bound = largest.total_bound

    def _chooses_others(self, router, exact):
        """Return whether a router [T, E] chooses other experts than the oracle's."""
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
    steps = []
    for name, array in oracle.steps(token_ids):
        array[...] = change(split_name(name)[2], array)
        steps.append((name, array))
        if name == "embed" or name.endswith("mlp.residual"):
            yield steps
            steps = []
    yield steps


def one_layer_cached(tensor):
    """Wrap an oracle's `tensor` so that it keeps the tensors of one layer in float64 for several runs."""
    kept, kept_layer = {}, None

    def read(name, *index):
        nonlocal kept, kept_layer
        if not name.startswith("model.layers.") or index:
            return tensor(name, *index)
        layer = name.split(".")[2]
        if layer != kept_layer:
            kept, kept_layer = {}, layer
        if name not in kept:
            kept[name] = np.asarray(tensor(name), np.float64)
        return kept[name]

    return read


def rank_part(kind, whole, rank):
    """Return a rank's part of a whole array of a step."""
    if kind.kind != "sharded":
        return whole
    return whole[(slice(None),) * kind.axis + (slice(*kind.ranges[rank]),)]


def typical_error(array, exact):
    """Return the root mean square error of an element in a typical vector along the last axis."""
    squares = np.square(np.where(np.isfinite(exact) & np.isfinite(array), array - exact, 0.0))
    return float(np.median(np.atleast_1d(squares.mean(axis=-1)))) ** 0.5 if squares.size else 0.0


def part_error(array, typical, exact):
    """Return the relative error of a part of a step in the rounded or quantized run.

    By chance the error of a part with few elements may be close to zero. So the error that it would have if
    each element had the `typical` error of the whole step is added to it.
    """
    finite = np.isfinite(exact) & np.isfinite(array)
    size = norm(exact[finite])
    if size == 0:
        return 0.0
    return float((norm(array[finite] - exact[finite]) + typical * finite.sum() ** 0.5) / size)
