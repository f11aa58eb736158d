"""Tests of collectives on GPUs: the calls to NCCL, and that no rank waits forever for a missing one."""

import os
import re
import threading
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from on_gpu import run_on_gpus

from minitp.comm import run_threads
from minitp.comm.single import ShardOnly, SingleRank
from minitp.comm.threads import ThreadComm
from minitp.errors import AgreedError, InputError, RankError
from minitp.launch.transport import select_comm

pytestmark = pytest.mark.usefixtures("cupy")

DTYPES = {"float16": 6, "float32": 7, "bfloat16": 9, "int32": 2}  # NCCL's numbers
RANKS = 4
PATIENCE_S = 0.5
SOON_S = 5  # time limit for work that takes a second, even on a busy machine


def numbers(dtype, rank, shape):
    """Return random numbers of a rank; 16-bit sums over four ranks are rounded."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return (np.random.default_rng(rank).standard_normal(shape) * 10).astype(kind)


def nccl_ranks(function, ranks=RANKS, patience_s=PATIENCE_S, close=True):
    """Run function(NcclComm) on `ranks` threads; return the result or the error of each."""
    from minitp.cuda.gpu import open_gpu
    from minitp.cuda.nccl import NcclComm

    def rank(host):
        comm = None
        try:
            comm = NcclComm(host, open_gpu(host.rank), patience_s)
            result = function(comm)
            if close:
                comm.close()
            return result
        except Exception as error:
            return error
        finally:
            if comm is not None:
                comm._watchdog.stop()

    return run_threads(ranks, rank)


def this_rank():
    return int(threading.current_thread().name.removeprefix("rank "))


# --- calls to NCCL --------------------------------------------------------------------------------------


def test_calls_in_order():
    def rank(comm):
        gpu = comm.gpu
        comm.all_reduce(gpu.from_host(numbers("float16", comm.rank, (3, 5))))
        comm.all_gather(gpu.from_host(numbers("float32", comm.rank, (2, 1 + comm.rank))), [1, 2, 3, 4])
        comm.all_reduce(gpu.from_host(numbers("bfloat16", comm.rank, (8,))))
        comm.broadcast("objects go through the hosts")
        comm.allgather_object(comm.rank)
        return comm._communicator.calls

    expected = [("allReduce", 15, 6), ("allGather", 2 * 4, 7), ("allReduce", 8, 9)]
    assert nccl_ranks(rank) == [expected] * RANKS


@pytest.mark.parametrize("transport", ["nccl", "mpi"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_give_the_same_results_as_on_the_hosts(dtype, transport):
    """Compare the bits, because the stand-in sums like the hosts. Parts are uneven, and one is empty."""
    widths = [3, 0, 2, 1]

    def on_host(comm):
        x = numbers(dtype, comm.rank, (3, 6))
        return comm.all_reduce(x), comm.all_gather(x[:, : widths[comm.rank]], widths)

    def on_gpu(comm):
        x = comm.gpu.from_host(numbers(dtype, comm.rank, (3, 6)))
        found = comm.all_reduce(x), comm.all_gather(x[:, : widths[comm.rank]], widths)
        assert all(isinstance(array, comm.gpu.cupy.ndarray) for array in found)
        assert comm.seconds > 0
        return [comm.gpu.to_host(array) for array in found]

    expected = run_threads(RANKS, on_host)
    for found in run_on_gpus(RANKS, on_gpu, transport):
        for array, on_cpu in zip(found, expected[0], strict=True):
            assert array.dtype == on_cpu.dtype
            assert (array == on_cpu).all()


@pytest.mark.parametrize("transport", ["nccl", "mpi"])
def test_an_array_with_gaps(transport):
    def rank(comm):
        x = comm.gpu.from_host(np.arange(12, dtype=np.float32).reshape(3, 4))
        return comm.gpu.to_host(comm.all_reduce(x[:, ::2])).tolist()

    assert run_on_gpus(2, rank, transport) == [[[0, 4], [8, 12], [16, 20]]] * 2


def test_each_rank_has_its_own_stream_and_gpu():
    def rank(comm):
        assert comm.gpu.stream.non_blocking
        return comm._communicator.device_id(), comm.gpu.stream.ptr

    devices, streams = zip(*run_on_gpus(RANKS, rank), strict=True)
    assert devices == (0, 1, 2, 3)
    assert len(set(streams)) == RANKS


@pytest.mark.parametrize("host", [SingleRank(), ShardOnly(0, 4), ShardOnly(2, 4)])
def test_a_rank_without_others(host):
    """Check that a single shard of several uses its own part in place of the other ranks'."""
    comm = select_comm(host, "cuda")
    x = comm.gpu.from_host(np.ones((2, 3), np.float16))
    assert (comm.rank, comm.size, comm.shard_rank) == (0, host.size, host.shard_rank)
    assert comm.gpu.to_host(comm.all_reduce(x)).tolist() == [[1] * 3] * 2
    assert comm.all_gather(x, [3] * comm.size).shape == (2, 3 * comm.size)
    comm.close()


