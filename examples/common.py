"""Helpers of the examples: ranks, shapes, random weights, comparison with the oracle, timing.

The oracle is minitp's independent float64 implementation of the model.

Import this module first: it divides the cores among the ranks, which has no effect on an already imported
NumPy. Two environment variables choose the shapes; nothing is downloaded:

    MODEL    mistral-7b (default), llama-3-8b, tinyllama-1.1b or smollm2-135m
    LAYERS   number of layers in the examples with a whole model (default 2)

Exit codes: 0 success, 1 too large a difference from the oracle, 2 bad input, 3 failure of a rank.
"""

import os
import statistics
import sys
import traceback
from dataclasses import dataclass
from time import perf_counter

from minitp.util import environment

WORLD = environment.world_size(os.environ)  # None without mpirun or srun: one rank
environment.limit_blas_threads(os.environ, environment.local_ranks(os.environ, WORLD or 1))

import numpy as np  # noqa: E402

from minitp.check.difference import difference_of  # noqa: E402
from minitp.comm.base import Comm  # noqa: E402
from minitp.comm.groups import split_into_groups  # noqa: E402
from minitp.comm.mpi import MpiComm  # noqa: E402
from minitp.comm.single import SingleRank  # noqa: E402
from minitp.device import Device, open_device  # noqa: E402
from minitp.errors import AgreedError, InputError, MinitpError, RankError  # noqa: E402
from minitp.launch.transport import select_host_comm  # noqa: E402
from minitp.loading.random_weights import MODELS  # noqa: E402
from minitp.loading.source import RANDOM, ModelSource, open_model  # noqa: E402
from minitp.util.stdout import prepare_streams, write_out  # noqa: E402

TOKENS = 32
REPEATS = 5
SCRIPT = os.path.basename(sys.argv[0])


@dataclass(frozen=True)
class Here:
    """A rank, with its communicator, its device, and the source of its part of the model."""

    comm: Comm
    device: Device
    source: ModelSource

    def say(self, text):
        """Print a line on rank 0."""
        if self.comm.all_groups.rank == 0:
            write_out(text + "\n")

    def say_each(self, text):
        """Print each rank's line on rank 0."""
        for rank, line in enumerate(self.comm.all_groups.allgather_object(text)):
            self.say(f"     rank {rank}: {line}")

    def part(self, name):
        """Return this rank's slice of a tensor, as in a checkpoint: [out_r, in], [out, in_r] or [n]."""
        index = self.source.plan.tensors[name].index(self.comm.rank)
        return self.device.xp.asarray(self.source.tensors.read(name, index), dtype=self.device.dtype)

    def matrix(self, *names):
        """Return this rank's slices of these tensors, transposed and joined: w [in, sum of out] for x @ w."""
        slices = [self.part(name).T for name in names]  # [in, out] each
        columns = sum(w.shape[1] for w in slices)
        joined = self.device.xp.empty((slices[0].shape[0], columns), dtype=self.device.dtype)
        return self.device.xp.concatenate(slices, axis=1, out=joined)  # [in, sum of out], in C order

    def whole(self, name):
        """Return a whole tensor, for the oracle: [out, in] or [n]."""
        shape = self.source.plan.tensors[name].shape
        return self.source.tensors.read(name, tuple(slice(0, n) for n in shape))

    def hidden_states(self, seed=0):
        """Return normally distributed hidden states [T, D], the same on every rank."""
        drawn = np.random.default_rng(seed).standard_normal((TOKENS, self.source.config.hidden_size))
        return self.device.xp.asarray(drawn, dtype=self.device.dtype)

    def token_ids(self):
        """Return a prompt of T random tokens, the same on every rank."""
        return np.random.default_rng(0).integers(self.source.config.vocab_size, size=TOKENS).tolist()

    def check(self, value, expected, terms, products):
        """Compare every rank's `value` with expected(), which rank 0 computes with the float64 oracle.

        Each addition in float32 has a relative rounding error of up to 2^-24. Over a sum of `terms` numbers,
        the errors are a random walk, about 2^-24 sqrt(terms) of the sum, and each of `products` consecutive
        sums adds as much. A sum without one rank's term has an error of about 1 / sqrt(ranks).
        """
        right = expected() if self.comm.rank == 0 else None
        self.comm.agree()  # other ranks sleep in `agree`; in `broadcast` they would use the oracle's cores
        right = self.comm.broadcast(right)
        found = self.comm.all_groups.allgather_object(difference_of(self.device.to_host(value), right))
        worst = max(found, key=lambda difference: difference.relative)
        bound = 2**-24 * terms**0.5 * products
        self.say(
            f"largest error against the float64 oracle: {worst.absolute:.1e}; "
            f"relative {worst.relative:.1e}, allowed {bound:.1e}"
        )
        if not worst.relative <= bound:
            rank = found.index(worst)
            raise AgreedError(f"rank {rank} differs from the oracle: {worst}, allowed {bound:.1e}", 1)

    def time(self, function):
        """Print the median time that function() takes when all ranks call it at once."""
        function()  # warms up
        self.comm.agree()  # so that all ranks start at the same time
        before, seconds = self.comm.seconds, []
        for _ in range(REPEATS):
            started = perf_counter()
            self.device.to_host(function())  # waits for a GPU, which may still be computing
            seconds.append(perf_counter() - started)
        share = (self.comm.seconds - before) / sum(seconds)
        self.say(
            f"time for {TOKENS} tokens: {statistics.median(seconds) * 1000:.1f} ms, median of {REPEATS}, "
            f"{share:.0%} of it in collectives ({self.machine()})"
        )

    def machine(self):
        """Return a description of the ranks and devices on which a time was measured."""
        return f"{size(self.comm.all_groups)} on {'this CPU' if self.device.xp is np else 'a GPU each'}"


