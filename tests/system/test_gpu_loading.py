"""Tests of loading weights to a GPU: correct numbers, in the layout of the kernels, and no extra memory."""

import os
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from gguf_files import write_gguf
from on_gpu import model_on_gpu, run_on_gpus
from paths import GOLDENS
from safetensors.numpy import load_file, save_file
from tiny import UNEVEN, write_tiny

from minitp.cuda.gpu import with_dtype
from minitp.cuda.loader import PACK, GpuLoader, padded
from minitp.cuda.uploads import BUFFERS, READERS
from minitp.device import open_device
from minitp.errors import InputError
from minitp.loading.checkpoint import Checkpoint
from minitp.loading.file_bytes import FileBytes
from minitp.loading.random_weights import RandomWeights
from minitp.loading.source import open_model
from minitp.loading.weights import LAYER_PARTS, LM_HEAD, Loader, named_slices, shard_nbytes

pytestmark = pytest.mark.usefixtures("cupy")

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
MODELS = {
    "plain": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def write_model(directory, dtype="float32", **fields):
    write_tiny(directory, tokenizer=False, **{**UNEVEN, **fields})
    path = directory / "model.safetensors"
    save_file({name: x.astype(DTYPES[dtype]) for name, x in load_file(path).items()}, path)
    return directory


def on_cpu(directory, tp, rank, dtype):
    """Load a rank's Weights with the explicit loader."""
    source = open_model(str(directory), tp)
    return Loader(source.plan, rank, source.tensors, open_device(dtype)).load()


def arrays_of(weights):
    """Return all arrays of some Weights by name."""
    layers = {
        f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(weights.layers) for name in LAYER_PARTS
    }
    return {"embed": weights.embed, "lm_head": weights.lm_head, "final_norm": weights.final_norm, **layers}


def checked(comm, directory, dtype):
    """Load a rank's Weights, check that they equal the explicit loader's, and return them."""
    model = model_on_gpu(directory, comm, dtype, path="explicit")
    found, expected = arrays_of(model.weights), arrays_of(on_cpu(directory, comm.size, comm.rank, dtype))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array is None:
            assert found[name] is None
            continue
        assert isinstance(found[name], comm.gpu.cupy.ndarray), name
        assert found[name].dtype == array.dtype == DTYPES[dtype]
        assert found[name].shape == array.shape
        assert (np.asarray(found[name]) == array).all(), name
    return model.weights


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_weights_equal_those_of_the_explicit_loader(tmp_path, name, dtype, stored):
    directory = write_model(tmp_path / "model", stored, **MODELS[name])
    for tp in (1, 4):
        run_on_gpus(tp, lambda comm: checked(comm, directory, dtype))


def test_rows_have_the_layout_of_the_kernels(tmp_path):
    """Check that each projection's rows, [out, in], begin at multiples of 16 bytes and end in zeros."""
    directory = write_model(tmp_path / "model")

    def rank(comm):
        weights = checked(comm, directory, "float16")
        for name, w in arrays_of(weights).items():
            if w is None or w.ndim == 1:
                continue
            rows = w if name == "embed" else w.T  # [out, in]
            out, width = rows.shape
            assert rows.strides == (2 * padded(width), 2)
            assert padded(width) % PACK == 0
            assert rows.data.ptr % 16 == 0
            whole = comm.gpu.cupy.lib.stride_tricks.as_strided(rows, (out, padded(width)), rows.strides)
            assert (np.asarray(whole)[:, width:] == 0).all(), name
        return weights.layers[0].w_down.shape[0]

    assert run_on_gpus(4, rank) == [10, 9, 9, 9], "each rank's share of 37 columns"


def test_tied_embeddings_are_one_array(tmp_path):
    directory = write_model(tmp_path / "model", **MODELS["tied"])

    def rank(comm):
        weights = checked(comm, directory, "bfloat16")
        return weights.embed.data.ptr == weights.lm_head.data.ptr

    assert run_on_gpus(3, rank) == [True] * 3


def test_progress_adds_up_to_all_bytes(tmp_path):
    directory, seen = write_model(tmp_path / "model", **MODELS["biased"]), []

    def rank(comm):
        model = model_on_gpu(directory, comm, "float16", progress=seen.append)
        source = open_model(str(directory), comm.size)
        return model.weights.nbytes, shard_nbytes(source.plan, comm.rank, model.device)

    ((nbytes, shard),) = run_on_gpus(1, rank)
    assert nbytes == shard
    assert 0.9 * nbytes < sum(seen) <= nbytes, "norms and biases are not reported"


# --- memory and copies ----------------------------------------------------------------------------------


class Watched:
    """A record of copies from pinned memory, allocations on the GPU, and arrays uploaded directly."""

    def __init__(self, cupy, monkeypatch):
        self.copies, self.allocated, self.uploaded = [], [], []
        memcpy, memory, asarray = cupy.cuda.runtime.memcpyAsync, cupy._memory, cupy.asarray

        def copy(dst, src, nbytes, kind, stream):
            self.copies.append((src, nbytes, kind))
            memcpy(dst, src, nbytes, kind, stream)

        def allocate(nbytes):
            self.allocated.append(nbytes)
            return memory(nbytes)

        def upload(a, dtype=None):
            self.uploaded.append(np.asarray(a).nbytes)
            return asarray(a, dtype)

        monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", copy)
        monkeypatch.setattr(cupy, "_memory", allocate)
        monkeypatch.setattr(cupy, "asarray", upload)


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("float32", "float16")])
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_holds_nothing_but_the_shard(tmp_path, cupy, monkeypatch, name, stored, dtype):
    """Check that only the shard is ever allocated, with rows padded by less than 16 bytes, and no copies."""
    directory = write_model(tmp_path / "model", stored, **MODELS[name])

    def rank(comm):
        source = open_model(str(directory), comm.size)
        device = model_on_gpu(directory, comm, dtype).device
        watched = Watched(cupy, monkeypatch)
        weights = GpuLoader(source.plan, comm.rank, source.tensors, device).load()
        rows = sum(w.shape[1] for n, w in arrays_of(weights).items() if w is not None and w.ndim == 2)
        return weights.nbytes, rows, watched

    ((nbytes, rows, watched),) = run_on_gpus(1, rank)
    assert nbytes <= sum(watched.allocated) < nbytes + 16 * (rows + UNEVEN["vocab_size"])
    biases = 2 * padded((9 + 3 + 3) * 6)
    assert max(watched.uploaded) <= biases, "only vectors are uploaded without pinned memory"


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_copies_are_of_16_bits_and_from_pinned_memory(tmp_path, cupy, monkeypatch, stored, dtype):
    """Check that the buffers take turns, and that copies have the size of the rows in the GPU's dtype."""
    import cupyx

    buffers, pinned = [], cupyx.empty_pinned
    monkeypatch.setattr(cupyx, "empty_pinned", lambda *size: buffers.append(pinned(*size)) or buffers[-1])
    directory = write_model(tmp_path / "model", stored)

    def rank(comm):
        source = open_model(str(directory), comm.size)
        device = model_on_gpu(directory, comm, dtype).device
        buffers.clear()
        watched = Watched(cupy, monkeypatch)
        GpuLoader(source.plan, comm.rank, source.tensors, device).load()
        return watched.copies

    (copies,) = run_on_gpus(1, rank)
    starts = [buffer.ctypes.data for buffer in buffers]
    assert len(starts) == BUFFERS
    assert [src for src, _, _ in copies] == [starts[(n + 1) % BUFFERS] for n in range(len(copies))]
    assert {kind for _, _, kind in copies} == {cupy.cuda.runtime.memcpyHostToDevice}
    vectors = (1 + 2 * UNEVEN["num_hidden_layers"]) * 2 * UNEVEN["hidden_size"]
    names = open_model(str(directory), 1).plan.tensors.values()
    matrices = sum(2 * shard.shape[0] * padded(shard.shape[1]) for shard in names if len(shard.shape) == 2)
    assert sum(nbytes for _, nbytes, _ in copies) == matrices
    assert vectors > 0


