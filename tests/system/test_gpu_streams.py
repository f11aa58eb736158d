"""Everything of a rank happens on its own stream: on the stand-in, where another stream's work comes late."""

import ast
from pathlib import Path

import numpy as np
import pytest
from on_gpu import model_on_gpu, run_on_gpus

import minitp
from minitp.check.run import check_model
from minitp.comm.single import SingleRank
from minitp.cuda.gpu import Gpu, open_gpu
from minitp.errors import RankError
from minitp.launch.transport import select_comm
from minitp.loading.source import open_model
from minitp.trace.record import passes_of

pytestmark = pytest.mark.usefixtures("cupy")

PROMPT = [3, 40, 60, 80, 15]
PACKAGE = Path(minitp.__file__).parent


# --- the stand-in ---------------------------------------------------------------------------------------


def test_a_copy_on_another_stream_comes_late(cupy):
    mine, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    source, target = cupy.ones(4, np.float32), cupy.zeros(4, np.float32)
    kind = cupy.cuda.runtime.memcpyDeviceToDevice
    with mine:
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, 16, kind, other.ptr)
        assert cupy.asnumpy(target).tolist() == [0] * 4
        event = cupy.cuda.Event()
        event.record(other)
        assert not event.done
        event.synchronize()
        assert cupy.asnumpy(target).tolist() == [1] * 4
        target.fill(0)
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, 16, kind, mine.ptr)
        assert cupy.asnumpy(target).tolist() == [1] * 4


def test_an_array_with_gaps_takes_the_stream_that_was_used_away(cupy):
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
        return check_model(source, model, PROMPT, passes_of(len(PROMPT), 1)).blamed()

    return [finding.step for finding in run_on_gpus(tp, rank)[0]]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_stream_that_is_only_used_is_lost_and_its_work_comes_late(tiny, cupy, monkeypatch, tp):
    """This is how the code once was: on a GPU `check` found garbage in steps that a copy or NCCL makes."""
    monkeypatch.setattr(Gpu, "to_host", lambda self, array: self.cupy.asnumpy(array))
    monkeypatch.setattr(cupy.cuda.Stream, "__enter__", cupy.cuda.Stream.use)
    assert {"embed", "attn.out"} <= {*blamed(tiny, tp)}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_with_block_inside_does_no_harm(tiny, cupy, monkeypatch, tp):
    to_host = Gpu.to_host

    def with_block(self, array):
        with cupy.cuda.Stream(non_blocking=True):
            pass
        return to_host(self, array)

    monkeypatch.setattr(Gpu, "to_host", with_block)
    assert blamed(tiny, tp) == []


@pytest.mark.parametrize("way", [Gpu.to_host, Gpu.from_host])
def test_another_current_stream_is_refused(cupy, way):
    gpu = open_gpu()
    array = cupy.ones(3, np.float32)
    way(gpu, array)
    cupy.cuda.Stream.null.use()
    with pytest.raises(
        RankError, match=r"current stream \(0x\w+\) is not this rank's \(0x\w+\).*`with` block"
    ):
        way(gpu, array)


def test_what_comes_to_the_host_waits_for_the_stream_and_has_no_gaps(cupy):
    gpu = select_comm(SingleRank(), "cuda").gpu
    array = cupy.arange(6, dtype=np.float32).reshape(2, 3)
    found = gpu.to_host(array.T)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3).T)
    assert cupy.cuda.get_current_stream() is gpu.stream


def test_there_is_one_way_to_the_host_and_no_other_stream():
    """`asnumpy`, `get`, `item` and `tolist` of a GPU's array copy on whatever stream is current."""
    found = []
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "tour.py"}:  # which stands alone
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in (
                "asnumpy",
                "Stream",
                "ExternalStream",
                "use",
            ):
                found.append((path.relative_to(PACKAGE).as_posix(), node.attr))
    # `use` is the device's.
    assert sorted(found) == [("cuda/gpu.py", "Stream"), ("cuda/gpu.py", "asnumpy"), ("cuda/gpu.py", "use")]


@pytest.mark.parametrize("turned", [float, int, bool, lambda x: x.item(), lambda x: x.tolist()])
def test_the_stand_in_has_no_second_way(cupy, turned):
    with pytest.raises(TypeError, match="use to_host"):
        turned(cupy.ones(1, np.float32))