def shape(array):
    """Return an array's shape as text: "[32, 4096]"."""
    return str(list(array.shape))


def size(comm):
    """Return the number of a communicator's ranks as text: "4 ranks"."""
    return "1 rank" if comm.size == 1 else f"{comm.size} ranks"


def span(bounds):
    """Return a range as text: (0, 8) is "0..7"."""
    start, stop = bounds
    return f"{start}..{stop - 1}" if stop - start > 1 else str(start)


def run(example, groups=1):
    """Call example(here) on this rank, one of `groups` groups, and end the process with the exit code."""
    read_arguments()
    prepare_streams()
    comm = None
    try:
        comm = SingleRank() if WORLD is None else MpiComm(expected=WORLD)
        with comm.agreed():
            if comm.size % groups:
                raise InputError(f"mpirun -n {comm.size}: cannot form {groups} equal groups; use mpirun -n 4")
        if WORLD is not None:
            comm = select_host_comm(split_into_groups(comm, groups))
        with comm.agreed():
            source = chosen_model(comm.size)
        example(Here(comm, open_device("float32"), source))
        comm.close()
    except AgreedError as error:  # raised on every rank
        if comm.all_groups.rank == 0:
            print(f"{SCRIPT}: {error}", file=sys.stderr)
        comm.close()
        sys.exit(error.exit_code)
    except Exception as error:  # raised on this rank only; the others may be waiting for it
        if not isinstance(error, MinitpError):
            traceback.print_exc()
        elif comm is not None or environment.env_rank(os.environ) == 0:
            print(f"{SCRIPT}: {error}", file=sys.stderr, flush=True)
        if comm is not None:
            comm.abort(RankError.exit_code)
        sys.exit(RankError.exit_code)


def read_arguments():
    """End the process after printing the script's docstring for --help, or refusing other arguments."""
    arguments, wants_help = sys.argv[1:], sys.argv[1:] in (["-h"], ["--help"])
    if not arguments:
        return
    if environment.env_rank(os.environ) == 0:
        if wants_help:
            write_out(sys.modules["__main__"].__doc__ + "\n" + __doc__[__doc__.index("Two environment") :])
        else:
            print(f"{SCRIPT} {arguments[0]}: only --help is accepted; set MODEL and LAYERS", file=sys.stderr)
    sys.exit(0 if wants_help else InputError.exit_code)


def chosen_model(tp):
    """Return the ModelSource chosen by MODEL and LAYERS."""
    name, layers = os.environ.get("MODEL", "mistral-7b"), os.environ.get("LAYERS", "2")
    dense = [model for model, fields in MODELS.items() if "num_local_experts" not in fields]
    if name not in dense:
        raise InputError(f"MODEL={name}: unknown model; choose from {', '.join(dense)}")
    limit = MODELS[name]["num_hidden_layers"]
    if layers not in map(str, range(1, limit + 1)):
        raise InputError(f"LAYERS={layers}: {name} has {limit} layers; choose from 1 to {limit}")
    return open_model(RANDOM + name, tp, int(layers))