@pytest.mark.parametrize("size", [1, 49, 100, 1000])
def test_slices_larger_than_a_buffer(tmp_path, monkeypatch, size):
    """Check slices that take several copies."""
    monkeypatch.setattr("minitp.cuda.uploads.PINNED_BYTES", max(size, 2 * padded(max(54, 37))))
    directory = write_model(tmp_path / "model", **MODELS["biased"])
    run_on_gpus(2, lambda comm: checked(comm, directory, "float16"))


def test_a_buffer_is_not_reused_before_its_copy_is_complete(tmp_path, cupy, monkeypatch):
    """Simulate a GPU that copies as late as possible: when an event or the stream is synchronized."""
    monkeypatch.setattr("minitp.cuda.uploads.PINNED_BYTES", 200)
    waiting, memcpy = [], cupy.cuda.runtime.memcpyAsync

    def do_all():
        while waiting:
            memcpy(*waiting.pop(0))

    monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", lambda *args: waiting.append(args))
    monkeypatch.setattr(cupy.cuda.Event, "record", lambda self, stream: setattr(self, "copies", len(waiting)))
    monkeypatch.setattr(cupy.cuda.Event, "copies", 0, raising=False)

    def synchronize(self):
        for _ in range(min(self.copies, len(waiting))):
            memcpy(*waiting.pop(0))

    monkeypatch.setattr(cupy.cuda.Event, "synchronize", synchronize)
    monkeypatch.setattr(cupy.cuda.Stream, "synchronize", lambda self: do_all())
    directory = write_model(tmp_path / "model")
    run_on_gpus(1, lambda comm: checked(comm, directory, "float16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_host_holds_at_most_one_slice(tmp_path, monkeypatch, dtype):
    """Check that the host allocates only the pinned buffers and the slice being read, in the file's dtype."""
    monkeypatch.setattr("minitp.cuda.uploads.PINNED_BYTES", 1 << 12)
    directory = write_model(tmp_path / "model", "bfloat16", vocab_size=20_000)

    def rank(comm):
        source = open_model(str(directory), comm.size)
        device = model_on_gpu(directory, comm, dtype).device
        tracemalloc.start()
        GpuLoader(source.plan, comm.rank, source.tensors, device).load()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    slice_bytes = 2 * 20_000 * UNEVEN["hidden_size"]
    assert run_on_gpus(1, rank)[0] < 1.3 * slice_bytes


# --- readers --------------------------------------------------------------------------------------------


def load_alone(directory, gpu, tp=1, rank=0):
    """Load the Weights of one rank of `tp` in float16, without the other ranks."""
    source = open_model(str(directory), tp)
    return GpuLoader(source.plan, rank, source.tensors, with_dtype(gpu, "float16", None)).load()


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz")))
def test_every_golden_has_the_numbers_of_the_explicit_loader(name, monkeypatch):
    """Check all ranks of 1 to 4, with buffers of a few rows, so that several readers share a matrix."""
    monkeypatch.setattr("minitp.cuda.uploads.PINNED_BYTES", 1 << 10)

    def check(comm):
        for tp in (1, 2, 3, 4):
            plan = open_model(str(GOLDENS / name), tp).plan
            for rank in range(tp):
                found = named_slices(load_alone(GOLDENS / name, comm.gpu, tp, rank), plan, rank)
                expected = named_slices(on_cpu(GOLDENS / name, tp, rank, "float16"), plan, rank)
                for (tensor, array), (same, right) in zip(found, expected, strict=True):
                    assert tensor == same
                    assert np.array_equal(np.asarray(array).view(np.uint16), right.view(np.uint16)), tensor

    run_on_gpus(1, check)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "random"])
