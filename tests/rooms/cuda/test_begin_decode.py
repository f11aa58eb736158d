"""Tests of begin_decode.cu, run on the CPU, against the explicit operations."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.begin_decode import BeginDecode

DTYPES = (np.float16, ml_dtypes.bfloat16)
BLOCK_SIZE, MAX_BLOCKS = 16, 8
PADDING = -1


def no_lanes(sequences):
    """Return the kernel's `lanes` for rows whose tokens the host chooses and whose blocks are old."""
    return np.full(sequences, -1, np.int32), np.zeros(1, np.int32), np.full(sequences, -1, np.int32)


def begin(dtype, token, lengths, table, width, half_dim, first_row):
    """Run the kernel on random block tables; return (block_table, inverse_frequencies, its five outputs)."""
    draw = np.random.default_rng(width)
    sequences = len(token)
    block_table = draw.permutation(sequences * MAX_BLOCKS).reshape(-1, MAX_BLOCKS).astype(np.int32)
    frequencies = (10000.0 ** -(np.arange(half_dim) / half_dim)).astype(np.float32)  # [d/2]
    x = np.full((sequences, width), np.nan, dtype)  # [B, D]
    slot, seen = np.full((2, sequences), -99, np.int32)  # [B] each
    cosines, sines = np.full((2, sequences, half_dim), np.nan, np.float32)  # [B, d/2] each
    outputs = (x, slot, cosines, sines, seen)
    kernel = BeginDecode(CpuCompiler(dtype), BLOCK_SIZE, first_row)
    rotations = frequencies[None], np.ones(1, np.float32)
    kernel(np.int32(token), np.int32(lengths), block_table, rotations, table, *outputs, no_lanes(sequences))
    return block_table, frequencies, outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "stride", "half_dim"), [(8, 8, 4), (4096, 4096, 64), (576, 640, 32)])
