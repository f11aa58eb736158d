"""Tests that kernels launched as dependents wait for the previous kernel before they use its results."""

import faulthandler
import os
import re
import signal
from itertools import pairwise

import numpy as np
import pytest
from cuda_on_cpu import CUDA, CpuCompiler, build_text

from minitp.cuda import compiler
from minitp.cuda.kernels.all_reduce import AllReduce, region_bytes
from minitp.cuda.kernels.attention_decode import AttentionDecode
from minitp.cuda.kernels.expert_linear import ExpertLinear, ExpertMatrices
from minitp.cuda.kernels.expert_sum import ExpertSum
from minitp.cuda.kernels.linear import Linear
from minitp.cuda.kernels.rms_norm import RmsNorm
from minitp.cuda.kernels.route import Route, new_routing

# Parameters that a kernel may read before it waits, and why:
EARLY = {
    *("weight", "norm", "bias"),  # no kernel of a pass writes them
    *("group_starts", "regions"),  # nor these
    *("block_table", "lengths"),  # written at the start of a pass, before the kernel that precedes attention
}
# Counters that a kernel leaves as it finds them, or that only its own launches use.
KEPT = {"counters", "counter", "calls", "missing", "partials"}
DEPENDENTS = ("linear.cu", "attention_decode.cu", "rms_norm.cu", "all_reduce.cu")
WAIT, TRIGGER = "wait_for_previous()", "let_next_start()"
# Plain loads of what changes from pass to pass, of which L1 may have the contents of the previous pass.
CHANGING = r"\b(lengths|seen|slot|slots|table|block_table|token)\["


class LateCompiler(CpuCompiler):
    """A compiler whose kernels find the arrays of a previous kernel only after they have waited for it."""

    def __init__(self, dtype):
        super().__init__(dtype, has_clusters=True)
        self.launched = []

    def kernel(self, file, name, **defines):
        kernel = super().kernel(file, name, **defines)
        return compiler.Kernel(kernel._function, self._launch)

    def _launch(self, kernel, grid, block, args, shared_mem, dependent, cluster):
        names = [re.search(r"\w+$", parameter).group() for parameter in kernel.parameters]
        arrays = [
            arg
            for name, arg in zip(names, args, strict=True)
            if isinstance(arg, np.ndarray) and name not in EARLY | KEPT
        ]
        ready = [array.copy() for array in arrays]
        for array in arrays:
            array[...] = np.nan if array.dtype.kind == "f" else 0

        def previous():
            for array, values in zip(arrays, ready, strict=True):
                assert (np.isnan(array.astype(np.float32)) if array.dtype.kind == "f" else array == 0).all()
                array[...] = values
            self.launched.append(kernel.name)

        values = [kernel.value(*pair) for pair in zip(kernel.parameters, args, strict=True)]
        kernel.launch(grid, block, values, shared_mem, dependent, cluster, previous)


