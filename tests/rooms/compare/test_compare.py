"""`minitp compare`: names, layouts, the first step that differs, likely causes, and bad input."""

import json
import tracemalloc
import zipfile
from itertools import permutations

import ml_dtypes
import numpy as np
import pytest
from dump_files import TRACE, arrays, command, rng, write
from safetensors.numpy import load_file, save_file

from minitp.compare.files import open_dump
from minitp.compare.layouts import layouts
from minitp.compare.run import compare_files
from minitp.oracle import ops as oracle_ops

# --- names, errors and tolerances -----------------------------------------------------------------------


@pytest.mark.parametrize("a_kind", ["safetensors", "npz"])
@pytest.mark.parametrize("b_kind", ["safetensors", "npz"])
def test_equal_files(tmp_path, capsys, a_kind, b_kind):
    a, b = write(tmp_path / f"a.{a_kind}", arrays()), write(tmp_path / f"b.{b_kind}", arrays())
    code, out = command(capsys, a, b)
    assert code == 0
    assert out.splitlines()[-1] == "all 13 common steps within 0.0001 (for float32)"
    assert [line.split()[0] for line in out.splitlines()[5:9]] == [
        "prefill/embed",
        *[TRACE.format(0, step) for step in ("attn.q", "attn.context", "mlp.out")],
    ], "one line stands for all layers"


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_first_step_that_differs(tmp_path, capsys, kind):
    b = arrays()
    first = TRACE.format(2, "attn.context")
    b[first][3, 17] += 5
    for name in list(b)[list(b).index(first) + 1 :]:
        b[name] = rng(1).standard_normal(b[name].shape).astype(np.float32)
    paths = write(tmp_path / f"a.{kind}", arrays()), write(tmp_path / f"b.{kind}", b)
    code, out = command(capsys, *paths)
    assert code == 1
    before, after = arrays()[first][3, 17], b[first][3, 17]
    error = 5 / np.linalg.norm(arrays()[first])
    assert out.splitlines()[-1] == (
        f"first differing step: {first}: relative error {error:.2g} (tolerance 0.0001); "
        f"largest difference at [3, 17]: {before:.6g} in A, {after:.6g} in B"
    )
    begins = out.split("Where it begins (! differs):\n")[1].split("\n\n")[0].splitlines()[1:]
    assert [line.startswith("!") for line in begins] == 3 * [False] + 5 * [True]
    worst = out.split("differing steps (13 compared):\n")[1].split("\n\n")[0].splitlines()[1:]
    errors = [float(line.split()[2]) for line in worst]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)


def test_long_lists_of_differences_are_shortened(tmp_path, capsys):
    paths = [write(tmp_path / f"{seed}.npz", arrays(seed, layers=40)) for seed in (0, 1)]
    code, out = command(capsys, *paths)
    assert code == 1
    assert len(out.splitlines()) < 35
    assert "  and 111 more" in out


def test_order_of_the_passes(two):
    """Check the order for a file like the oracle's, in which all passes of a layer come together."""
    passes = ["decode.10", "decode.3", "decode.2", "prefill"]
    names = [*[f"{name}/layers.0.attn.q" for name in passes], "weights/w"]
    content = {name: np.ones(3, np.float32) for name in names}
    result = two(content, {name: 2 * array for name, array in content.items()})
    assert [step.name for step in result.departing] == names[::-1]


def test_order_of_chunks_and_batches(two):
    passes = [
        "batch.2.seq10",
        "decode.1",
        "prefill.10",
        "batch.2.seq9",
        "prefill.2",
        "batch.1.seq11",
        "prefill",
    ]
    content = {f"{name}/embed": np.ones(3, np.float32) for name in passes}
    found = [step.name.partition("/")[0] for step in two(content, content).steps]
    assert found == [
        *("prefill", "prefill.2", "prefill.10", "decode.1"),
        *("batch.1.seq11", "batch.2.seq9", "batch.2.seq10"),
    ]


