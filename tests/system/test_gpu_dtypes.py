"""Tests of 16-bit dtypes in CuPy: the functions that minitp calls have loops for them, and keep the dtype.

A few of CuPy's operations lack bfloat16 and silently widen to float32. The stand-in has CuPy's tables (see
make_cupy_types.py); a test on a GPU compares them with the installed CuPy.
"""

import ast
import inspect
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from on_gpu import STAND_IN, model_on_gpu, run_on_gpus
from tiny import write_tiny

import minitp
from minitp import moe, ops
from minitp.kv_cache import KVCache
from minitp.paged_cache import BlockPool, PagedCache

pytestmark = pytest.mark.usefixtures("cupy")

PACKAGE = Path(minitp.__file__).parent
TABLES = json.loads((STAND_IN / "cupy" / "types.json").read_text())["types"]
HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# --- functions that the code calls ----------------------------------------------------------------------

# Functions that create arrays or move numbers of any dtype. All use one copying kernel, `copy` in the tables.
ANY_DTYPE = {
    "arange", "ascontiguousarray", "asarray", "asnumpy", "concatenate", "copyto", "empty", "empty_like",
    "nonzero", "ones", "stack", "zeros", "zeros_like",
}  # fmt: skip
OWN = {"matmul", "matmul_into"}  # methods of cuda.arrays.Arrays, which call cuBLAS
NO_FUNCTIONS = {
    "cuda", "dtype", "float32", "float64", "get_default_memory_pool", "inf", "int8", "lib", "RawModule",
    "__version__",
}  # fmt: skip
# Functions without a loop for bfloat16, and why that does no harm.
WIDENED = {
    "where": "embed_partial casts its result back; all other calls are for float32 and integers",
    "argmax": "called for float32 only",
}
OPERATORS = {
    ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "true_divide", ast.USub: "negative",
    ast.FloorDiv: "floor_divide", ast.Mod: "remainder", ast.Lt: "less", ast.LtE: "less_equal",
    ast.Gt: "greater", ast.GtE: "greater_equal", ast.Eq: "equal", ast.NotEq: "not_equal",
}  # fmt: skip
EXPLICIT = ("ops", "moe", "model", "kv_cache", "paged_cache")  # modules that compute with xp alone
# Other modules that call methods of arrays on a GPU.
FUSED = ("fused", "decode_graph", "decode_pass", "prefill", "prompt_pass", "experts", "batches_ahead", "comm")
REDUCTIONS = {"sum", "max", "min", "argmax"}


def called():
    """Return the functions called as xp.NAME or cupy.NAME, reductions called as methods, and operators."""
    functions, methods, operators = set(), set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and owner(node) in ("xp", "cupy", "_cupy"):
                functions.add(node.attr)
            on_arrays = path.stem in (*EXPLICIT, *FUSED)
            if on_arrays and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                methods.add(node.func.attr)
            if path.stem in EXPLICIT:
                signs = [getattr(node, "op", None), *getattr(node, "ops", [])]
                operators |= {OPERATORS.get(type(sign)) for sign in signs}
    return functions - NO_FUNCTIONS, methods & REDUCTIONS, operators - {None}


def owner(attribute):
    """Return the last name before an attribute, such as xp in device.xp.where."""
    value = attribute.value
    return value.id if isinstance(value, ast.Name) else getattr(value, "attr", None)


def test_all_called_functions_are_in_the_tables():
    functions, _, _ = called()
    assert {"where", "matmul", "zeros", "exp"} <= functions
    assert functions - ANY_DTYPE - OWN - set(TABLES) - {"abs"} == set()


