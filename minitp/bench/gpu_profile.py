"""The time of a GPU's decode pass, kernel by kernel.

The launches of a CUDA graph are made one by one, with an event before and after each. An event costs about a
microsecond, and launches in a graph follow each other more closely. So the sum is larger than the time of the
graph, which is measured as well.
"""

from contextlib import contextmanager
from functools import partial

from minitp.bench.gpu_roofline import Timer
from minitp.cuda.comm import DeviceComm
from minitp.cuda.compiler import Compiler
from minitp.cuda.fused import BLOCK_SIZE, FusedModel
from minitp.cuda.kernels import Kernels
from minitp.sampling import SamplingParams

WEIGHT = 1  # position of the weight in the arguments of linear.cu's kernels
REPLAYS = 8  # number of replays of the graph that are timed together


def gpu_profile(model, keys):
    """Time the kernels of a decode pass with `keys` positions; return rank 0's dict for JSON."""
    timer, launches = Timer(model.device), Launches(model.device)
    graph = decode_graph(model, keys)

    def replay():
        for _ in range(REPLAYS):
            graph.launch()

    graph_s = timer.seconds(replay) / REPLAYS
    observed = decode_graph(observed_model(model, launches), keys)
    observed.run()  # compiles
    launches.forget()
    timer.stay_busy()
    observed.run()
    model.device.stream.synchronize()
    kernels = launches.by_name(timer, keys * cache_position_bytes(model) // len(model.weights.layers))
    profile = {
        "keys": keys,
        "launches": sum(kernel["count"] for kernel in kernels),
        "graph_us": 1e6 * graph_s,
        "eager_us": sum(kernel["us"] for kernel in kernels),
        "kernels": kernels,
    }
    return model.comm.broadcast(profile)


def decode_graph(model, keys, sequences=1):
    """Return a DecodeGraph for sequences with `keys` keys of zeros each, whose tokens the GPU chooses."""
    blocks = -(-(keys + 16 * REPLAYS) // BLOCK_SIZE)
    pool = model.new_pool(sequences * blocks, BLOCK_SIZE)
    for pair in pool.storage:
        for rows in pair:
            rows.values.fill(0)
    graph = model.decode_graph(pool, sequences)
    pool.lanes.start(0, SamplingParams(), [], [], room=0)
    fill(graph, keys, sequences)
    return graph


def fill(graph, keys, sequences=1):
    """Set the inputs of a graph from `decode_graph` as before its first pass."""
    blocks = graph.pool.blocks // sequences
    tables = [range(n * blocks, (n + 1) * blocks) for n in range(sequences)]
    graph.fill([1] * sequences, [keys - 1] * sequences, tables, lanes=[0] * sequences)


def cache_position_bytes(model):
    """Return the bytes of keys and values of one position, in all layers of this rank."""
    return model.new_pool(1, 1).nbytes


def observed_model(model, launches):
    """Return a copy of the model whose launches are recorded."""
    comm = ObservedComm(model.comm, launches)
    twin = FusedModel(model.config, model.plan, model.weights, comm, model.device, model.kv_dtype)
    twin.kernels = Kernels(twin, ObservedCompiler(model.device, launches))
    return twin


class Launches:
    """A record of launches: the name, the bytes if known, the events around it, and a repetition."""

    def __init__(self, gpu):
        self.gpu, self.noted, self._inside = gpu, [], False

    def forget(self):
        """Discard all records."""
        self.noted.clear()

    @contextmanager
    def note(self, name, nbytes=None, again=None):
        """Record a launch in this block, or several that count as one; `again` repeats it."""
        if self._inside:
            yield
            return
        before, after = (self.gpu.cupy.cuda.Event() for _ in range(2))
        self._inside = True
        before.record(self.gpu.stream)
        yield
        after.record(self.gpu.stream)
        self._inside = False
        self.noted.append((name, nbytes, before, after, again))

    def by_name(self, timer, attention_bytes):
        """Sum the launches of each name; `attention_bytes` is what attention reads in one layer."""
        sums = {}
        for name, nbytes, before, after, _ in self.noted:
            one = sums.setdefault(name, {"name": name, "count": 0, "us": 0.0, "bytes": None})
            one["count"] += 1
            one["us"] += 1e6 * timer.between(before, after)
            nbytes = attention_bytes if name == "attention_decode" else nbytes
            if nbytes is not None:
                one["bytes"] = (one["bytes"] or 0) + nbytes
        return sorted(sums.values(), key=lambda one: -one["us"])


class ObservedCompiler(Compiler):
    """A Compiler that records the launches of its kernels."""

    def __init__(self, gpu, launches):
        super().__init__(gpu.cupy, gpu.dtype)
        self._launches = launches

    def kernel(self, file, name, **defines):
        shown = f"linear {name}" if file == "linear.cu" else name
        return ObservedKernel(super().kernel(file, name, **defines), shown, self._launches)


class ObservedKernel:
    """A CuPy kernel that records its launches."""

    def __init__(self, kernel, name, launches):
        self.__dict__.update(_kernel=kernel, _name=name, _launches=launches)

    def __call__(self, grid, block, args, **options):
        nbytes = args[WEIGHT].nbytes if self._name.startswith("linear") else None
        launch = partial(self._kernel, grid, block, args, **options)
        with self._launches.note(self._name, nbytes, launch):
            launch()

    def __getattr__(self, name):
        return getattr(self._kernel, name)

    def allow_shared_memory(self, nbytes):
        self._kernel.allow_shared_memory(nbytes)


class ObservedComm:
    """A DeviceComm that records its collectives."""

    def __init__(self, comm, launches):
        self._comm, self._launches = comm, launches

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def reduce_into(self, x, out):
        with self._launches.note("all-reduce", x.nbytes):
            self._comm.reduce_into(x, out)

    def reduce_add_norm(self, *args):
        if type(self._comm).reduce_add_norm is DeviceComm.reduce_add_norm:  # its operations are recorded
            return DeviceComm.reduce_add_norm(self, *args)
        with self._launches.note("all-reduce, addition, norm"):
            return self._comm.reduce_add_norm(*args)

    def gather_into(self, x, out):
        with self._launches.note("all-gather", x.nbytes):
            self._comm.gather_into(x, out)