def test_tokens_and_positions_are_the_first_to_be_named(two):
    """Check that tokens of a later pass come first only there, because they follow from earlier passes."""
    names = ["decode.1/embed", "decode.1/tokens", "weights/w", "prefill/embed", "prefill/positions"]
    names.append("prefill/tokens")
    a = {name: np.arange(3) if name.endswith(("ens", "ons")) else np.ones(3) for name in names}
    found = [step.name for step in two(a, {name: 1 + array for name, array in a.items()}).departing]
    assert found == [
        *("prefill/tokens", "prefill/positions", "weights/w", "prefill/embed"),
        *("decode.1/tokens", "decode.1/embed"),
    ]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_integers_must_be_equal(two, tmp_path, capsys, dtype):
    """Check that a wrong token departs although its relative error is small, also if tokens are floats."""
    a = {"prefill/tokens": np.arange(128000, 128100), "prefill/embed": np.ones((100, 4), ml_dtypes.bfloat16)}
    b = a | {"prefill/tokens": a["prefill/tokens"].astype(dtype)}
    if dtype == np.float32:
        a = b.copy()
    assert two(a, b, tolerance=0.5).departing == []
    b["prefill/tokens"] = b["prefill/tokens"].copy()
    b["prefill/tokens"][[40, 70]] += np.array([1, 30], dtype)
    for tolerance in (None, 0.5):
        (step,) = two(a, b, tolerance=tolerance).departing
        assert step.relative < 1e-4
        assert step.worst == (((40,), 128040, 128041), ((70,), 128070, 128100))
    paths = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    code, out = command(capsys, *paths)
    assert code == 1
    assert out.splitlines()[-1] == (
        "first differing step: prefill/tokens: integers must be equal; "
        "first difference at [40]: 128040 in A, 128041 in B"
    )