@pytest.mark.parametrize("first_row", [0, 40])
def test_begin_decode(dtype, width, stride, half_dim, first_row):
    draw = np.random.default_rng(stride)
    rows = 30
    table = draw.normal(size=(rows, stride)).astype(dtype)  # [V_r, D_padded]
    token = np.array([0, 29, 30, 39, 40, 69, 70, 45, 5])  # both sides of each rank's limits
    lengths = np.array([0, 1, 15, 16, 17, 127, 64, PADDING, PADDING])
    original = token.copy(), lengths.copy()
    block_table, frequencies, outputs = begin(dtype, token, lengths, table, width, half_dim, first_row)
    x, slot, cosines, sines, seen = outputs
    real = lengths >= 0

    expected = ops.embed_partial(np, token, table[:, :width], first_row)  # [B, D]
    expected[~real] = 0
    np.testing.assert_array_equal(x, expected)
    slots = block_table[np.arange(len(token)), lengths // BLOCK_SIZE] * BLOCK_SIZE + lengths % BLOCK_SIZE
    np.testing.assert_array_equal(slot, np.where(real, slots, -1))
    np.testing.assert_array_equal(seen, np.where(real, lengths + 1, 0))
    cos, sin = ops.rope_cos_sin(np, np.maximum(lengths, 0), frequencies)  # [B, d] each, signed
    # The angles have the same bits, but cos and sin of two libraries may differ by an ulp or two of 1.
    np.testing.assert_allclose(cosines, cos[:, half_dim:], atol=3e-7, rtol=0)
    np.testing.assert_allclose(sines, sin[:, half_dim:], atol=3e-7, rtol=0)
    np.testing.assert_array_equal(token, original[0])
    np.testing.assert_array_equal(lengths, original[1])


def test_rows_with_the_table_of_their_sequence():
    """Check the slots of the tokens of two prompts, whose tables follow one another, and of padding."""
    tables, starts = np.int32([7, 3, 9, 4, 2]), np.int32([0, 0, 3, 3, 0])  # three blocks, then two
    positions = np.int32([17, 40, 0, 31, PADDING])
    x, floats = np.empty((5, 8), np.float16), np.empty((2, 1, 5, 4), np.float32)
    slot, seen = np.full((2, 5), -99, np.int32)
    kernel = BeginDecode(CpuCompiler(np.float16), BLOCK_SIZE, 0)
    rotations, table = (np.ones((1, 4), np.float32), np.ones(1, np.float32)), np.ones((4, 8), np.float16)
    inputs = np.int32([0, 1, 2, 3, 0]), positions, tables, rotations, table
    kernel(*inputs, x, slot, *floats, seen, table_starts=starts)
    assert slot.tolist() == [3 * 16 + 1, 9 * 16 + 8, 4 * 16, 2 * 16 + 15, -1]
    assert seen.tolist() == [18, 41, 1, 32, 0]


def test_a_batch_of_padding_reads_nothing_out_of_range():
    table = np.ones((4, 8), np.float16)
    _, _, outputs = begin(np.float16, [2**31 - 1] * 3, [PADDING] * 3, table, 8, 4, 0)
    for array, expected in zip(outputs, (0, -1, 1, 0, 0), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_large_angles():
    table = np.ones((4, 8), np.float16)
    lengths = np.array([131071, 99999])
    half_dim = 4
    frequencies = np.array([1, 0.3, 0.01, 1e-5], np.float32)  # [d/2]
    block_table = np.zeros((2, 131072 // BLOCK_SIZE), np.int32)
    x, ints = np.empty((2, 8), np.float16), np.empty((2, 2), np.int32)
    cosines, sines = np.full((2, 2, half_dim), np.nan, np.float32)
    kernel = BeginDecode(CpuCompiler(np.float16), BLOCK_SIZE, 0)
    kernel(
        np.int32([1, 2]),
        np.int32(lengths),
        block_table,
        (frequencies[None], np.ones(1, np.float32)),
        table,
        x,
        ints[0],
        cosines,
        sines,
        ints[1],
        no_lanes(2),
    )
    angles = (lengths.astype(np.float32)[:, None] * frequencies).astype(np.float64)  # [B, d/2], as in float32
    np.testing.assert_allclose(cosines, np.cos(angles), atol=2e-7, rtol=0)
    np.testing.assert_allclose(sines, np.sin(angles), atol=2e-7, rtol=0)


def test_tokens_of_lanes_and_new_blocks():
    """Rows without a token of their own embed that of their lane; a new block is used and remembered."""
    table = np.repeat(np.arange(20, dtype=np.float16), 8).reshape(20, 8)  # [V_r, D]: a row has its own id
    token, lengths = np.int32([-1, 7, -1, -1]), np.int32([16, 20, 47, PADDING])
    lane, chosen, new_block = np.int32([2, 0, 1, -1]), np.int32([11, 12, 13]), np.int32([50, -1, 60, 70])
    block_table = np.arange(4 * MAX_BLOCKS, dtype=np.int32).reshape(4, MAX_BLOCKS)
    expected = block_table.copy()
    expected[0, 1], expected[2, 2] = 50, 60
    x, ints = np.full((4, 8), np.nan, np.float16), np.empty((2, 4), np.int32)
    angles = np.empty((2, 4, 4), np.float32)
    kernel = BeginDecode(CpuCompiler(np.float16), BLOCK_SIZE, 0)
    rotations = np.ones((1, 4), np.float32), np.ones(1, np.float32)
    outputs = x, ints[0], *angles, ints[1]
    kernel(token, lengths, block_table, rotations, table, *outputs, (lane, chosen, new_block))
    assert x[:, 0].tolist() == [13, 7, 12, 0]
    np.testing.assert_array_equal(block_table, expected)
    assert ints[0].tolist() == [50 * 16, expected[1, 1] * 16 + 4, 60 * 16 + 15, -1]


@pytest.mark.parametrize("sequences", [1, 32, 300])
def test_end_decode(sequences):
    lengths = np.arange(sequences, dtype=np.int32)
    lengths[::3] = PADDING
    expected = np.where(lengths < 0, PADDING, lengths + 1)
    guarded = np.append(lengths, np.int32(7))  # one element past its end
    BeginDecode(CpuCompiler(np.float16), BLOCK_SIZE, 0).end(guarded[:-1])
    np.testing.assert_array_equal(guarded[:-1], expected)
    assert guarded[-1] == 7