def test_other_sources_have_the_numbers_of_the_explicit_loader(tmp_path, monkeypatch, kind):
    """Check GGUF files, whose rows are dequantized or reordered, and random weights, in several buffers."""
    monkeypatch.setattr("minitp.cuda.uploads.PINNED_BYTES", 1 << 10)
    if kind == "random":
        plan = open_model(str(write_model(tmp_path / "model")), 3).plan
        tensors = RandomWeights({name: shard.shape for name, shard in plan.tensors.items()})
    else:
        write_gguf(tmp_path / "model.gguf", kind)
        source = open_model(str(tmp_path / "model.gguf"), 2)
        plan, tensors = source.plan, source.tensors

    def check(comm):
        gpu = with_dtype(comm.gpu, "float16", None)
        found = named_slices(GpuLoader(plan, 1, tensors, gpu).load(), plan, 1)
        expected = named_slices(Loader(plan, 1, tensors, open_device("float16")).load(), plan, 1)
        for (tensor, array), (_, right) in zip(found, expected, strict=True):
            assert np.array_equal(np.asarray(array), right), tensor

    run_on_gpus(1, check)


def test_whole_rows_in_the_dtype_of_the_gpu_are_read_straight_into_pinned_memory(tmp_path, monkeypatch):
    """Check that only the columns of row-parallel tensors, which lie scattered in the file, are viewed."""
    directory, viewed, view = (
        write_model(tmp_path / "model", "float16", hidden_size=16),
        set(),
        FileBytes.view,
    )
    starts = sorted(
        (info.start, name) for name, info in open_model(str(directory), 2).tensors.tensors.items()
    )

    def seen(self, start, nbytes):
        viewed.add([name for first, name in starts if first <= start][-1])
        return view(self, start, nbytes)

    monkeypatch.setattr(FileBytes, "view", seen)
    run_on_gpus(1, lambda comm: load_alone(directory, comm.gpu, 2))
    assert viewed == {name for _, name in starts if name.endswith(("o_proj.weight", "down_proj.weight"))}