def test_shifted_integers_have_a_cause(two):
    a = np.arange(5)
    assert two({"prefill/positions": a}, {"prefill/positions": a + 1}).steps[0].note == "B is A + 1"
    ids = rng().integers(0, 300, 12)
    step = two({"prefill/tokens": ids[1:]}, {"prefill/tokens": ids[:-1]}).steps[0]
    assert step.note == "position t of B is position t - 1 of A: shifted by one"
    step = two({"prefill/tokens": ids}, {"prefill/tokens": ids // 2 * 2}).steps[0]
    assert step.note == "", "16-bit numbers are no cause of a difference of integers"


def test_names_in_only_one_file(tmp_path, capsys):
    a, b = arrays(), arrays()
    del a["prefill/embed"], b[TRACE.format(1, "attn.q")], b[TRACE.format(1, "mlp.out")]
    b["token_ids"] = np.arange(6)
    code, out = command(capsys, write(tmp_path / "a.npz", a), write(tmp_path / "b.npz", b))
    assert code == 0
    assert "only in A: 2 (prefill/layers.1.attn.q, prefill/layers.1.mlp.out)\n" in out
    assert "only in B: 2 (prefill/embed, token_ids)\n" in out
    assert "all 10 common steps" in out


def test_names_may_omit_the_prefill(two):
    bare = {name.removeprefix("prefill/"): array for name, array in arrays().items()}
    assert len(two(arrays(), bare).steps) == len(two(bare, arrays()).steps) == 13


@pytest.fixture
def measure(two):
    """Return a function that gives relative and absolute error, worst elements and note of two arrays."""

    def run(a, b):
        step = two({"x": a}, {"x": b}).steps[0]
        return step.relative, step.absolute, step.worst, step.note

    return run


def test_errors(measure):
    a = np.array([[3.0, 4.0], [0.0, 12.0]])
    b = np.array([[3.0, 4.5], [-1.0, 12.25]])
    relative, absolute, worst, note = measure(a, b)
    assert relative == pytest.approx(np.sqrt(0.5**2 + 1 + 0.25**2) / 13, rel=1e-15)
    assert absolute == 1.0
    assert worst == (((1, 0), 0.0, -1.0), ((0, 1), 4.0, 4.5), ((1, 1), 12.0, 12.25))
    assert note == ""
    assert measure(a, a)[:2] == (0, 0)
    assert measure(np.zeros(3), np.zeros(3))[:2] == (0, 0)
    assert measure(np.zeros(3), np.array([0, 1e-30, 0]))[:2] == (np.inf, 1e-30)
    assert measure(np.zeros((0, 3)), np.zeros((0, 3))) == (0, 0, (), "")
    assert measure(np.float64(2), np.float64(3))[:3] == (0.5, 1, (((), 2, 3),))


def test_entries_that_are_not_finite(measure):
    a = np.array([[1.0, -np.inf, -np.inf], [1.0, 2.0, -np.inf]])
    assert measure(a, a)[0] == 0
    near = np.where(np.isfinite(a), a + 1e-3, a)
    assert 0 < measure(a, near)[0] < 1e-2, "the error of the finite entries"
    seen = a.copy()
    seen[0, 2] = 5
    relative, _, worst, note = measure(a, seen)
    assert relative == np.inf
    assert worst == (((0, 2), -np.inf, 5.0),)
    assert "entries that are infinite or NaN in only one of the two: 1" in note
    assert "large negative numbers in B" in measure(a, np.where(np.isfinite(a), a, -3e38))[3]
    nan = a.copy()
    nan[1, 0] = np.nan
    relative, _, worst, note = measure(a, nan)
    assert relative == np.inf
    assert worst[0][0] == (1, 0)
    assert note == "1 NaN in B"
    assert measure(a, -a)[0] == np.inf, "-inf is not inf"


def test_nan_differs_at_any_tolerance(two):
    b = arrays()
    b["prefill/embed"][0, 0] = np.nan
    assert [step.name for step in two(arrays(), b, tolerance=1e9).departing] == ["prefill/embed"]


DTYPES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_follows_the_coarser_dtype(two, dtype, kind):
    a = {"x": np.full(100, 1.0), "logits": np.full(3, 1.0, np.float32), "ids": np.arange(3)}
    for off, departs in ((0.5 * DTYPES[dtype], False), (2 * DTYPES[dtype], True)):
        b = {
            **a,
            "x": a["x"].astype(getattr(ml_dtypes, dtype, dtype)),
            "logits": a["logits"] * np.float32(1 + off),
        }
        for pair in ((a, b), ({**b, "logits": a["logits"]}, {**a, "logits": b["logits"]})):
            result = two(*pair, kind=kind)
            assert result.tolerance == DTYPES[dtype]
            assert [step.name for step in result.departing] == ["logits"] * departs


def test_tolerance_as_given(two, tmp_path, refused):
    a, b = {"x": np.full(9, 1.0)}, {"x": np.full(9, 1.01)}
    assert two(a, b, tolerance=0.02).departing == []
    assert two(a, b, tolerance=0.005).departing
    assert two(a, a, tolerance=0).departing == []
    assert two({"x": np.arange(5)}, {"x": np.arange(5)}).tolerance == 0, "integers must be equal"
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for value in ("-1", "nan"):
        assert f"--tolerance {float(value)}: expected 0 or a positive" in refused(
            *paths, f"--tolerance={value}"
        )


# --- layouts --------------------------------------------------------------------------------------------

Q, CONTEXT = TRACE.format(0, "attn.q"), TRACE.format(0, "attn.context")
LAYOUTS = {  # layout -> step and conversion of [H, T, d] or [T, Hd]
    "[T, H, d]": (Q, lambda x: x.transpose(1, 0, 2)),
    "[T, H*d]": (Q, lambda x: x.transpose(1, 0, 2).reshape(6, 32)),
    "[1, H, T, d]": (Q, lambda x: x[None]),
    "[1, T, H*d]": (Q, lambda x: x.transpose(1, 0, 2).reshape(1, 6, 32)),
    "[1, T, H, d]": (Q, lambda x: x.transpose(1, 0, 2)[None]),
    "[H, d, T]": (Q, lambda x: x.transpose(0, 2, 1)),
    "[H*d, T]": (Q, lambda x: x.transpose(0, 2, 1).reshape(32, 6)),
    "[H*T*d]": (Q, lambda x: x.reshape(-1)),
    "[T*H*d]": (Q, lambda x: x.transpose(1, 0, 2).reshape(-1)),
    "[H*T, d]": (Q, lambda x: x.reshape(24, 8)),
    "[1, T, Hd]": (CONTEXT, lambda x: x[None]),
    "transposed, [Hd, T]": (CONTEXT, lambda x: x.T),
    "[T*Hd]": (CONTEXT, lambda x: x.reshape(-1)),
    "[T, H, d]!": (CONTEXT, lambda x: x.reshape(6, 4, 8)),
    "[H, T, d]": (CONTEXT, lambda x: x.reshape(6, 4, 8).transpose(1, 0, 2)),
    "[1, H, T, d]!": (CONTEXT, lambda x: x.reshape(1, 6, 4, 8).transpose(0, 2, 1, 3)),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_layouts_are_recognized_and_reported(two, text):
    name, convert = LAYOUTS[text]
    a = arrays()[name]
    result = two({name: a}, {name: np.ascontiguousarray(convert(a))})
    assert (result.steps[0].relative, result.steps[0].note) == (0, f"B is {text.rstrip('!')}")
    wrong = a.copy()
    wrong.flat[77] += 1
    step = two({name: a}, {name: np.ascontiguousarray(convert(wrong))}).steps[0]
    assert step.departs, "a recognized layout does not make a step pass"
    assert step.index == np.unravel_index(77, a.shape), "in A's layout"
    assert step.note == f"B is {text.rstrip('!')}"


def test_layouts_of_unknown_names(two):
    a = rng().standard_normal((5, 7))
    step = two({"w": a}, {"w": np.ascontiguousarray(a.T)}).steps[0]
    assert (step.relative, step.note) == (0, "B is transposed, [j, i]")


def test_same_shape_in_another_order(two):
    """Detect the layout by values where shapes are ambiguous: as many heads as tokens, or a square weight."""
    square, heads = rng().standard_normal((6, 6)), rng().standard_normal((6, 6, 8))
    step = two({"weights/w": square}, {"weights/w": square.T.copy()}).steps[0]
    assert (step.relative, step.note) == (0, "B is transposed, [j, i]")
    step = two({Q: heads}, {Q: heads.transpose(1, 0, 2).copy()}).steps[0]
    assert (step.relative, step.note) == (0, "B is [T, H, d]")
    step = two({Q: heads}, {Q: rng(1).standard_normal((6, 6, 8))}).steps[0]
    assert step.departs
    assert step.note == "", "no layout fits, so none is named"


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 6), (3, 3, 3), (2, 1, 2, 3), (6,), ()])
def test_every_order_of_axes_is_found(shape):
    a = rng().standard_normal(shape)
    for order in permutations(range(a.ndim)):
        for b in (a.transpose(order), a.transpose(order)[None], a.transpose(order).reshape(-1)):
            assert any((layout.view(b) == a).all() for layout in layouts(a.shape, b.shape))
            assert all(layout.view(b).shape == a.shape for layout in layouts(a.shape, b.shape))