# --- starting -------------------------------------------------------------------------------------------


def test_no_unique_id(cupy, monkeypatch):
    def fail():
        raise cupy.cuda.nccl.NcclError(2, "NCCL_ERROR_SYSTEM_ERROR: no network")

    monkeypatch.setattr(cupy.cuda.nccl, "get_unique_id", fail)
    for error in nccl_ranks(lambda comm: None):
        assert isinstance(error, AgreedError)
        assert error.exit_code == 3
        assert str(error) == "rank 0 failed: NcclError: NCCL_ERROR_SYSTEM_ERROR: no network"


def test_one_rank_has_no_nccl(cupy, monkeypatch):
    version = cupy.cuda.nccl.get_version

    def missing():
        if this_rank() == 3:
            raise ImportError("libnccl.so.2: cannot open shared object file")
        return version()

    monkeypatch.setattr(cupy.cuda.nccl, "get_version", missing)
    for error in nccl_ranks(lambda comm: None):
        assert isinstance(error, AgreedError)
        assert str(error).startswith("rank 3 failed: NCCL is missing (ImportError: libnccl.so.2: cannot open")
        assert "--comm mpi" in str(error)


def joining(cupy, monkeypatch, fail):
    """Make rank 1 call `fail` instead of creating its communicator, and the others wait for the job's end."""
    ended, aborted, abort = threading.Event(), [], ThreadComm.abort

    def end(comm, exit_code):
        aborted.append((comm.rank, exit_code))
        ended.set()
        abort(comm, exit_code)

    def join(size, unique_id, rank):
        if rank == 1:
            fail(ended)
        assert ended.wait(SOON_S)
        raise cupy.cuda.nccl.NcclError(3, "the process ends")

    monkeypatch.setattr(ThreadComm, "abort", end)
    monkeypatch.setattr(cupy.cuda.nccl, "NcclCommunicator", join)
    return aborted


def test_a_communicator_that_fails_on_one_rank_ends_the_job(cupy, monkeypatch):
    """Check that the failing rank does not try to agree with the others, which are stuck inside NCCL."""
    from minitp.cuda.gpu import open_gpu
    from minitp.cuda.nccl import NcclComm

    def fail(ended):
        raise cupy.cuda.nccl.NcclError(2, "NCCL_ERROR_SYSTEM_ERROR: no memory")

    failed = []

    def rank(host):
        try:
            NcclComm(host, open_gpu(host.rank))
        except RankError as error:
            failed.append((host.rank, str(error)))
            raise

    aborted = joining(cupy, monkeypatch, fail)
    with pytest.raises(RankError):
        run_threads(RANKS, rank)
    assert failed[0] == (1, "NCCL failed to start: NcclError: NCCL_ERROR_SYSTEM_ERROR: no memory")
    assert aborted[0] == (1, 3)


