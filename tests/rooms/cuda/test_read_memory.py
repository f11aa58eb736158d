"""A test that read_memory.cu, run on the CPU, reads every word once."""

import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp.cuda.kernels.read_memory import PIECE, ReadMemory


@pytest.mark.parametrize("pieces", [1, 11])
def test_every_word_is_read_once(pieces):
    data = np.random.default_rng(0).integers(0, 1 << 32, pieces * PIECE // 4, dtype=np.uint32)
    read = ReadMemory(CpuCompiler(np.float16), np, data.nbytes)
    read(data)
    fours = np.bitwise_xor.reduce(data.reshape(-1, 4), axis=1)
    np.testing.assert_array_equal(read.sums, fours.reshape(pieces, -1).sum(axis=1, dtype=np.uint32))