def test_shapes_that_cannot_match(tmp_path, refused):
    a = write(tmp_path / "a.npz", {Q: np.zeros((4, 6, 8)), CONTEXT: np.zeros((4, 6))})
    b = write(tmp_path / "b.npz", {Q: np.zeros((6, 31)), CONTEXT: np.zeros((3, 8))})
    line = refused(a, b)
    assert "a.npz and " in line
    assert f"b.npz have no array that can be compared: {Q}: [4, 6, 8] in A, [6, 31] in B: " in line
    assert line.endswith("no order of A's axes has this shape, and 1 more\n")
    b = write(tmp_path / "b.npz", {CONTEXT: np.zeros((3, 8))})
    line = refused(a, b)
    assert "[4, 6] in A, [3, 8] in B: no order" in line, "the same number of elements"
    assert "more" not in line


# --- causes ---------------------------------------------------------------------------------------------


def cause(two, name, a, b):
    step = two({name: a}, {name: b}).steps[0]
    assert step.departs, "a known cause does not make a step pass"
    return step.note


def test_constant_factor(two):
    a = rng().standard_normal((6, 32))
    assert cause(two, CONTEXT, a, 1.5 * a) == "B is 1.5 * A"
    assert cause(two, CONTEXT, a, -a) == "B is -1 * A"
    assert cause(two, CONTEXT, a, (4 * a).T.copy()) == "B is transposed, [Hd, T]; B is 4 * A"


def test_shift_by_one_position(two):
    x = rng().standard_normal((4, 7, 8))
    assert "position t of B is position t - 1 of A" in cause(two, Q, x[:, 1:].copy(), x[:, :-1].copy())
    assert "position t of B is position t + 1 of A" in cause(two, Q, x[:, :-1].copy(), x[:, 1:].copy())
    assert cause(two, Q, x[1:].copy(), x[:-1].copy()) == "", "a shift of heads is not a shift of positions"
    assert "t - 1" in cause(two, "unknown", x[1:].copy(), x[:-1].copy())
    assert "t - 1" in cause(two, CONTEXT, x[0, 1:].copy(), x[0, :-1].copy())


