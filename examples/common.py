"""What the examples share: the ranks, a model's shapes and random weights, the oracle's verdict, the clock.

Import it first: it shares the cores among the ranks, which numpy heeds only if it is imported afterwards.
Two environment variables choose the shapes; nothing is downloaded:

    MODEL    mistral-7b (default), llama-3-8b, tinyllama-1.1b or smollm2-135m
    LAYERS   how many layers the examples of a whole model have (default 2)

Exit codes: 0 fine, 1 the error against the oracle is too large, 2 bad input, 3 a rank failed.
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

from minitp.check.difference import measure  # noqa: E402
from minitp.comm.base import Comm  # noqa: E402
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
    """This rank: whom it meets, where it computes, and the model of which it holds a part."""

    comm: Comm
    device: Device
    source: ModelSource

    def say(self, text):
        """Rank 0 prints a line."""
        if self.comm.rank == 0:
            write_out(text + "\n")

    def say_each(self, text):
        """Rank 0 prints a line of each rank."""
        for rank, line in enumerate(self.comm.allgather_object(text)):
            self.say(f"     rank {rank}: {line}")

    def part(self, name):
        """This rank's slice of a tensor, as it lies in a checkpoint: [out_r, in], [out, in_r] or [n]."""
        index = self.source.plan.tensors[name].index(self.comm.rank)
        return self.device.xp.asarray(self.source.tensors.read(name, index), dtype=self.device.dtype)

    def matrix(self, *names):
        """This rank's slices of these tensors, turned and side by side: `w` [in, sum of out] for x @ w."""
        slices = [self.part(name).T for name in names]  # [in, out] each
        columns = sum(w.shape[1] for w in slices)
        joined = self.device.xp.empty((slices[0].shape[0], columns), dtype=self.device.dtype)
        return self.device.xp.concatenate(slices, axis=1, out=joined)  # [in, sum of out], row after row

    def whole(self, name):
        """All of a tensor, for the oracle: [out, in] or [n]."""
        shape = self.source.plan.tensors[name].shape
        return self.source.tensors.read(name, tuple(slice(0, n) for n in shape))

    def hidden_states(self):
        """What layer 0 might read, [T, D]: normal random numbers, the same on every rank."""
        drawn = np.random.default_rng(0).standard_normal((TOKENS, self.source.config.hidden_size))
        return self.device.xp.asarray(drawn, dtype=self.device.dtype)

    def token_ids(self):
        """A prompt of T random tokens, the same on every rank."""
        return np.random.default_rng(0).integers(self.source.config.vocab_size, size=TOKENS).tolist()

    def check(self, value, expected, terms, products):
        """Hold every rank's `value` against expected(), which rank 0 asks of the float64 oracle.

        Each addition in float32 rounds by up to 2^-24. Over a sum of `terms` numbers these errors walk at
        random, to 2^-24 sqrt(terms) of its size, and each of `products` sums in a row adds as much. A sum
        that lacks one rank's part is off by 1 / sqrt(ranks) or so.
        """
        right = expected() if self.comm.rank == 0 else None
        self.comm.agree()  # the others wait here, asleep: in `broadcast` they would keep the oracle's cores
        right = self.comm.broadcast(right)
        found = self.comm.allgather_object(measure(self.device.to_host(value), right))
        worst = max(found, key=lambda difference: difference.relative)
        bound = 2**-24 * terms**0.5 * products
        self.say(
            f"largest error against the float64 oracle: {worst.absolute:.1e}; "
            f"relative {worst.relative:.1e}, allowed {bound:.1e}"
        )
        if not worst.relative <= bound:
            rank = found.index(worst)
            raise AgreedError(f"not what the oracle has: on rank {rank} {worst}, allowed {bound:.1e}", 1)

    def time(self, function):
        """Print how long function() takes when all ranks call it at once: the median of several times."""
        function()  # warms up
        self.comm.agree()  # all start together
        before, seconds = self.comm.seconds, []
        for _ in range(REPEATS):
            started = perf_counter()
            self.device.to_host(function())  # to the host, for a GPU is not done when the call returns
            seconds.append(perf_counter() - started)
        share = (self.comm.seconds - before) / sum(seconds)
        self.say(
            f"time for {TOKENS} tokens: {statistics.median(seconds) * 1000:.1f} ms, median of {REPEATS}, "
            f"{share:.0%} of it in collectives ({self.machine()})"
        )

    def machine(self):
        """What a time was measured on."""
        ranks = "1 rank" if self.comm.size == 1 else f"{self.comm.size} ranks"
        return f"{ranks} on {'this CPU' if self.device.xp is np else 'a GPU each'}"


def shape(array):
    """For a line of text: "[32, 4096]"."""
    return str(list(array.shape))


def span(bounds):
    """For a line of text: (0, 8) is "0..7"."""
    start, stop = bounds
    return f"{start}..{stop - 1}" if stop - start > 1 else str(start)


def run(example):
    """Call example(here) on this rank, and end the process with the exit code."""
    prepare_streams()
    comm = None
    try:
        comm = SingleRank() if WORLD is None else MpiComm(expected=WORLD)
        if WORLD is not None:
            comm = select_host_comm(comm)
        with comm.agreed():
            source = chosen_model(comm.size)
        example(Here(comm, open_device("float32"), source))
        comm.close()
    except AgreedError as error:  # every rank has got it
        if comm.rank == 0:
            print(f"{SCRIPT}: {error}", file=sys.stderr)
        comm.close()
        sys.exit(error.exit_code)
    except Exception as error:  # on this rank alone: the others may be waiting for it
        if not isinstance(error, MinitpError):
            traceback.print_exc()
        elif comm is not None or environment.env_rank(os.environ) == 0:
            print(f"{SCRIPT}: {error}", file=sys.stderr, flush=True)
        if comm is not None:
            comm.abort(RankError.exit_code)
        sys.exit(RankError.exit_code)


def chosen_model(tp):
    """The ModelSource that MODEL and LAYERS ask for."""
    name, layers = os.environ.get("MODEL", "mistral-7b"), os.environ.get("LAYERS", "2")
    if name not in MODELS:
        raise InputError(f"MODEL={name}: no such shapes; choose from {', '.join(MODELS)}")
    most = MODELS[name]["num_hidden_layers"]
    if layers not in map(str, range(1, most + 1)):
        raise InputError(f"LAYERS={layers}: expected a number from 1 to {most}, the layers of {name}")
    return open_model(RANDOM + name, tp, int(layers))