def test_readers_work_at_the_same_time(tmp_path, monkeypatch):
    """Check that as many buffers as there are readers are filled before any of them is waited for."""
    monkeypatch.setattr("minitp.cuda.uploads.PINNED_BYTES", 1 << 9)
    directory, together, read_into = write_model(tmp_path / "model"), threading.Barrier(READERS), []
    read_into.append(Checkpoint.read_into)
    rows = (1 << 9) // (2 * padded(UNEVEN["hidden_size"]))  # per buffer

    def meet(self, name, index, out):
        if name == LM_HEAD and index[0].start < READERS * rows:
            together.wait(timeout=30)
        read_into[0](self, name, index, out)

    monkeypatch.setattr(Checkpoint, "read_into", meet)
    run_on_gpus(1, lambda comm: load_alone(directory, comm.gpu))
    assert not together.broken


@pytest.mark.parametrize("stored", ["float16", "float32"])
@pytest.mark.parametrize("left", ["some rows", "all matrices"])
def test_a_file_that_is_truncated_after_its_header_was_read(tmp_path, stored, left):
    """Check rows that are read, rows that are converted, and vectors."""
    directory = write_model(tmp_path / "model", stored, hidden_size=16)

    def rank(comm):
        source = open_model(str(directory), 1)
        starts = {name: info.start for name, info in source.tensors.tensors.items()}
        size = starts["lm_head.weight"] + 9 if left == "some rows" else starts["model.norm.weight"] + 9
        os.truncate(directory / "model.safetensors", size)
        GpuLoader(source.plan, 0, source.tensors, with_dtype(comm.gpu, "float16", None)).load()

    with pytest.raises(InputError, match=r"model\.safetensors: truncated at byte \d+, but"):
        run_on_gpus(1, rank)


def test_no_reader_is_left_after_an_error(tmp_path, monkeypatch):
    def fail(self, name, index, out):
        raise InputError(f"{name} cannot be read")

    monkeypatch.setattr(Checkpoint, "read_into", fail)
    directory = write_model(tmp_path / "model")
    with pytest.raises(InputError, match="cannot be read"):
        run_on_gpus(1, lambda comm: load_alone(directory, comm.gpu))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("minitp-reader")]


# --- a separate lm_head in a tied model -----------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 3])
def test_an_untied_copy_is_rejected(tmp_path, tp):
    directory = write_model(tmp_path / "model", **MODELS["tied"])
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    run_on_gpus(tp, lambda comm: checked(comm, directory, "float16"))

    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, directory / "model.safetensors")

    def rank(comm):
        with comm.agreed():
            model_on_gpu(directory, comm, "float16")

    with pytest.raises(Exception, match=r"lm_head\.weight differs from model\.embed") as raised:
        run_on_gpus(tp, rank)
    assert raised.value.exit_code == InputError.exit_code


def test_slices_by_name(tmp_path):
    """Check the slices as `check` reads them: the same numbers as in the file, in 16 bits."""
    directory = write_model(tmp_path / "model", "float16", **MODELS["biased"])
    tensors = load_file(directory / "model.safetensors")

    def rank(comm):
        source = open_model(str(directory), comm.size)
        model = model_on_gpu(directory, comm, "float16")
        for name, array in named_slices(model.weights, source.plan, comm.rank):
            assert (np.asarray(array) == tensors[name][source.plan.tensors[name].index(comm.rank)]).all()

    run_on_gpus(4, rank)