def test_interleaved_heads(two):
    a = rng().standard_normal((4, 6, 8))
    b = np.stack((a[..., :4], a[..., 4:]), axis=-1).reshape(a.shape)
    assert "interleaved in B and half-split in A" in cause(two, Q, a, b)
    assert "half-split in B and interleaved in A" in cause(two, Q, b, a)
    b = b.transpose(1, 0, 2).reshape(6, 32)
    assert cause(two, Q, a, b).startswith("B is [T, H*d]; each head's dimensions are interleaved in B")


def test_values_rounded_to_16_bits(two):
    a = rng().standard_normal((6, 32))
    b = a.astype(ml_dtypes.bfloat16).astype(np.float32)
    said = "all of B's values are {0} numbers: save them as {0}, or use --tolerance"
    assert cause(two, CONTEXT, a, b) == said.format("bfloat16")
    b = a.astype(np.float16).astype(np.float32)
    assert cause(two, CONTEXT, a, b) == said.format("float16")
    a = a.astype(np.float16).astype(np.float64)
    b = a.copy()
    b[0, 0] = 2
    assert cause(two, CONTEXT, a, b) == "", "all of A's values are float16, too"


def test_unexplained_differences_have_no_cause(two):
    a, b = (rng(seed).standard_normal((4, 6, 8)) for seed in (0, 1))
    assert cause(two, Q, a, b) == ""
    assert cause(two, Q, a, a + 1e-3 * b) == ""
    a[0, 0, 0] = 100
    b = a + 5e-4 * b
    b[0, 0, 0] = 100.012
    assert cause(two, Q, a, b) == "", "a factor explains most of the difference, but not enough"


# --- maps -----------------------------------------------------------------------------------------------

MAP = {"prefill/embed": "wte", "layers.*.attn.q": "h.*.q", "prefill/layers.*.mlp.out": "h.*.out"}


def test_map(two):
    b = {"wte": arrays()["prefill/embed"], "other": np.zeros(3)}
    for i in range(3):
        b |= {f"h.{i}.q": arrays()[TRACE.format(i, "attn.q")], f"h.{i}.out": np.ones((6, 32), np.float32)}
    b[CONTEXT] = arrays()[CONTEXT]
    result = two(arrays(), b, mapped=MAP)
    assert len(result.steps) == 1 + 3 * 2 + 1, "including equal names that are not in the map"
    assert [step.name for step in result.departing] == [TRACE.format(i, "mlp.out") for i in range(3)]
    assert [step.b_name for step in result.departing] == [f"h.{i}.out" for i in range(3)]
    assert result.only_b == ["other"]
    assert TRACE.format(3, "attn.q") in result.only_a, "B has fewer layers"


def test_bad_maps(tmp_path, refused):
    a = write(tmp_path / "a.npz", arrays())
    b = write(tmp_path / "b.npz", {"h.0.q": np.zeros((4, 6, 8))})
    path = tmp_path / "map.json"

    def line(mapped):
        path.write_text(mapped if isinstance(mapped, str) else json.dumps(mapped))
        return refused(a, b, "--map", path)

    assert "is not in" in line({"layers.*.attn.p": "h.*.q"})
    assert "the map goes from A's names to B's" in line({"h.0.q": Q})
    assert f"'h.*.qq' is not in {b}, which has 'h.0.q'" in line({"layers.*.attn.q": "h.*.qq"})
    assert "expected two names" in line({"layers.*.attn.q": "h.0.q"})
    assert "expected two names" in line({Q: ["h.0.q"]})
    assert "map.json: not valid JSON" in line("{")
    assert "map.json: expected a JSON object" in line("[]")
    assert "have no name in common" in line({})
    assert "missing.json: no such file" in refused(a, b, "--map", tmp_path / "missing.json")


# --- bad files ------------------------------------------------------------------------------------------