def test_a_rank_that_does_not_start_nccl_is_named(cupy, monkeypatch, capsys):
    monkeypatch.setattr("minitp.cuda.nccl.START_S", PATIENCE_S)
    aborted = joining(cupy, monkeypatch, lambda ended: ended.wait(SOON_S))
    from minitp.cuda import nccl

    shared_counts = nccl.shared_counts

    def counts(host):
        """Return the shared counts, but separate ones for rank 1, so that it appears to be missing."""
        found = shared_counts(host)
        return np.ones(RANKS, np.int64) if host.rank == 1 else found

    monkeypatch.setattr(nccl, "shared_counts", counts)
    assert all(isinstance(error, RankError) for error in nccl_ranks(lambda comm: None))
    assert aborted[0][1] == RankError.exit_code
    said = r"minitp: rank [023] failed: NCCL did not start within 0\.5 s: rank 1 did not arrive\n"
    assert re.search(said, capsys.readouterr().err), "the first rank that gives up ends the job"


# --- failures during collectives ------------------------------------------------------------------------


def all_reduce(comm):
    return comm.all_reduce(comm.gpu.from_host(np.ones(8, np.float16)))


def test_a_missing_rank_is_named(cupy):
    """Check that the other ranks return from NCCL and name the rank that they waited for."""
    others_are_out = threading.Barrier(RANKS)

    def rank(comm):
        all_reduce(comm)
        comm.allgather_object(None)
        try:
            if comm.rank != 2:
                all_reduce(comm)
        finally:
            others_are_out.wait(SOON_S)

    started = time.monotonic()
    found = nccl_ranks(rank, close=False)
    assert time.monotonic() - started < SOON_S
    assert found[2] is None
    for number in (0, 1, 3):
        assert isinstance(found[number], RankError)
        assert str(found[number]) == "stuck in a collective for 0.5 s: rank 2 did not arrive"


def test_a_host_that_waits_for_its_gpu_learns_of_the_error(cupy, monkeypatch):
    """Simulate a GPU that never finishes the work launched on it."""
    monkeypatch.setattr(cupy.cuda.Event, "done", False)

    def rank(comm):
        if comm.rank == 0:
            comm._watchdog._launches[0] += 1  # as if rank 1 were late
        all_reduce(comm)
        comm.check()
        deadline = time.monotonic() + SOON_S
        while time.monotonic() < deadline:
            comm.check()
            time.sleep(0.01)

    found = nccl_ranks(rank, ranks=2, close=False)
    assert str(found[0]) == "stuck in a collective for 0.5 s: rank 1 did not arrive"
    assert str(found[1]) == "stuck in a collective for 0.5 s: no rank is known to be missing"


def test_a_rank_that_does_not_wake_up_is_ended(cupy, monkeypatch, capsys):
    """Simulate a rank that waits for its GPU in C code, where no exception reaches it."""
    monkeypatch.setattr("minitp.cuda.nccl.LAST_RESORT_S", 0.1)
    monkeypatch.setattr(cupy.cuda.Event, "done", False)
    ended = threading.Event()
    monkeypatch.setattr(ThreadComm, "abort", lambda comm, exit_code: ended.set())

    def rank(comm):
        all_reduce(comm)
        assert ended.wait(SOON_S)

    nccl_ranks(rank, ranks=2, close=False)
    assert "failed: stuck in a collective for 0.5 s" in capsys.readouterr().err


def test_slow_is_not_stuck():
    """Check that hosts may pause between launches, and that a rank may be late by less than the limit."""

    def rank(comm):
        all_reduce(comm)
        time.sleep(1.5 if comm.rank == 0 else 1.7)
        return comm.gpu.to_host(all_reduce(comm)).tolist()

    assert nccl_ranks(rank, ranks=2, patience_s=1) == [[2.0] * 8] * 2


def test_an_error_inside_a_call(cupy, monkeypatch):
    def fail(self, *args):
        raise cupy.cuda.nccl.NcclError(1, "NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error")

    monkeypatch.setattr(cupy.cuda.nccl.NcclCommunicator, "allReduce", fail)
    for error in nccl_ranks(all_reduce, close=False):
        assert isinstance(error, RankError)
        expected = (
            "NCCL's all-reduce failed: NcclError: NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error"
        )
        assert str(error) == expected