def run_products(compiler, draw):
    tokens, width, outputs, head_dim = 3, 40, 32, 8
    linear = Linear(compiler)
    x, weight = draw(tokens, width), draw(outputs, width)
    out, stream, act = draw(tokens, outputs), draw(tokens, outputs), draw(tokens, outputs // 2)
    logits = np.zeros((tokens, outputs), np.float32)
    q, keys, values = draw(tokens, 2, head_dim), draw(1, 9, head_dim), draw(1, 9, head_dim)
    angles = draw(2, tokens, head_dim // 2).astype(np.float32)
    slot = np.arange(1, tokens + 1, dtype=np.int32)
    linear.store(x, weight, out, draw(outputs))
    linear.residual(x, weight, stream, draw(outputs))
    linear.logits(x[:1], weight, logits[:1], (draw(width), 1e-5))
    linear.swiglu(x, weight, act, draw(outputs))
    linear.qkv(x, weight, q, keys, values, slot, *angles, 2, 1, head_dim, head_dim, draw(outputs))
    return out, stream, logits, act, q, keys, values


def run_attention(compiler, draw):
    groups, head_dim, block_size = [(0, 2), (2, 4)], 24, 16
    lengths, table = np.array([70, 0, 5], np.int32), np.arange(18, dtype=np.int32).reshape(3, 6)
    attend = AttentionDecode(compiler, np, groups, head_dim, block_size, 3, 96, 48)
    out = draw(3, 4 * head_dim)
    attend(draw(3, 4, head_dim), *draw(2, 2, 18 * block_size, head_dim), table, lengths, out)
    return (out,)


def run_norms(compiler, draw):
    x, out, normed, width = draw(2, 64), draw(2, 64), draw(2, 64), 64
    RmsNorm(compiler)(x, draw(width), out, 1e-5, draw(2, width), draw(width))
    memory = np.zeros(region_bytes(1, 2, width), np.uint8)
    regions = np.array([memory.ctypes.data], np.uint64)
    counts = np.zeros(2, np.uint64), np.zeros(1, np.int32)
    reduce = AllReduce(compiler, 0, regions, *counts, width)
    reduce.add_and_norm(draw(2, width), x, draw(width), normed, 1e-5, draw(width))
    reduce(x, out)
    return x, out, normed


def run_experts(compiler, draw):
    tokens, experts, per_token, width, columns = 3, 4, 2, 40, 24
    routing, rows = new_routing(np, tokens, experts, per_token), tokens * per_token
    matrices = [draw(experts, 2 * columns, width), draw(experts, width, columns)]
    matrices = [ExpertMatrices(w[0], np.arange(experts) * w[0].size) for w in matrices]
    act, y, out = draw(rows, columns), np.zeros((rows, width), np.float32), draw(tokens, width)
    Route(compiler, np, True)(draw(tokens, experts), routing, np.array([5, 0, 1], np.int32))
    ExpertLinear(compiler).swiglu(draw(tokens, width), matrices[0], routing, act)
    ExpertLinear(compiler).down(act, matrices[1], routing, y)
    ExpertSum(compiler)(y, routing, out, adds=True)
    return routing.weights, routing.position, act[:4], y[:4], out


@pytest.mark.parametrize("run", [run_products, run_attention, run_norms, run_experts])
def test_results_of_the_previous_kernel_are_used_only_after_the_wait(run):
    def drawn():
        random = np.random.default_rng(0)
        return lambda *shape: random.normal(size=shape).astype(np.float16)

    late = LateCompiler(np.float16)
    found, expected = run(late, drawn()), run(CpuCompiler(np.float16, has_clusters=True), drawn())
    assert late.launched
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def functions(file):
    """Yield the text of each function of a file, without comments."""
    code = re.sub("//.*", "", (CUDA / file).read_text())
    starts = [found.start() for found in re.finditer(r'^(?:extern "C"|template|__device__)', code, re.M)]
    for start, stop in pairwise([*starts, len(code)]):
        yield code[start:stop]


@pytest.mark.parametrize("file", DEPENDENTS)
def test_kernels_wait_before_they_trigger_return_or_write(file):
    waiting = [text for text in functions(file) if WAIT in text]
    assert waiting
    for text in waiting:
        before = text[: text.index(WAIT)]
        assert TRIGGER in text[text.index(WAIT) :]
        assert TRIGGER not in before
        assert not re.search(CHANGING, before)  # `load_early` reads them from L2
        assert text.count(WAIT) == text.count(TRIGGER) == 1
    for text in functions(file):
        if "__global__" in text and WAIT not in text:  # a function that waits does all of the work
            assert file == "linear.cu"
            assert len(re.findall(r"\bmultiply\(p, ", text)) == 1
            assert "return" not in re.sub(r"\[=\].*?\{.*", "", text, flags=re.S)


FAULTY = 'extern "C" __global__ void faulty(int *out) {{ {} }}'


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("if (threadIdx.x == 0) wait_for_previous();", "never waits"),
        ("let_next_start(); wait_for_previous();", "let_next_start before wait_for_previous"),
    ],
)
def test_a_kernel_that_breaks_the_rule_is_stopped(body, fault, capfd):
    header = (CUDA / "common.h").read_text()
    kernel = build_text(header + FAULTY.format(body))["faulty"]
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        kernel((1,), (32,), (np.zeros(1, np.int32),), dependent=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert fault in capfd.readouterr().err