def test_files_without_arrays(tmp_path, refused):
    good = write(tmp_path / "good.npz", arrays())

    def line(path, content=None):
        if content is not None:
            path.write_bytes(content)
        first, second = refused(path, good), refused(good, path)
        assert first == second
        assert str(path) in first
        return first

    assert "missing.npz: no such file" in line(tmp_path / "missing.npz")
    assert "a directory, expected a file" in refused(tmp_path, good)
    (tmp_path / "folder").mkdir()
    expected = "no arrays found; expected a .safetensors or .npz file for each rank, such as"
    assert expected in refused(good, tmp_path / "folder")
    invalid = "not a valid .safetensors or .npz file"
    assert invalid in line(tmp_path / "text.safetensors", b"It was a dark and stormy night.")
    assert invalid in line(tmp_path / "empty", b"")
    assert invalid in line(tmp_path / "cut.npz", good.read_bytes()[:-200])
    whole = write(tmp_path / "whole.safetensors", arrays()).read_bytes()
    assert invalid in line(tmp_path / "cut.safetensors", whole[:-4])
    assert invalid in line(tmp_path / "header.safetensors", whole[:50])
    save_file({}, tmp_path / "nothing.safetensors")
    assert "the file has no arrays" in line(tmp_path / "nothing.safetensors")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("archive/data.pkl", b"")
    assert "the file has no arrays" in line(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as file:
        file.writestr("x.npy", b"no header")
    assert invalid in line(tmp_path / "odd.npz")


@pytest.mark.parametrize("array", [np.array([1j]), np.array(["a"]), np.array([{}], object)], ids=str)
def test_arrays_without_numbers(tmp_path, refused, array):
    good = write(tmp_path / "good.npz", {"x": np.zeros(1), "y": np.zeros(1)})
    bad = write(tmp_path / "bad.npz", {"x": array, "y": np.zeros(1)})
    assert f"bad.npz: x has dtype {array.dtype.name}, expected float16, " in refused(good, bad)
    bad = write(tmp_path / "bad.npz", {"prompt": array, "y": np.zeros(1)})
    assert compare_files(good, bad).departing == [], "it has no partner, so it is not read"


def test_damaged_data(tmp_path, refused):
    good = write(tmp_path / "good.npz", {"x": np.arange(1000.0)})
    content = bytearray(good.read_bytes())
    content[1000] ^= 1
    (tmp_path / "bad.npz").write_bytes(content)
    assert "bad.npz: x cannot be read: Bad CRC-32" in refused(good, tmp_path / "bad.npz")


def test_disjoint_names(tmp_path, refused):
    a, b = write(tmp_path / "a.npz", arrays()), write(tmp_path / "b.npz", {"h.0": np.zeros(3)})
    line = refused(a, b)
    assert "no name in common: the first has 'prefill/embed', 'prefill/layers.0.attn.q'" in line
    assert "the second 'h.0'; pair the names with --map" in line


def test_the_first_difference_does_not_depend_on_the_order_of_the_file(two):
    """Use the sorted names that save_file writes: attn.context before attn.q, layers.10 before layers.2."""
    a = dict(sorted(arrays(layers=12).items()))
    b = dict(a)
    for name in (TRACE.format(10, "attn.q"), TRACE.format(2, "attn.q"), TRACE.format(2, "attn.context")):
        b[name] = b[name] + 1
    found = [step.name for step in two(a, b).departing]
    assert found == [
        TRACE.format(i, step) for i, step in ((2, "attn.q"), (2, "attn.context"), (10, "attn.q"))
    ]


def test_unknown_names_come_last_in_their_pass(two):
    a = {name: np.ones(3) for name in ("prefill/extra", "decode.1/embed", "prefill/final_norm")}
    found = [step.name for step in two(a, a).steps]
    assert found == ["prefill/final_norm", "prefill/extra", "decode.1/embed"]


def test_a_single_array_in_another_layout_is_reported(tmp_path, capsys):
    """Check that the layout of an exact array is reported, although other layers have larger errors."""
    weights = {f"weights/{i}.q": rng(i).standard_normal((6, 6)).astype(np.float32) for i in range(3)}
    a = write(tmp_path / "a.npz", weights)
    b = write(tmp_path / "b.npz", weights | {"weights/1.q": weights["weights/1.q"].T})
    code, out = command(capsys, a, b)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "transposed" in line] == ["weights/1.q"]
    assert out.splitlines()[-1].endswith("(for float32), 1 of them in another layout")


@pytest.mark.parametrize("mask", [-1e9, np.finfo(np.float32).min])
def test_masks_of_large_numbers_do_not_hide_the_scores(two, mask):
    name, seen = TRACE.format(0, "attn.scores"), np.tril(np.ones((6, 6), bool))
    scores = rng().standard_normal((2, 6, 6)).astype(np.float32)
    a = {name: np.where(seen, scores, np.float32(mask))}
    assert not two(a, {name: np.where(seen, scores, np.float32(-5e8))}).departing
    wrong = two(a, {name: np.where(seen, 8 * scores, np.float32(mask))}).departing
    assert wrong[0].relative == pytest.approx(7, rel=1e-5)