def test_an_error_that_only_the_watchdog_sees(cupy, monkeypatch):
    def fail(self):
        raise cupy.cuda.nccl.NcclError(6, "NCCL_ERROR_REMOTE_ERROR: remote process exited")

    def rank(comm):
        comm.allgather_object(None)
        monkeypatch.setattr(cupy.cuda.nccl.NcclCommunicator, "check_async_error", fail)
        comm._watchdog._thread.join(SOON_S)
        comm.allgather_object(None)
        all_reduce(comm)

    monkeypatch.setattr("minitp.cuda.nccl.LAST_RESORT_S", 0.1)
    monkeypatch.setattr(ThreadComm, "abort", lambda comm, exit_code: None)
    for error in nccl_ranks(rank, ranks=2, close=False):
        assert isinstance(error, RankError)
        assert str(error) == "NCCL: NcclError: NCCL_ERROR_REMOTE_ERROR: remote process exited"


def test_different_calls_of_ranks_are_an_error():
    def rank(comm):
        return comm.all_reduce(comm.gpu.from_host(np.ones(8 + comm.rank, np.float16)))

    for error in nccl_ranks(rank, close=False):
        assert isinstance(error, RankError)
        assert "ranks make different calls" in str(error)


# --- closing --------------------------------------------------------------------------------------------


def test_close_destroys_the_communicator_and_stops_the_watchdog(cupy, monkeypatch):
    destroyed, destroy = [], cupy.cuda.nccl.NcclCommunicator.destroy
    monkeypatch.setattr(
        cupy.cuda.nccl.NcclCommunicator, "destroy", lambda self: destroyed.append(destroy(self))
    )
    watching = nccl_ranks(lambda comm: comm._watchdog._thread)
    assert len(destroyed) == RANKS
    for thread in watching:
        thread.join(SOON_S)
        assert not thread.is_alive()


def test_abort_releases_the_other_ranks(cupy):
    """Check that a failing rank aborts its communicator, for which the other GPUs would wait."""

    def rank(comm):
        if comm.rank == 1:
            with pytest.raises(ZeroDivisionError):
                comm.agree(1 / 0)
            comm.host.abort = lambda exit_code: None
            comm.abort(3)
            return comm
        return all_reduce(comm)

    found = nccl_ranks(rank, ranks=3, patience_s=SOON_S, close=False)
    assert [type(error).__name__ for error in found] == ["RankError", "NcclComm", "RankError"]
    assert "NCCL's all-reduce failed: NcclError: NCCL_ERROR_REMOTE_ERROR" in str(found[0])


# --- counts of launches ---------------------------------------------------------------------------------


def test_counts_are_shared_by_all_ranks_of_a_host():
    from minitp.cuda.nccl import shared_counts

    def rank(comm):
        counts = shared_counts(comm)
        counts[comm.rank] = 10 + comm.rank
        comm.allgather_object(None)
        return counts.tolist(), counts.filename

    found = run_threads(3, rank)
    assert [counts for counts, _ in found] == [[10, 11, 12]] * 3
    assert not os.path.exists(found[0][1]), "the file has been deleted"


def test_ranks_on_other_hosts_are_never_reported_as_late(monkeypatch):
    from minitp.cuda.nccl import shared_counts

    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: this_rank() < 2 and exists(path))

    def rank(comm):
        counts = shared_counts(comm)
        counts[comm.rank] += 1
        return [number for number, count in enumerate(counts) if count < counts[comm.rank]], counts[comm.rank]

    assert run_threads(RANKS, rank) == [([], 1)] * RANKS


# --- the choice of a transport --------------------------------------------------------------------------


def chosen(ranks, transport="auto", share_gpu=False):
    """Return the name of the Comm class that each rank gets."""

    def rank(host):
        comm = select_comm(host, "cuda", transport, share_gpu)
        all_reduce(comm)
        comm.close()
        return type(comm).__name__

    return run_threads(ranks, rank)


