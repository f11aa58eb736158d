"""Time decode passes and their kernels as CUDA graphs, next to the time that reading their bytes takes.

    graphs.py [--model NAME] [--layers N] [--of TP] [--keys N] [--rows 1,8,..] [--kernels 1,8,..]

One rank runs alone. With --of, it is rank 0 of TP ranks, and the pass has no sums: nothing takes the place of
the all-reduces. --rows are the numbers of sequences of which a pass is timed; --kernels those of which each
kernel is timed as well: as a graph of all its launches in a pass, one after another, without the others. The
kernels are those that the pass launches, so a new kernel appears by itself.

The last line of the output is a JSON object. A point or a kernel that fails has the key "failed".
"""

import argparse
import gc
import json
from dataclasses import replace

from minitp.bench.fake_weights import TiledWeights
from minitp.bench.gpu_profile import (
    REPLAYS,
    Launches,
    cache_position_bytes,
    decode_graph,
    fill,
    observed_model,
)
from minitp.bench.gpu_roofline import GpuRoofline, Timer
from minitp.comm.single import ShardOnly, SingleRank
from minitp.cuda.comm import LocalComm
from minitp.errors import one_line
from minitp.launch.transport import select_comm
from minitp.load import device_of, load_model
from minitp.loading.source import open_model

LEAST_LAUNCHES = 32  # minimum launches in a kernel's graph, so that its start is a small part


class WithoutSums(LocalComm):
    """A Comm of one shard of several whose collectives do nothing, so only its own work is timed."""

    def reduce_into(self, x, out):
        pass

    def gather_into(self, x, out):
        pass


def numbers(text):
    """Parse numbers separated by commas; an empty text has none."""
    return [int(part) for part in text.split(",") if part]


def main(argv=None):
    """Measure and print the JSON object."""
    args = arguments().parse_args(argv)
    model = open_rank(args.model, args.layers, args.of, args.keys)
    print(json.dumps(measure(model, args.rows, args.kernels, args.keys)))


def arguments():
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="random:mistral-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--keys", type=int, default=512)
    parser.add_argument("--rows", type=numbers, default=[1])
    parser.add_argument("--kernels", type=numbers, default=[])
    return parser


def open_rank(name, layers=None, tp=1, keys=0, dtype="bfloat16"):
    """Return the fused model of a single rank, which accepts contexts of `keys` and some more positions."""
    host = SingleRank() if tp == 1 else ShardOnly(0, tp)
    comm = select_comm(host, "cuda")
    if tp > 1:
        comm = WithoutSums(comm.host, comm.gpu)
    source = open_model(name, tp, layers)
    longest = max(source.config.max_position_embeddings, 2 * keys)
    source = replace(source, config=replace(source.config, max_position_embeddings=longest))
    device = device_of(comm, source, dtype)
    if source.directory is None:
        source = replace(source, tensors=TiledWeights(source.tensors.shapes, device.dtype))
    model = load_model(source, comm, device, path="fused")
    model.connect()
    return model


def measure(model, rows, kernel_rows, keys):
    """Return the dict of all points."""
    timer = Timer(model.device)
    reads = timer.read_rate()
    points = []
    for count in sorted({*rows, *kernel_rows}):
        point = {"rows": count, "keys": keys}
        try:
            point |= time_of_pass(model, timer, count, keys, reads)
            if count in kernel_rows:
                point |= times_of_kernels(model, timer, count, keys, reads)
        except Exception as error:  # the other points are still measured
            point["failed"] = one_line(error)
        points.append(point)
        free_pools(model.device)
    return {
        "tp": model.comm.size,
        "layers": model.config.num_hidden_layers,
        "read_gb_per_s": reads / 1e9,
        "points": points,
    }


def free_pools(gpu):
    """Free the memory of pools and their graphs, which refer to each other."""
    gc.collect()
    gpu.cupy.get_default_memory_pool().free_all_blocks()


def time_of_pass(model, timer, rows, keys, reads):
    """Return the time of a decode pass of `rows` sequences as a graph, its bytes, and the share of reads."""
    graph = decode_graph(model, keys, rows)

    def replay():
        for _ in range(REPLAYS):
            graph.launch()

    seconds, nbytes = timer.seconds(replay) / REPLAYS, bytes_of_pass(model, rows, keys)
    return {"us": 1e6 * seconds, "bytes": nbytes, "share_of_reads": nbytes / reads / seconds}


def bytes_of_pass(model, rows, keys):
    """Return the bytes of the weights and of all keys and values that a decode pass reads."""
    roofline = GpuRoofline(model)
    return roofline.read(rows) * roofline.dtype.itemsize + rows * roofline.cache_bytes(keys)


def times_of_kernels(model, timer, rows, keys, reads):
    """Return the number of launches of a pass, and a list of its kernels with the time of each launch."""
    launches = Launches(model.device)
    graph = decode_graph(observed_model(model, launches), keys, rows)
    graph.run()  # compiles
    launches.forget()
    graph.run()
    model.device.stream.synchronize()
    attention = rows * keys * cache_position_bytes(model) // model.config.num_hidden_layers
    groups, labels = {}, labels_of_weights(model)
    for name, nbytes, _, _, again in launches.noted:
        if again is None:  # a collective
            continue
        weights = [labels[pointer] for pointer in map(pointer_of, again.args[-1]) if pointer in labels]
        nbytes = attention if name == "attention_decode" else nbytes
        groups.setdefault((", ".join([name, *weights]), nbytes), []).append(again)
    kernels, begin = [], next(iter(groups.values()))
    for (label, nbytes), repeats in groups.items():
        one = {"name": label, "count": len(repeats), "bytes": nbytes}
        one["floor_us"] = None if nbytes is None else 1e6 * nbytes / reads
        try:
            fill(graph, keys, rows)
            for again in begin:  # restores lengths and slots, which the launches of other kernels may change
                again()
            one["us"] = 1e6 * time_of_launches(model.device, timer, repeats)
        except Exception as error:  # the other kernels are still measured
            one["failed"] = one_line(error)
        kernels.append(one)
    return {"launches": sum(one["count"] for one in kernels), "kernels": kernels}


def labels_of_weights(model):
    """Return the names of the layers' projections by their addresses on the GPU."""
    return {
        array.data.ptr: name
        for layer in model.weights.layers
        for name, array in vars(layer).items()
        if name.startswith("w_") and array is not None
    }


def pointer_of(argument):
    """Return the address of an argument of a kernel, or None if it is not an array."""
    return argument.data.ptr if hasattr(argument, "strides") and hasattr(argument.data, "ptr") else None


def time_of_launches(gpu, timer, repeats):
    """Return the seconds of a launch, timed as a graph of all `repeats`, several times if they are few."""
    times = -(-LEAST_LAUNCHES // len(repeats))
    gpu.stream.begin_capture()
    try:
        for again in repeats * times:
            again()
    finally:
        graph = gpu.stream.end_capture()
    return timer.seconds(lambda: graph.launch(gpu.stream)) / (times * len(repeats))


if __name__ == "__main__":
    main()