@pytest.mark.parametrize("name", EXPLICIT)
def test_the_explicit_path_does_not_use_numpy(name):
    """Check that the path uses only `xp`, so that it runs on any device."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names & {"np", "numpy", "cupy"} == set()


def test_called_functions_have_loops_for_16_bits():
    functions, methods, operators = called()
    assert {"sum", "max"} <= methods
    assert {"add", "multiply", "less"} <= operators
    typed = (
        {"absolute" if name == "abs" else name for name in functions & {*TABLES, "abs"}} | methods | operators
    )
    without = {name for name in typed if not any(loop.startswith("E") for loop in TABLES[name])}
    assert without == set(WIDENED)
    assert all(any("e" in loop for loop in TABLES[name]) for name in typed)
    assert {"e->e", "E->E"} <= set(TABLES["copy"])


@pytest.mark.parametrize(
    ("function", "inputs", "result"),
    [
        ("where", ("?", "E", "E"), "float32"),
        ("where", ("?", "e", "e"), "float16"),
        ("maximum", ("E", 1.5), "bfloat16"),
        ("exp", ("E",), "bfloat16"),
        ("exp", ("i",), "float64"),
        ("sum", ("E",), "bfloat16"),
        ("sum", ("i",), "int64"),
        ("argmax", ("E",), "int64"),
        ("isfinite", ("E",), "bool"),
    ],
)
def test_the_stand_in_widens_like_cupy(cupy, function, inputs, result):
    args = [cupy.ones(4, ml_dtypes.bfloat16 if x == "E" else x) if isinstance(x, str) else x for x in inputs]
    assert getattr(cupy, function)(*args).dtype.name == result


def test_the_stand_in_widens_operators_like_cupy(cupy):
    half, single = cupy.ones(3, ml_dtypes.bfloat16), cupy.ones(3, np.float32)
    assert (half * half).dtype == (2 * half).dtype == (half / 2).dtype == half.dtype
    assert (half + single).dtype == single.dtype
    half += single
    assert half.dtype == ml_dtypes.bfloat16
    with pytest.raises(TypeError, match="bitwise_and has no loop"):
        half & half


# --- dtypes of results ----------------------------------------------------------------------------------

STREAM = "of the stream"  # the 16-bit dtype under test
RESULTS = {  # operation -> the dtype of each array that it returns
    "embed_partial": [STREAM],
    "scaled": [STREAM],
    "rms_norm": [STREAM],
    "rms_norm_plus_one": [STREAM],
    "matmul": [STREAM],
    "column_parallel": [STREAM],
    "row_parallel": [STREAM],
    "logits_partial": ["float32"],
    "soft_cap": ["float32"],
    "rope_cos_sin": ["float32", "float32"],
    "apply_rope": [STREAM],
    "split_heads": [STREAM, STREAM],
    "causal_mask": ["bool"],
    "attention_scores": ["float32"],
    "softmax": ["float32"],
    "attention_context": [STREAM],
    "swiglu": [STREAM],
    "geglu": [STREAM],
    "route": ["int64", "float32"],
    "experts_act": [STREAM],
    "experts_partial": [STREAM],
}
OPERATIONS = dict(inspect.getmembers(ops, inspect.isfunction) + inspect.getmembers(moe, inspect.isfunction))


def calls(xp, half):
    """Return arguments for each operation: T = 3 tokens, D = 8, 2 query heads and 1 KV head with d = 4."""
    x, w, bias, ids = half(3, 8), half(8, 8), half(8), xp.asarray([0, 1, 2])
    q, k, scores = half(2, 3, 4), half(1, 3, 4), xp.ones((2, 3, 3), dtype=xp.float32)
    cos = xp.ones((3, 4), dtype=xp.float32)
    chosen, shares = xp.asarray([[0, 1]] * 3), xp.ones((3, 2), dtype=xp.float32)
    return {
        "embed_partial": [(ids, w, 0), (ids, w, 1)],
        "scaled": [(x, 1), (x, 2.5)],
        "rms_norm": [(x, bias, 1e-5)],
        "rms_norm_plus_one": [(x, bias, 1e-5)],
        "matmul": [(x, w)],
        "column_parallel": [(x, w), (x, w, bias)],
        "row_parallel": [(x, w)],
        "logits_partial": [(x, w), (x, w, 3.0, 2.0)],
        "soft_cap": [(scores, 2.0)],
        "rope_cos_sin": [(ids, xp.ones(2, dtype=xp.float32)), (ids, xp.ones(2, dtype=xp.float32), 1.5)],
        "apply_rope": [(q, cos, cos)],
        "split_heads": [(half(3, 16), 2, 1)],
        "causal_mask": [(ids, 0, 3), (ids, 0, 3, 2)],
        "attention_scores": [(q, k, [(0, 2)]), (q, k, [(0, 2)], xp.ones((3, 3), dtype=bool), 0.5, 2.0)],
        "softmax": [(scores,)],
        "attention_context": [(scores, k, [(0, 2)])],
        "swiglu": [(x,)],
        "geglu": [(x,)],
        "route": [(x, 2), (x, 2, False)],
        "experts_act": [(x, chosen, [w, w])],
        "experts_partial": [(half(3, 2, 8), chosen, shares, [w, w])],
    }


def test_the_tables_have_every_operation():
    assert OPERATIONS.keys() == RESULTS.keys()


@pytest.fixture
def half(request, cupy):
    """Make an array of ones in the test's 16-bit dtype."""
    return lambda *shape: cupy.ones(shape, request.param)


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES, indirect=True)
@pytest.mark.parametrize("name", RESULTS)
def test_an_operation_keeps_the_dtype(cupy, half, name):
    from minitp.cuda.arrays import Arrays

    xp, expected = Arrays(cupy), [half(1).dtype.name if x == STREAM else x for x in RESULTS[name]]
    for arguments in calls(xp, half)[name]:
        found = OPERATIONS[name](xp, *arguments)
        found = found if isinstance(found, tuple) else (found,)
        assert [array.dtype.name for array in found] == expected


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES, indirect=True)
@pytest.mark.parametrize("kv_dtype", ["auto", "float16", "int8"])
def test_a_cache_keeps_the_dtype(cupy, half, kv_dtype):
    from minitp.cuda.arrays import Arrays

    xp, dtype = Arrays(cupy), half(1).dtype
    pool = BlockPool(xp, dtype, 1, 1, 4, 2, kv_dtype=kv_dtype)
    for cache in (KVCache(xp, dtype, 1, 1, 4, kv_dtype=kv_dtype), PagedCache(pool, [1, 0])):
        assert [array.dtype for array in cache.append(0, half(1, 3, 4), half(1, 3, 4))] == [dtype, dtype]


def test_a_widened_stream_is_rejected_at_the_first_product(tmp_path, monkeypatch):
    """Check for an earlier bug of embed_partial, which kept bfloat16 from running on a GPU."""

    def embed_partial(xp, token_ids, table, first_row):
        local = token_ids - first_row
        here = (local >= 0) & (local < table.shape[0])
        rows = table[xp.where(here, local, 0)]
        return xp.where(here[:, None], rows, xp.zeros_like(rows))

    directory = write_tiny(tmp_path / "tiny")

    def rank(comm):
        model = model_on_gpu(directory, comm, "bfloat16", path="explicit")
        return model.forward([1, 2, 3], model.new_cache(), logits_at=slice(None)).dtype.name

    assert run_on_gpus(1, rank) == ["float32"]
    monkeypatch.setattr(ops, "embed_partial", embed_partial)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_SUPPORTED"):
        run_on_gpus(1, rank)