@pytest.mark.parametrize(
    ("transport", "ranks", "expected"),
    [
        ("auto", 1, "LocalComm"),
        ("nccl", 1, "LocalComm"),
        ("auto", 2, "PeerComm"),
        ("peer", 2, "PeerComm"),
        ("nccl", 2, "NcclComm"),
        ("mpi", 2, "StagedComm"),
        ("shm", 2, "StagedComm"),
    ],
)
def test_the_choice_of_a_comm(transport, ranks, expected):
    assert chosen(ranks, transport) == [expected] * ranks


class Peer:
    """A stand-in for AllReduce, whose kernels wait for each other and cannot run in threads."""

    def __init__(self, compiler, rank, *_):
        self.rank = rank

    def __call__(self, partial, out):
        pass


def slow(function, run=lambda work: work()):
    """Return the function, delayed on rank 1; `run` is cupy.cuda.run if a graph must contain the delay."""

    def call(self, *args):
        run(lambda: time.sleep(0.01 if this_rank() == 1 else 0))
        return function(self, *args)

    return call


@pytest.fixture
def choices(cupy, monkeypatch):
    """A function that returns (transport, TransportChoice, class in use) of each rank with --comm auto."""
    monkeypatch.setattr("minitp.cuda.peer.AllReduce", Peer)

    def find(ranks=2, transport="auto"):
        from minitp.cuda.compiler import Compiler

        def rank(host):
            comm = select_comm(host, "cuda", transport)
            used = comm.reserve(Compiler(cupy, np.dtype(np.float16)), 32)
            x = comm.gpu.from_host(np.ones((1, 32), np.float16))
            if used.transport != "peer":  # whose stand-in adds nothing
                assert comm.gpu.to_host(used.all_reduce(x)).tolist() == [[ranks] * 32]
            comm.close()
            return used.transport, used.choice, type(used).__name__

        return run_threads(ranks, rank)

    return find


@pytest.mark.parametrize(
    ("slowed", "expected", "kind"),
    [("host", "peer", "PeerComm"), ("peer", "nccl", "PeerComm"), ("peer nccl", "threads", "StagedComm")],
)
def test_auto_takes_the_fastest_transport(cupy, monkeypatch, choices, slowed, expected, kind):
    """Check that a transport that is slow on a single rank is not chosen, and that all ranks agree."""
    if "peer" in slowed:
        monkeypatch.setattr(Peer, "__call__", slow(Peer.__call__, cupy.cuda.run))
    if "nccl" in slowed:
        reduce = cupy.cuda.nccl.NcclCommunicator.allReduce
        monkeypatch.setattr(cupy.cuda.nccl.NcclCommunicator, "allReduce", slow(reduce, cupy.cuda.run))
    if slowed == "host":
        monkeypatch.setattr(ThreadComm, "all_reduce", slow(ThreadComm.all_reduce))
    found = choices()
    assert [(transport, name) for transport, _, name in found] == [(expected, kind)] * 2
    first, second = (choice for _, choice, _ in found)
    assert first == second
    assert list(first.seconds) == ["peer", "nccl", "threads"]
    assert first.name == expected
    assert not first.failed


def test_a_transport_that_is_named_is_not_measured(choices, monkeypatch):
    monkeypatch.setattr("minitp.cuda.nccl.choose", None)
    for transport, name in (("peer", "PeerComm"), ("nccl", "NcclComm"), ("mpi", "StagedComm")):
        assert [(choice, kind) for _, choice, kind in choices(transport=transport)] == [(None, name)] * 2


