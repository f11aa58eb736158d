"""The cost of a comparison: memory, the temporary file, and what a user sees of it."""

import shutil
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest
from check_models import SHAPE, write_models
from paths import GOLDENS

from minitp.bits.difference import bit_difference
from minitp.bits.run import bits_of_model
from minitp.bits.variants import Variants, temporary_nbytes
from minitp.check.step_file import StepFile
from minitp.cli import bits
from minitp.cli.main import main
from minitp.comm.single import SingleRank
from minitp.device import Device
from minitp.load import load_model
from minitp.loading.source import open_model

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


class FakeBar:
    """A progress bar that remembers what it has shown."""

    def __init__(self):
        self.titles, self.counts = [], []

    def set_description(self, title):
        self.titles.append(title)
        self.counts.append(0)

    def update(self):
        self.counts[-1] += 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(str(write_models(tmp_path_factory.mktemp("cost"), SHAPE)["tied"]), 1)


@pytest.fixture(scope="module")
def model(source):
    return load_model(source, SingleRank(), Device(np, np.dtype("float32")))


def test_a_large_difference_needs_little_memory():
    a = np.ones((64, 2**16), np.float32)  # 16 MB, and 32 MB in float64
    b = a.copy()
    b[60, 5], b[3, 7] = 3.0, np.nextafter(np.float32(1), np.float32(2))
    tracemalloc.start()
    found = bit_difference(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25
    assert (found.elements, found.index, found.b_value) == (2, (60, 5), 3.0)
    assert found.excess > 1


def test_steps_are_kept_only_until_the_next_variant(source, model):
    steps = StepFile()
    sizes, kept = [], []
    for variant in Variants(model, IDS, steps, FakeBar()).run(3, 2):
        sizes.append(steps.nbytes)
        kept.append([name for name in ("again.1", "batch", "chunk.1", "token.5") if f"{name}/embed" in steps])
        assert all(f"{one.name}/embed" in steps for one in (*variant.a.passes, *variant.b.passes))
    assert kept == [["again.1"], [], ["batch"], ["chunk.1"], ["token.5"], ["token.5"]]
    assert max(sizes) <= temporary_nbytes(source, len(IDS))


def test_the_progress_bar_names_each_run_and_counts_its_layers(source, model):
    bar = FakeBar()
    bits_of_model(source, model, IDS, 3, 1, bar)
    assert bar.titles[:3] == ["the prompt alone", "the same run again", "in a batch of 3 sequences"]
    assert len(bar.titles) == 6
    assert all(count >= source.plan.layers for count in bar.counts)


def test_a_prompt_whose_steps_do_not_fit_is_refused(monkeypatch, capsys):
    argv = ["bits", "--tokens", "1,2,3", "--model", str(GOLDENS / "llama2"), "--tp", "1", "--batch", "1"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(9, 8, 1000))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "3 tokens need up to " in error
    assert "which has only 1.0 kB; use a shorter prompt or fewer --layers, or set TMPDIR" in error


def test_a_prompt_whose_steps_are_large_has_a_warning(source, monkeypatch, capsys):
    bits.check_room(source, 11)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bits, "LARGE", 1e4)
    bits.check_room(source, 11)
    error = capsys.readouterr().err
    assert error.startswith("minitp: warning: 11 tokens need up to ")
    monkeypatch.setenv(bits.SOCKET_VARIABLE, "socket")  # a rank, after the launcher's warning
    bits.check_room(source, 11)
    assert capsys.readouterr().err == ""
