"""Compare all_reduce.cu over CUDA IPC, with four processes that share one GPU, with NumPy's sums.

`--comm peer` needs a GPU for each rank. The features of CUDA that it uses can be tested on one GPU: memory
that other processes open by its handle, and kernels that wait for flags set by kernels of other processes. On
one GPU, the kernels of several processes take turns of a few milliseconds each. So sums are slow, and only a
few are computed.
"""

import multiprocessing
import sys
import time
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from minitp import ops
from minitp.cuda.compiler import Compiler
from minitp.cuda.gpu import open_gpu
from minitp.cuda.kernels.all_reduce import AllReduce, region_bytes

RANKS, ROWS, WIDTH, CALLS = 4, 3, 576, 20
DTYPES = (np.float16, ml_dtypes.bfloat16)
EPS = 1e-5
PATIENCE_S = 30.0
END_S = 5.0  # maximum time between the first process to end and the last
LATE_S = 0.02


def main():
    """Run the processes; return 1 if one of them fails. It prints the reason itself."""
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    pipes = [spawn.Pipe() for _ in range(RANKS)]
    processes = [
        spawn.Process(target=work, args=(rank, end), daemon=True) for rank, (_, end) in enumerate(pipes)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()  # so that this process notices when the other one ends
    try:
        while True:
            values = [pipe.recv() for pipe, _ in pipes]
            for pipe, _ in pipes:
                pipe.send(values)
    except (EOFError, ConnectionError):
        pass  # a process has ended
    deadline = time.monotonic() + END_S
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    if any(process.exitcode != 0 for process in processes):
        return 1
    dtypes = " and ".join(np.dtype(dtype).name for dtype in DTYPES)
    print(f"{CALLS} sums, and {CALLS} with the norm, of {RANKS} processes are equal to NumPy's in {dtypes}")
    return 0


def work(rank, pipe):
    """Run one process: compute all sums and compare them with NumPy's."""

    def allgather_object(value):
        """Return the values of all processes, by rank."""
        pipe.send(value)
        return pipe.recv()

    gpu = open_gpu()
    for dtype in DTYPES:
        for check in (check_sums, check_norms):
            with shared_regions(gpu, rank, allgather_object) as regions:
                calls, missing = gpu.cupy.zeros(ROWS, np.uint64), gpu.cupy.zeros(1, np.int32)
                compiler = Compiler(gpu.cupy, np.dtype(dtype))
                reduce = AllReduce(compiler, rank, regions, calls, missing, WIDTH, PATIENCE_S)
                check(gpu, rank, reduce, dtype)
                late = int(gpu.to_host(missing)[0])
                assert late == 0, f"rank {rank} waited in vain for rank {late - 1}"


@contextmanager
def shared_regions(gpu, rank, allgather_object):
    """Yield the addresses of all processes' regions in this process, uint64 [ranks] on the GPU."""
    runtime, nbytes = gpu.cupy.cuda.runtime, region_bytes(RANKS, ROWS, WIDTH)
    own = runtime.malloc(nbytes)
    runtime.memsetAsync(own, 0, nbytes, gpu.stream.ptr)
    gpu.stream.synchronize()
    handles = allgather_object(runtime.ipcGetMemHandle(own))
    seen = [own if r == rank else runtime.ipcOpenMemHandle(handle) for r, handle in enumerate(handles)]
    yield gpu.from_host(np.array(seen, np.uint64))
    gpu.stream.synchronize()
    allgather_object(None)  # all processes have finished reading
    for r, region in enumerate(seen):
        if r != rank:
            runtime.ipcCloseMemHandle(region)
    allgather_object(None)
    runtime.free(own)


def check_sums(gpu, rank, reduce, dtype):
    """Check that consecutive sums have NumPy's bits, while each process in turn is late."""
    partial, expected = drawn(dtype)
    terms = [gpu.from_host(one[rank]) for one in partial]
    out = [gpu.cupy.empty((ROWS, WIDTH), dtype) for _ in range(CALLS)]
    for call in range(CALLS):
        be_late(rank, call)
        reduce(terms[call], out[call])
    for call in range(CALLS):
        np.testing.assert_array_equal(bits(gpu.to_host(out[call])), bits(expected[call]))


def check_norms(gpu, rank, reduce, dtype):
    """Check sums with the residual and the norm; each call continues with the previous residual."""
    partial, sums = drawn(dtype)
    x, weight, bias = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(dtype)
    x = np.tile(x, (ROWS, 1))  # [T, D]
    residual, on_gpu = gpu.from_host(x), [gpu.from_host(array) for array in (weight, bias)]
    terms = [gpu.from_host(one[rank]) for one in partial]
    out = [gpu.cupy.empty((ROWS, WIDTH), dtype) for _ in range(CALLS)]
    for call in range(CALLS):
        be_late(rank, call)
        reduce.add_and_norm(terms[call], residual, on_gpu[0], out[call], EPS, bias=on_gpu[1])
    for call in range(CALLS):
        x = x + (sums[call] + bias)
        found, expected = (
            a.astype(np.float32) for a in (gpu.to_host(out[call]), ops.rms_norm(np, x, weight, EPS))
        )
        # The squares are summed in another order, so a value near a tie may be rounded to the other side.
        np.testing.assert_allclose(found, expected, rtol=2 * float(ml_dtypes.finfo(dtype).eps))
    np.testing.assert_array_equal(bits(gpu.to_host(residual)), bits(x))


def drawn(dtype):
    """Return partial sums [calls, ranks, T, D], the same in all processes, and their sums [calls, T, D]."""
    partial = np.random.default_rng(0).normal(size=(CALLS, RANKS, ROWS, WIDTH)).astype(dtype)
    total = partial[:, 0].astype(np.float32)
    for rank in range(1, RANKS):
        total += partial[:, rank].astype(np.float32)
    return partial, total.astype(dtype)


def be_late(rank, call):
    """Make the other ranks wait for this one in some of the calls."""
    if call % RANKS == rank:
        time.sleep(LATE_S)


def bits(x):
    return x.view(np.uint16)


if __name__ == "__main__":
    sys.exit(main())
