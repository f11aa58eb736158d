"""Where a GPU's time for one token goes, kernel by kernel.

The step that a graph holds is given to the GPU once launch by launch, an event before and behind each one. An
event costs about a microsecond, and in a graph launches follow each other more closely: so the sum is more
than the step takes as a graph, which is timed beside it.
"""

from contextlib import contextmanager

from minitp.bench.gpu_roofline import Timer
from minitp.cuda.comm import DeviceComm
from minitp.cuda.compiler import Compiler
from minitp.cuda.fused import BLOCK_SIZE, FusedModel
from minitp.cuda.kernels import Kernels

WEIGHT = 1  # the argument of linear.cu's kernels that is the weight
REPLAYS = 8  # of the graph, timed together


def gpu_profile(model, keys):
    """Of a decode step of one sequence that has `keys` positions: a dict for JSON, rank 0's."""
    timer, launches = Timer(model.device), Launches(model.device)
    whole = ready_step(model, keys)

    def replay():
        for _ in range(REPLAYS):
            whole.launch()

    graph_s = timer.seconds(replay) / REPLAYS
    step = ready_step(observed(model, launches), keys)
    step.run()  # compiles
    launches.forget()
    timer.stay_busy()
    step.run()
    model.device.stream.synchronize()
    kernels = launches.by_name(timer, keys * cache_position_bytes(model) // len(model.weights.layers))
    found = {
        "keys": keys,
        "launches": sum(kernel["count"] for kernel in kernels),
        "graph_us": 1e6 * graph_s,
        "eager_us": sum(kernel["us"] for kernel in kernels),
        "kernels": kernels,
    }
    return model.comm.broadcast(found)


def ready_step(model, keys):
    """A DecodeGraph for one sequence of that many keys, all zeros, which chooses its tokens itself."""
    blocks = -(-(keys + 16 * REPLAYS) // BLOCK_SIZE)
    pool = model.new_pool(blocks, BLOCK_SIZE)
    for pair in pool.storage:
        for rows in pair:
            rows.values.fill(0)
    step = model.decode_graph(pool, 1)
    step.fill([1], [keys - 1], [range(blocks)])
    step.temperature.fill(0.0)
    return step


def cache_position_bytes(model):
    """Of the keys and values of one position, in all layers of this rank."""
    return model.new_pool(1, 1).nbytes


def observed(model, launches):
    """The same model, whose launches are noted."""
    comm = ObservedComm(model.comm, launches)
    twin = FusedModel(model.config, model.plan, model.weights, comm, model.device, model.kv_dtype)
    twin.kernels = Kernels(twin, ObservedCompiler(model.device, launches))
    return twin


class Launches:
    """What has been launched: name, bytes where they are known, and an event before and behind."""

    def __init__(self, gpu):
        self.gpu, self.noted, self._inside = gpu, [], False

    def forget(self):
        self.noted.clear()

    @contextmanager
    def note(self, name, nbytes=None):
        """A launch in this block, or several that count as one."""
        if self._inside:
            yield
            return
        before, behind = (self.gpu.cupy.cuda.Event() for _ in range(2))
        self._inside = True
        before.record(self.gpu.stream)
        yield
        behind.record(self.gpu.stream)
        self._inside = False
        self.noted.append((name, nbytes, before, behind))

    def by_name(self, timer, attention_bytes):
        """Those of one name together; `attention_bytes` are what attention reads in a layer."""
        found = {}
        for name, nbytes, before, behind in self.noted:
            one = found.setdefault(name, {"name": name, "count": 0, "us": 0.0, "bytes": None})
            one["count"] += 1
            one["us"] += 1e6 * timer.between(before, behind)
            nbytes = attention_bytes if name == "attention_decode" else nbytes
            if nbytes is not None:
                one["bytes"] = (one["bytes"] or 0) + nbytes
        return sorted(found.values(), key=lambda one: -one["us"])


class ObservedCompiler(Compiler):
    """A Compiler whose kernels are noted when they are launched."""

    def __init__(self, gpu, launches):
        super().__init__(gpu.cupy, gpu.dtype)
        self._launches = launches

    def kernel(self, file, name, **defines):
        shown = f"linear {name}" if file == "linear.cu" else name
        return ObservedKernel(super().kernel(file, name, **defines), shown, self._launches)


class ObservedKernel:
    """A kernel as CuPy has it."""

    def __init__(self, kernel, name, launches):
        self.__dict__.update(_kernel=kernel, _name=name, _launches=launches)

    def __call__(self, grid, block, args, **options):
        nbytes = args[WEIGHT].nbytes if self._name.startswith("linear") else None
        with self._launches.note(self._name, nbytes):
            self._kernel(grid, block, args, **options)

    def __getattr__(self, name):
        return getattr(self._kernel, name)

    def allow_shared_memory(self, nbytes):
        self._kernel.allow_shared_memory(nbytes)


class ObservedComm:
    """A DeviceComm whose collectives are noted."""

    def __init__(self, comm, launches):
        self._comm, self._launches = comm, launches

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def reduce_into(self, x, out):
        with self._launches.note("all-reduce", x.nbytes):
            self._comm.reduce_into(x, out)

    def reduce_add_norm(self, *args):
        if type(self._comm).reduce_add_norm is DeviceComm.reduce_add_norm:  # made of launches that are noted
            return DeviceComm.reduce_add_norm(self, *args)
        with self._launches.note("all-reduce, addition, norm"):
            return self._comm.reduce_add_norm(*args)

    def gather_into(self, x, out):
        with self._launches.note("all-gather", x.nbytes):
            self._comm.gather_into(x, out)
