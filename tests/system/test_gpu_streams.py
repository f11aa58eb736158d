"""Tests that a rank uses only its own stream, on the stand-in, which delays work on any other stream."""

import ast
import weakref
from pathlib import Path

import numpy as np
import pytest
from on_gpu import model_on_gpu, run_on_gpus

import minitp
from minitp.check.run import check_model
from minitp.comm.single import SingleRank
from minitp.cuda.gpu import Gpu, open_gpu
from minitp.engine.engine import Engine
from minitp.errors import RankError
from minitp.generate import generate
from minitp.launch.transport import select_comm
from minitp.loading.source import open_model
from minitp.request import Request
from minitp.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("cupy")

PROMPT = [3, 40, 60, 80, 15]
PACKAGE = Path(minitp.__file__).parent


# --- the stand-in ---------------------------------------------------------------------------------------


def test_a_copy_on_another_stream_is_delayed(cupy):
    own, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    source, target = cupy.ones(4, np.float32), cupy.zeros(4, np.float32)
    kind = cupy.cuda.runtime.memcpyDeviceToDevice
    with own:
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, 16, kind, other.ptr)
        assert cupy.asnumpy(target).tolist() == [0] * 4
        event = cupy.cuda.Event()
        event.record(other)
        assert not event.done
        event.synchronize()
        assert cupy.asnumpy(target).tolist() == [1] * 4
        target.fill(0)
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, 16, kind, own.ptr)
        assert cupy.asnumpy(target).tolist() == [1] * 4


def test_copying_an_array_with_gaps_resets_a_stream_set_by_use(cupy):
    own, array = cupy.cuda.Stream(non_blocking=True), cupy.ones((2, 3), np.float32)
    with own:
        cupy.asnumpy(array.T)
        assert cupy.cuda.get_current_stream() is own
    own.use()
    cupy.asnumpy(array)
    assert cupy.cuda.get_current_stream() is own
    cupy.asnumpy(array.T)
    assert cupy.cuda.get_current_stream() is cupy.cuda.Stream.null


# --- the code -------------------------------------------------------------------------------------------


def blamed(directory, tp):
    source = open_model(str(directory), tp)

    def rank(comm):
        model = model_on_gpu(directory, comm, "float32")
        return check_model(source, model, PROMPT, 1).blamed()

    return [finding.step for finding in run_on_gpus(tp, rank)[0]]


@pytest.mark.parametrize("tp", [1, 2])
def test_check_finds_the_errors_of_a_stream_set_by_use(tiny, cupy, monkeypatch, tp):
    """Check for an earlier bug: steps made by a copy or by NCCL contained garbage on a GPU."""
    monkeypatch.setattr(Gpu, "to_host", lambda self, array: self.cupy.asnumpy(array))
    monkeypatch.setattr(cupy.cuda.Stream, "__enter__", cupy.cuda.Stream.use)
    assert {"embed", "attn.out"} <= {*blamed(tiny, tp)}


@pytest.mark.parametrize("tp", [1, 2])
def test_an_inner_with_block_does_no_harm(tiny, cupy, monkeypatch, tp):
    to_host = Gpu.to_host

    def with_block(self, array):
        with cupy.cuda.Stream(non_blocking=True):
            pass
        return to_host(self, array)

    monkeypatch.setattr(Gpu, "to_host", with_block)
    assert blamed(tiny, tp) == []


@pytest.mark.parametrize("way", [Gpu.to_host, Gpu.from_host])
def test_another_current_stream_is_rejected(cupy, way):
    gpu = open_gpu()
    array = cupy.ones(3, np.float32)
    way(gpu, array)
    cupy.cuda.Stream.null.use()
    with pytest.raises(
        RankError, match=r"current stream \(0x\w+\) is not this rank's \(0x\w+\).*`with` block"
    ):
        way(gpu, array)


def test_to_host_waits_for_the_stream_and_returns_a_contiguous_array(cupy):
    gpu = select_comm(SingleRank(), "cuda").gpu
    array = cupy.arange(6, dtype=np.float32).reshape(2, 3)
    found = gpu.to_host(array.T)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3).T)
    assert cupy.cuda.get_current_stream() is gpu.stream


def test_only_gpu_py_copies_to_the_host_and_creates_a_stream():
    """Check the package's source, because `asnumpy` and the like copy on whatever stream is current."""
    found = []
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "tour.py"}:  # tour.py stands alone
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if name in ("asnumpy", "Stream", "ExternalStream", "use"):
                found.append((path.relative_to(PACKAGE).as_posix(), name))
    # This `use` is Device.use.
    assert sorted(found) == [("cuda/gpu.py", "Stream"), ("cuda/gpu.py", "asnumpy"), ("cuda/gpu.py", "use")]


@pytest.mark.parametrize("convert", [float, int, bool, lambda x: x.item(), lambda x: x.tolist()])
def test_the_stand_in_rejects_other_conversions(cupy, convert):
    with pytest.raises(TypeError, match="call to_host first"):
        convert(cupy.ones(1, np.float32))


# --- pinned memory --------------------------------------------------------------------------------------


class PinnedMemory:
    """A watch over pinned arrays: which are freed before the host has waited for the copies that use them.

    CuPy would reuse their memory for other copies.
    """

    def __init__(self, cupy, monkeypatch):
        import cupyx

        self._empty, self._copy = cupyx.empty_pinned, cupy.cuda.runtime.memcpyAsync
        self._last = {}  # address -> number of its last copy
        self._copies = self._waited = self.allocated = self.freed_early = 0
        monkeypatch.setattr(cupyx, "empty_pinned", self._empty_pinned)
        monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", self._memcpy)
        monkeypatch.setattr(cupy.cuda.Event, "record", lambda event, stream: self._record(event))
        monkeypatch.setattr(cupy.cuda.Event, "synchronize", lambda event: self._synchronize(event))

    def _empty_pinned(self, shape, dtype):
        array = self._empty(shape, dtype)
        self.allocated += 1
        self._last[array.ctypes.data] = 0
        weakref.finalize(array, self._freed, array.ctypes.data)
        return array

    def _freed(self, address):
        self.freed_early += self._last.pop(address) > self._waited

    def _memcpy(self, target, source, nbytes, kind, stream):
        self._copies += 1
        for address in {target, source} & set(self._last):
            self._last[address] = self._copies
        self._copy(target, source, nbytes, kind, stream)

    def _record(self, event):
        event.copies = self._copies

    def _synchronize(self, event):
        self._waited = max(self._waited, getattr(event, "copies", 0))


@pytest.fixture
def pinned(cupy, monkeypatch, tiny):
    """A model on a GPU, and a watch over the pinned memory that it uses."""
    model = model_on_gpu(tiny, select_comm(SingleRank(), "cuda"), "float16", path="fused")
    return model, PinnedMemory(cupy, monkeypatch)


def test_the_token_after_a_stop_token_keeps_its_memory(pinned):
    model, memory = pinned
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    tokens = generate(model, PROMPT, Request(params, (), PROMPT, 64))
    for _ in range(4):
        next(tokens)
    tokens.close()
    assert memory.allocated > 2
    assert memory.freed_early == 0


def test_a_batch_without_logits_keeps_its_memory(pinned):
    """Let a chunk of one token, in the middle of a prompt, be a batch."""
    model, memory = pinned
    engine = Engine(model, 20, max_tokens_per_step=1)
    engine.add(Request(SamplingParams(max_new_tokens=2, ignore_eos=True), (), PROMPT, 64))
    engine.run()
    assert memory.allocated > len(PROMPT)
    assert memory.freed_early == 0