def test_nan_in_both_is_reported(two, tmp_path, capsys):
    a = arrays(layers=1)
    a["prefill/embed"][2, 3] = np.nan
    result = two(a, a)
    assert result.steps[0].note == "1 NaN in both"
    remark = "prefill/embed has NaN at the same places in A and B; these count as equal, so check A first"
    assert result.remarks == (remark,)
    path = write(tmp_path / "a.npz", a)
    code, out = command(capsys, path, path)
    assert code == 0
    assert remark in out.splitlines()
    assert out.splitlines()[-1].endswith("within 0.0001 (for float32), 1 of them with NaN in both files")


def test_empty_arrays_are_in_the_report(tmp_path, capsys):
    a = write(tmp_path / "a.npz", {"x": np.zeros((0, 4), np.float32), "y": np.ones(3, np.float32)})
    assert command(capsys, a, a, "--report", tmp_path / "r.html")[0] == 0


def test_an_empty_npz(tmp_path, refused):
    empty = write(tmp_path / "a.npz", {})
    assert "the file has no arrays" in refused(empty, empty)


def test_a_map_that_does_not_exist(tmp_path, refused):
    a = write(tmp_path / "a.npz", arrays())
    line = refused(a, a, "--map", tmp_path / "no.json")
    assert "no.json: no such file, and none of the engines hf, llama.cpp" in line


def test_bfloat16_in_npz(tmp_path):
    """Read bfloat16 from .npz, in which NumPy stores it without the dtype's name."""
    x = rng().standard_normal(50).astype(ml_dtypes.bfloat16)
    dump = open_dump(write(tmp_path / "x.npz", {"x": x}))
    assert dump.entries["x"].dtype == "bfloat16"
    assert (dump.read("x") == x.astype(np.float64)).all()


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_one_pair_in_memory_at_a_time(tmp_path, kind):
    content = {f"x.{i}": rng(i).standard_normal(1 << 17, dtype=np.float32) for i in range(20)}  # 0.5 MB each
    paths = write(tmp_path / f"a.{kind}", content), write(tmp_path / f"b.{kind}", content)
    del content
    tracemalloc.start()
    result = compare_files(*paths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result.steps) == 20
    assert peak < 12e6, "of 21 MB in all; a pair needs several copies in float64"


# --- minitp's traces ------------------------------------------------------------------------------------


def test_ranks_compared_with_the_oracle(traces, capsys):
    a, b = traces("--oracle", "--decode", "2"), traces("--decode", "2")
    capsys.readouterr()
    code, out = command(capsys, a, b)
    assert code == 0
    assert "common steps within 0.0001 (for float32)" in out
    assert "  decode." in out


def test_16_bit_dtypes_are_within_their_tolerance(traces):
    for dtype in ("float16", "bfloat16"):
        result = compare_files(traces("--oracle", "--decode", "2"), traces("--decode", "2", "--dtype", dtype))
        assert result.departing == []
        assert result.why == f"for {dtype}"
        assert result.remarks == ()


def test_trace_of_another_model_or_other_tokens(traces, refused, capsys):
    a, theta, seed = traces(), traces(model="theta"), traces(model="seed")
    longer, other = traces(tokens="5,6,7,8,9,10"), traces(tokens="5,6,7,3,9")
    capsys.readouterr()
    line = refused(a, theta)
    theta_differs = "rope_theta is 10000.0 in the first and 20000.0 in the second"
    assert f"{theta} are traces of different models: {theta_differs}" in line
    assert "are traces of different tokens" in refused(a, longer)
    assert "positions 0 to 4 in A and 0 to 5 in B" in refused(a, longer)
    assert "token 3 is 8 in A and 3 in B" in refused(a, other)
    assert command(capsys, a, seed)[0] == 1, "other weights cannot be distinguished from wrong results"