def test_auto_does_not_take_what_fails(cupy, monkeypatch, choices, capsys):
    """Check peer memory that cannot be opened on one rank, and then an NCCL without all-reduces."""

    def fail(*_):
        raise RuntimeError("cudaErrorMapBufferObjectFailed: no memory")

    right = cupy.cuda.runtime.ipcOpenMemHandle
    fails_on_rank_1 = lambda handle: fail() if this_rank() == 1 else right(handle)  # noqa: E731
    monkeypatch.setattr(cupy.cuda.runtime, "ipcOpenMemHandle", fails_on_rank_1)
    failure = "rank 1 failed: RuntimeError: cudaErrorMapBufferObjectFailed: no memory"
    monkeypatch.setattr(ThreadComm, "all_reduce", slow(ThreadComm.all_reduce))
    for _, choice, _ in choices():
        assert (choice.name, choice.failed) == ("nccl", {"peer": failure})
    said = f"minitp: warning: --comm auto: peer failed ({failure}); using nccl\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(cupy.cuda.nccl.NcclCommunicator, "allReduce", fail)
    for transport, choice, kind in choices():
        assert (transport, kind, list(choice.failed)) == ("threads", "StagedComm", ["peer", "nccl"])


def test_auto_without_nccl(cupy, monkeypatch, choices, capsys):
    def missing():
        raise ImportError("libnccl.so.2: cannot open shared object file")

    monkeypatch.setattr(cupy.cuda.nccl, "get_version", missing)
    for transport, choice, kind in choices():
        assert (transport, kind, list(choice.failed)) == ("threads", "StagedComm", ["nccl"])
        assert choice.words().startswith("--comm auto: threads (not measured; nccl failed: rank 0 failed: ")
    assert (
        capsys.readouterr().err.count("warning: --comm auto: nccl failed (rank 0 failed: NCCL is miss") == 1
    )
    with pytest.raises(AgreedError, match="NCCL is missing"):
        choices(transport="nccl")


def test_the_choice_in_words_and_for_json(choices, monkeypatch, capsys):
    from minitp.launch.transport import tell_choice, transport_of

    monkeypatch.setattr(ThreadComm, "all_reduce", slow(ThreadComm.all_reduce))
    _, choice, _ = choices()[0]
    comm = SimpleNamespace(rank=0, transport="peer", choice=choice)
    found = transport_of(comm)
    assert (found["name"], found["all_reduce_bytes"], found["failed"]) == ("peer", 64, {})
    assert list(found["all_reduce_us"]) == ["peer", "nccl", "threads"]
    for verbose in (False, True):
        tell_choice(comm, verbose)
    time_us = r"[0-9.]+ µs"
    said = rf"minitp: --comm auto: peer \(64 bytes take {time_us}; nccl: {time_us}; threads: {time_us}\)\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    alone = {"name": None, "all_reduce_bytes": None, "all_reduce_us": {}, "failed": {}}
    assert transport_of(SingleRank()) == alone


def test_gpus_that_cannot_read_each_others_memory(monkeypatch):
    monkeypatch.setenv("STAND_IN_PEERS", "0")
    assert chosen(2) == ["NcclComm"] * 2
    with pytest.raises(AgreedError, match="--comm peer: the GPUs cannot all read each other's memory"):
        chosen(2, "peer")


@pytest.mark.parametrize(("version", "expected"), [(22900, "StagedComm"), (23000, "NcclComm")])
def test_ranks_that_share_a_gpu(cupy, monkeypatch, capfd, version, expected):
    """Check that NCCL is used from version 2.30 on."""
    monkeypatch.setenv("STAND_IN_GPUS", "2")
    monkeypatch.setattr(cupy.cuda.nccl, "get_version", lambda: version)
    for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_MAX_CTAS"):
        monkeypatch.setenv(name, "")
    assert chosen(3, share_gpu=True) == [expected] * 3
    assert (
        capfd.readouterr().err.count("minitp: warning: several ranks share a GPU: results are correct") == 1
    )
    assert chosen(3, "mpi", share_gpu=True) == ["StagedComm"] * 3
    if version < 23000:
        with pytest.raises(
            AgreedError, match=r"--comm nccl: several ranks can share a GPU only with NCCL 2.30"
        ):
            chosen(3, "nccl", share_gpu=True)
    assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == ("1" if version == 23000 else "")


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setenv("STAND_IN_GPUS", "2")
    with pytest.raises(
        AgreedError, match="rank 2 of this host has no GPU: there are only 2; use at most 2 ranks"
    ) as raised:
        chosen(4)
    assert raised.value.exit_code == InputError.exit_code