def test_tokens_that_differ_while_decoding(traces, tmp_path, capsys):
    a = traces("--decode", "2")
    with open(a, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    ids = json.loads(metadata["token_ids"])
    ids[-1] += 1
    b = tmp_path / "b.safetensors"
    save_file(load_file(a), b, {**metadata, "token_ids": json.dumps(ids)})
    result = compare_files(a, b)
    assert {step.name.split("/")[0] for step in result.steps} == {"prefill", "decode.1"}
    capsys.readouterr()
    assert "decode.2 and later passes are not compared: token 6 is" in command(capsys, a, b)[1]


def test_parts_of_different_numbers_of_ranks(traces, tmp_path):
    a = traces("--per-rank")
    with open(a, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    assert any(step.name.startswith("rank0/") for step in compare_files(a, a).steps)
    b = tmp_path / "b.safetensors"
    save_file(load_file(a), b, {**metadata, "tp": "2"})
    result = compare_files(a, b)
    assert len(result.steps) == len(compare_files(a, traces()).steps)
    assert not any(step.name.startswith("rank") for step in result.steps)


def test_broken_metadata(traces, tmp_path, refused, capsys):
    a, b = traces(), tmp_path / "b.safetensors"
    capsys.readouterr()
    save_file(load_file(a), b, {"format": "minitp-trace-1", "config": "{"})
    assert f"{b}: the format is minitp-trace-1, but the metadata is damaged" in refused(a, b)


ROPE = {
    "not rotated": lambda x, at, f: x,
    "in the opposite direction": lambda x, at, f: oracle_ops.rope(x, -at, f),
    "one too large": lambda x, at, f: oracle_ops.rope(x, at + 1, f),
    "one too small": lambda x, at, f: oracle_ops.rope(x, at - 1, f),
    "rotated twice": lambda x, at, f: oracle_ops.rope(x, 2 * at, f),
    "rotated in pairs (x[2i], x[2i+1])": lambda x, at, f: pairwise(x, at, f),
}


def pairwise(x, positions, frequencies):
    """Apply RoPE as Meta's code does, to pairs of neighbors as complex numbers."""
    rotated = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * np.multiply.outer(positions, frequencies))
    return np.stack((rotated.real, rotated.imag), axis=-1).reshape(x.shape)


@pytest.mark.parametrize("text", ROPE)
@pytest.mark.parametrize("pass_name", ["prefill", "decode.2"])
def test_rope_mistakes(traces, tmp_path, text, pass_name):
    a = traces("--oracle", "--decode", "2")
    steps = load_file(a)
    frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    positions = np.arange(5) if pass_name == "prefill" else np.array([6])
    b = {}
    for part in "qk":
        plain = steps[f"{pass_name}/layers.1.attn.{part}"]
        b[f"{pass_name}/layers.1.attn.{part}"] = plain
        b[f"{pass_name}/layers.1.attn.{part}_rope"] = ROPE[text](plain, positions, frequencies)
    result = compare_files(a, write(tmp_path / "b.npz", b))
    assert [step.name[-6:] for step in result.departing] == ["q_rope", "k_rope"]
    assert all(text in step.note for step in result.departing)


def test_rope_over_the_whole_head(traces, tmp_path):
    """Check the cause if an engine ignores partial_rotary_factor, and if it does not rotate at all."""
    a, name = traces(model="partial"), "prefill/layers.1.attn.k"
    plain, frequencies = load_file(a)[name], 10000.0 ** -(np.arange(4) / 4)
    whole = oracle_ops.rope(plain, np.arange(plain.shape[1]), frequencies)
    for found, cause in (
        (whole, "B rotates all 8 dimensions of a head, not the first 6 (RoPE)"),
        (plain, "B is not rotated (RoPE)"),
    ):
        step = compare_files(a, write(tmp_path / "b.npz", {f"{name}_rope": found})).steps[0]
        assert step.note == cause


def test_rope_mistake_in_a_rank_s_part(traces, tmp_path):
    a = traces("--per-rank")
    name = "rank0/prefill/layers.0.attn.k_rope"
    plain = load_file(a)["rank0/prefill/layers.0.attn.k"]
    step = compare_files(a, write(tmp_path / "b.npz", {name: plain})).steps[0]
    assert step.note == "B is not rotated (RoPE)"


def test_projection_weights_of_the_other_rope_layout(traces, tmp_path):
    a = traces("--steps", "weights/*")
    name = "weights/model.layers.0.self_attn.q_proj.weight"
    w = load_file(a)[name]  # [4 * 8, 32]
    b = w.reshape(4, 2, 4, 32).transpose(0, 2, 1, 3).reshape(32, 32)
    step = compare_files(a, write(tmp_path / "b.npz", {name: b})).steps[0]
    assert step.departs
    assert "interleaved in B and half-split in A" in step.note
