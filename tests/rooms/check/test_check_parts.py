"""The parts of `check`: the plan, differences and their bounds, and the steps to blame."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from one_core import run_threads
from paths import DOCS, GOLDENS
from tiny import UNEVEN, write_tiny

from minitp.check import difference, expected, tolerance
from minitp.check.difference import Difference, difference_of
from minitp.check.plan import plan_problems
from minitp.check.result import CheckResult, Finding
from minitp.check.run import check_model
from minitp.check.tolerance import Expected
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.shard import Plan
from minitp.trace.reference import open_oracle

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Write a model with uneven heads and return its directory."""
    return write_tiny(tmp_path_factory.mktemp("parts") / "uneven", tokenizer=False, **UNEVEN)


# --- the plan -------------------------------------------------------------------------------------------


def plan_of(directory, tp):
    source = open_model(str(directory), tp)
    return source, source.plan


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_every_family_is_correct_at_any_tp(name):
    source, _ = plan_of(GOLDENS / name, 1)
    for tp in range(1, source.config.num_attention_heads + 1):
        source, plan = plan_of(GOLDENS / name, tp)
        assert plan_problems(open_oracle(source), plan) == []


class CrossedGroups(Plan):
    """A plan in which rank 2's two query heads read each other's KV head."""

    def query_groups(self, rank):
        return [(1, 2), (0, 1)] if rank == 2 else super().query_groups(rank)


class OneGroup(Plan):
    """A plan in which rank 2's first query head reads both of its KV heads, and the second reads none."""

    def query_groups(self, rank):
        return [(0, 1), (0, 1)] if rank == 2 else super().query_groups(rank)


def with_ranges(what, rank, start, stop):
    """Return a function that changes one rank's range in a plan's `what`_ranges."""

    def change(plan):
        ranges = list(getattr(plan, f"{what}_ranges"))
        ranges[rank] = (start, stop)
        return replace(plan, **{f"{what}_ranges": tuple(ranges)})

    return change


def with_tensor(name, **changes):
    def change(plan):
        return replace(plan, tensors={**plan.tensors, name: replace(plan.tensors[name], **changes)})

    return change


def without(name):
    return lambda plan: replace(plan, tensors={n: s for n, s in plan.tensors.items() if n != name})


Q_PROJ, O_PROJ, UP = (
    f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
)
FFN_RANGES = ((0, 10), (10, 19), (19, 28), (28, 37))  # the FFN columns of four ranks
# Ranks have heads 0-2, 3-4, 5-6, 7-8 and KV heads 0, 1, 1-2, 2.
# name -> (change of the plan, (rank, beginning of the problem's description))
PLANS = {
    "heads twice": (with_ranges("head", 1, 2, 5), (1, "heads 2 to 5, expected to begin at 3")),
    "a head left out": (with_ranges("head", 1, 4, 5), (1, "heads 4 to 5, expected to begin at 3")),
    "too few heads": (with_ranges("head", 3, 7, 8), (3, "heads end at 8, expected 9")),
    "a range missing": (
        lambda plan: replace(plan, ffn_ranges=plan.ffn_ranges[:3]),
        ("all", "ffn: 3 ranges for 4 ranks"),
    ),
    "heads of three ranks": (
        lambda plan: replace(plan, head_ranges=plan.head_ranges[:3]),
        ("all", "heads: 3 ranges for 4 ranks"),
    ),
    "columns twice": (with_ranges("ffn", 2, 18, 28), (2, "ffn 18 to 28, expected to begin at 19")),
    "the last rows left out": (with_ranges("vocab", 3, 76, 100), (3, "vocab end at 100, expected 101")),
    "backwards": (with_ranges("vocab", 1, 26, 20), (1, "vocab 26 to 20")),
    "the neighbor's KV head": (
        with_ranges("kv_head", 1, 2, 3),
        (1, "KV heads 2 to 3, but its query heads read [1]"),
    ),
    "a KV head too few": (
        with_ranges("kv_head", 2, 1, 2),
        (2, "KV heads 1 to 2, but its query heads read [1, 2]"),
    ),
    "a KV head too many": (
        with_ranges("kv_head", 1, 0, 2),
        (1, "KV heads 0 to 2, but its query heads read [1]"),
    ),
    "one head in two groups": (lambda plan: OneGroup(**vars(plan)), (2, "")),
    "crossed groups": (
        lambda plan: CrossedGroups(**vars(plan)),
        (2, "query head 5 reads KV head 2, expected 1"),
    ),
    "a tensor left out": (without(UP), ("all", f"tensor {UP} is not in the plan")),
    "a shape": (
        with_tensor(UP, shape=(37, 21)),
        ("all", f"tensor {UP}: shape (37, 21), expected (37, 20)"),
    ),
    "the wrong axis": (
        with_tensor(O_PROJ, axis=0),
        ("all", f"tensor {O_PROJ} is split along axis 0, expected 1"),
    ),
    "a tensor not split": (
        with_tensor(O_PROJ, axis=None, ranges=()),
        ("all", f"tensor {O_PROJ} is split along axis None"),
    ),
    "columns of another rank": (
        with_tensor(UP, ranges=FFN_RANGES[1:] + FFN_RANGES[:1]),
        (0, f"tensor {UP}: 10 to 19"),
    ),
    "half a head": (
        with_tensor(Q_PROJ, ranges=((0, 15), (15, 30), (30, 42), (42, 54))),
        (0, f"tensor {Q_PROJ}: 0 to 15, expected (0, 18)"),
    ),
}


def test_a_plan_that_does_not_follow_the_split_is_rejected(uneven):
    source, even = plan_of(uneven, 2)
    oracle = open_oracle(source)
    assert plan_problems(oracle, source.with_split("3,1").plan, "3,1") == []
    assert (
        plan_problems(oracle, source.with_split("1000,1").plan, "1000,1") == []
    )  # a rank has one head at least
    problems = plan_problems(oracle, even, "3,1")
    assert (0, "heads 0 to 5 are 5 of 9, expected 6.8 by its share") in problems
    assert {text.split()[0] for _, text in problems} == {"heads", "ffn", "vocab"}


@pytest.mark.parametrize(("change", "expected"), PLANS.values(), ids=PLANS)
def test_a_wrong_plan_is_rejected(change, expected, uneven):
    source, plan = plan_of(uneven, 4)
    problems = plan_problems(open_oracle(source), change(plan))
    rank, beginning = expected
    assert [text for who, text in problems if who == rank and text.startswith(beginning)], problems


def test_a_wrong_plan_is_the_only_problem_reported(uneven):
    source, plan = plan_of(uneven, 4)
    wrong = replace(source, plan=with_tensor(UP, axis=None, ranges=())(plan))

    def run(comm):
        return check_model(wrong, load_model(source, comm, open_device()), [1, 2, 3], 0)

    for result in run_threads(4, run):
        assert [who for who, _ in result.problems] == ["all"]
        assert not result.ok
        assert (result.findings, result.blamed()) == ([], [])


# --- differences and bounds -----------------------------------------------------------------------------


def test_a_difference_has_size_and_position():
    expected = np.array([[3.0, 0.0], [4.0, 12.0]])  # norm 13
    found = difference_of(np.array([[3.0, 0.5], [2.8, 12.0]]), expected)
    assert found.relative == pytest.approx(1.3 / 13)
    assert found.absolute == pytest.approx(1.2)
    assert found.index == (1, 0)
    assert [index for index, _, _ in found.worst[:2]] == [(1, 0), (0, 1)]
    assert found.worst[0][1:] == (pytest.approx(2.8), 4.0)
    assert "at [1, 0] it is 2.8, expected 4" in str(found)


@pytest.mark.parametrize(
    ("value", "expected", "relative", "absolute"),
    [
        ([1, 2], [1, 2], 0, 0),
        ([0, 0], [0, 0], 0, 0),
        ([1e-9], [0], np.inf, 1e-9),
        ([-np.inf, 2], [-np.inf, 2], 0, 0),
        ([-np.inf, 3], [-np.inf, 2], 0.5, 1),
        ([1, -np.inf], [1, 2], np.inf, np.inf),
        ([1, 2], [1, -np.inf], np.inf, np.inf),
        ([1, np.inf], [1, -np.inf], np.inf, np.inf),
        ([np.nan, 2], [1, 2], np.inf, np.inf),
        ([], [], 0, 0),
        (5, 4, 0.25, 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_differences_of_special_numbers(value, expected, relative, absolute, dtype):
    found = difference_of(np.array(value, open_device(dtype).dtype), np.array(expected, np.float64))
    # 1e-9 is rounded to three digits in bfloat16, and to zero in float16.
    if dtype == "float16" and absolute == 1e-9:
        relative = absolute = 0
    assert (found.relative, found.absolute) == (relative, pytest.approx(absolute, rel=2**-8))


def test_the_bound_of_a_large_array_is_twice_the_error_of_the_low_precision_reference():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 200)), rng.standard_normal((300, 200))
    for dtype in DTYPES:
        dtype = open_device(dtype).dtype
        should = expected.linear(x.astype(dtype), w.astype(dtype))
        reference = difference_of(should.low_precision_reference, should.value)
        relative, absolute = should.bounds(dtype)
        # The norm of 19200 errors varies by 1%; the allowance for chance must be no more than 10%.
        assert 2 * reference.relative <= relative <= 2.2 * reference.relative
        # The allowance for chance is the error of one sum: some 2 roundings of the largest number.
        assert 2 * reference.absolute <= absolute <= 6 * reference.absolute


@pytest.fixture(scope="module")
def example():
    """Return docs/check.md's section with the worked example, and the variables of its code."""
    page = (DOCS / "check.md").read_text(encoding="utf-8")
    section = page[page.index("### An example") : page.index("### Why these bounds")]
    variables = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], variables)
    return section, variables


def row(section, name):
    """Return the numbers in the table row whose first cell begins with `name`."""
    line = next(line for line in section.splitlines() if line.startswith(f"| {name}"))
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", line.split("|", 2)[2])]


def norm(x):
    return float(np.linalg.norm(x))


def test_the_worked_example_in_the_docs_has_the_right_numbers(example):
    section, variables = example
    should, x_in, w = variables["should"], variables["x_in"], variables["W"]
    y, r, c = should.value, should.low_precision_reference, should.scale
    terms = x_in.astype(np.float64) * w.astype(np.float64)  # [out, in]
    for name, numbers in {
        "terms": terms.ravel(),
        "y,": [*y[0], norm(y)],
        "r,": [*r[0], norm(r)],
        "r - y": [*(r - y)[0], norm(r - y)],
        "c,": [*c[0], norm(c)],
    }.items():
        assert row(section, name) == pytest.approx(numbers, abs=0.51e-5), name
    u, u32 = 2**-11, 2**-24
    s = 2 * u + 2 * u32
    n = np.sum(c**2) ** 2 / np.sum(c**4)
    relative, absolute = variables["relative"], variables["absolute"]
    assert relative == pytest.approx((2 * norm(r - y) + s * norm(c) / n**0.5) / norm(y))
    assert absolute == pytest.approx(2 * np.max(np.abs(r - y)) + s * np.max(c))
    assert (should.terms, should.blocks) == (4, 0)
    text = " ".join(section.split())
    for said in (
        f"With u = {u:.2e}, s = 2 u + 2 u32 = {s:.2e}.",
        f"n = (sum c^2)^2 / (sum c^4) = {n:.2f}.",
        f"2 ||r - y|| is {2 * norm(r - y):.2e} and s ||c|| / sqrt(n) is {s * norm(c) / n**0.5:.2e}.",
        f"a relative error of {relative:.2e}.",
        f"2 max |r - y| is {2 * np.max(np.abs(r - y)):.2e} and s max(c) is {s * np.max(c):.2e},",
        f"together {absolute:.2e}.",
    ):
        assert said.replace("e-0", "e-") in text


def test_the_two_engines_of_the_worked_example(example):
    section, variables = example
    should = variables["should"]
    terms = variables["x_in"] * variables["W"]  # float16 [out, in]
    rounds = np.zeros(3, np.float16)
    for term in terms.T:
        rounds = rounds + term
    leaves_out = should.low_precision_reference[0].copy()
    leaves_out[0] = np.float16(should.value[0, 0] - terms[0, 2])
    for name, result in (("rounds", rounds), ("leaves out", leaves_out)):
        found, bounds = difference_of(result[None], should.value), should.bounds(np.float16)
        ratio = max(found.relative / bounds[0], found.absolute / bounds[1])
        *shown, relative, largest, shown_ratio = row(section, name)
        assert shown == pytest.approx(result, abs=0.51e-5)
        assert [relative, largest, shown_ratio] == pytest.approx(
            [found.relative, found.absolute, ratio], rel=0.03
        )


def test_the_example_of_tolerance_is_the_one_in_the_docs(example):
    _, variables = example
    should, text = variables["should"], " ".join(tolerance.__doc__.split())
    for symbol, array in (("y", should.value), ("r", should.low_precision_reference)):
        assert f"{symbol} = [{', '.join(f'{number:.5f}' for number in array[0])}]" in text
    assert f"c = [{', '.join(f'{number:.3f}' for number in should.scale[0])}]" in text
    assert f"= {variables['relative']:.1e}".replace("e-0", "e-") in text
    leaves_out = np.float16(should.value[0, 0] - variables["W"][0, 2] / 2)
    assert f"gets {leaves_out:.5f} there" in text


def test_a_product_dominated_by_one_number_is_within_its_bounds():
    """Use numbers like those of real hidden states; the reference's error of the large one may be tiny."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        x, w = rng.standard_normal((1, 384), np.float32), rng.standard_normal((576, 384), np.float32) / 20
        x[0, 7], w[300, 7] = 1000, 10
        should = expected.linear(x, w)
        found, (relative, absolute) = difference_of(x @ w.T, should.value), should.bounds(np.float32)
        assert found.relative <= relative
        assert found.absolute <= absolute


def test_equal_rows_do_not_count_as_more_samples():
    """Repeat one row of 8 numbers, whose error of two roundings may by chance be twice the reference's."""
    rng, dtype = np.random.default_rng(0), open_device("bfloat16").dtype
    for _ in range(300):
        row, w, bias = rng.standard_normal((1, 20)), rng.standard_normal((8, 20)), rng.standard_normal(8)
        x, w, bias = (a.astype(dtype) for a in (np.repeat(row, 24, axis=0), w, bias))
        should = expected.linear(x, w, bias)
        product = (x.astype(np.float32) @ w.T.astype(np.float32)).astype(dtype)
        assert difference_of(product + bias, should.value).relative <= should.bounds(dtype, repeats=24)[0]


def test_an_overflow_does_not_widen_the_bound():
    x = np.full((1, 100), 30, np.float16)
    should = expected.linear(x, np.concatenate((x, x / 30)))  # 90000, which overflows float16, and 3000
    assert np.isinf(should.low_precision_reference[0, 0])
    _, absolute = should.bounds(np.float16)
    assert absolute < 100


def test_a_float32_input_does_not_tighten_the_bound():
    """Compute a bfloat16 step from float32 inputs that should have been bfloat16."""
    rng, dtype = np.random.default_rng(0), open_device("bfloat16").dtype
    gate, up = rng.standard_normal((2, 20, 30), np.float32)
    should = expected.swiglu(gate, up)
    error, bounds = difference_of(should.value.astype(dtype), should.value), should.bounds(dtype)
    assert error.relative <= bounds[0]
    assert error.absolute <= bounds[1]
    assert should.bounds(np.float32)[0] < error.relative


def test_bounds_ignore_infinite_entries_and_are_absolute_for_zeros():
    should = Expected(np.array([1.0, -np.inf]), np.array([1.25, -np.inf]), np.array([0.0, 1.0]))
    assert should.bounds(np.float32) == pytest.approx((0.5, 0.5), rel=1e-5)
    # Relative to zeros, any error is infinite.
    assert Expected(np.zeros(2), np.zeros(2), np.zeros(2)).bounds(np.float32) == (np.inf, 0)


def test_equal_elements_are_one_sample():
    """Check that all of them may have the error of one sum, s, because their errors are equal, too."""
    equal, different = np.full(400, 3.25), np.linspace(3.25, 3.5, 400).astype(np.float32).astype(float)
    s = 2**-24 * (2 + 9**0.5)
    assert Expected(equal, equal, equal, terms=9).bounds(np.float32)[0] == pytest.approx(s)
    assert Expected(different, different, different, terms=9).bounds(np.float32)[0] < s / 19
    half = np.where(np.arange(400) % 2, different, 3.25)  # not most of them
    assert Expected(half, half, half, terms=9).bounds(np.float32)[0] < s / 19


def test_equal_rows_are_one_sample():
    """Check rows that share one error, as in norms, and of which half are equal."""
    rows = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32).astype(float)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows.astype(np.float32).astype(float)
    s = 2**-24 * (2 + 9**0.5)

    def bound(values):
        return Expected(values, values, values, terms=9, common=(-1,)).bounds(np.float32)[0]

    assert bound(rows) == pytest.approx(s / 10, rel=0.01)
    rows[:50] = rows[0]  # a typical row equals 50 others or only itself, 25.5 on average
    assert bound(rows) == pytest.approx(s / (100 / 25.5) ** 0.5, rel=0.01)
    rows[:] = rows[0]
    assert bound(rows) == pytest.approx(s, rel=0.01)
    assert expected.exactly(np.ones(2)).bounds(np.float32) == (0, 0)


def finding(step, rank, relative=0.5, note=""):
    difference = Difference(relative, 0.0, [])
    return Finding("prefill", 0, step, rank, "replicated", difference, (1.0, 1.0), note=note)


def test_a_finding_is_ok_up_to_its_bound():
    assert finding("mlp.out", 0, 1).ok
    assert not finding("mlp.out", 0, 1.01).ok
    assert not finding("mlp.out", 0, 0, note="shape").ok
    exact = replace(finding("embed", 0, 0), bounds=(0.0, 0.0))
    assert exact.ok
    assert replace(exact, local=Difference(0.0, 1e-30, [])).ratio == np.inf
    assert replace(exact, local=None).ratio == np.inf
    assert replace(exact, local=Difference(0.0, 0.0, []), bounds=(0.0, 1.0)).ok


def test_a_collective_that_is_wrong_everywhere_is_blamed_once():
    def blamed(*findings):
        result = CheckResult(list(findings), [], [], [], tp=3)
        return [(finding.name, finding.rank) for finding in result.blamed()]

    name = "prefill/layers.0."
    everywhere = [finding("mlp.out", rank, 9) for rank in range(3)]
    assert blamed(finding("mlp.act", 1, 2), *everywhere) == [(f"{name}mlp.act", 1), (f"{name}mlp.out", "all")]
    assert blamed(*everywhere[:2], finding("mlp.out", 2)) == [(f"{name}mlp.out", 0), (f"{name}mlp.out", 1)]
    not_collective = [finding("mlp.act", rank, 9) for rank in range(3)]
    assert blamed(*not_collective) == [(f"{name}mlp.act", rank) for rank in range(3)]
    assert blamed(finding("mlp.act", 0)) == []
    assert not CheckResult([], [(0, "the plan")], [], [], tp=1).ok


@pytest.mark.parametrize("factor", [5e-324, 1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_norm_of_numbers_whose_squares_have_no_float64(factor):
    with np.errstate(over="ignore"):
        assert difference.norm(factor * np.array([[3.0], [4.0]])) == pytest.approx(5 * factor, abs=0)


def test_the_experts_of_a_norm_that_was_not_recorded_have_its_roundings():
    random = np.random.default_rng(0)
    x, gates, ups = (random.normal(size=shape).astype(np.float16) for shape in ((2, 8), (3, 5, 8), (3, 5, 8)))
    chosen = np.array([[True, False, True], [False, True, True]])
    hidden = expected.rms_norm(x, np.ones(8, np.float16), 1e-5).not_recorded(np.float16)
    seen = expected.experts_act(x, chosen, gates, ups)
    unseen = expected.experts_act(hidden, chosen, gates, ups)
    assert unseen.roundings == pytest.approx(seen.roundings + 2 * hidden.roundings)  # gate and up


def test_large_scores_that_were_not_recorded_widen_the_bound_of_their_probabilities():
    """Keys share a large vector, so scores of 100 differ by a few; the engine adds up in another order."""
    ratios = []
    for seed in range(100):
        draw = np.random.default_rng(seed).standard_normal
        q = draw((1, 1, 16)).astype(np.float32)
        k = (100 * draw((1, 1, 16)) + draw((1, 4, 16))).astype(np.float32)
        scores = np.zeros((1, 1, 4), np.float32)
        for i in reversed(range(16)):
            scores += q[:, :, None, i] * k[:, None, :, i]
        weights = np.exp((scores - scores.max()) / np.float32(4))
        hidden = expected.scores(q, k, np.ones((1, 4), bool), 4.0).not_recorded(np.float32)
        right = expected.softmax(hidden)
        found = difference_of(weights / weights.sum(), right.value)
        relative, absolute = right.bounds(np.float32)
        ratios.append(max(found.relative / relative, found.absolute / absolute))
    assert max(ratios) <= 1


def test_a_multiplied_term_is_rounded_to_its_own_dtype():
    """The output of a block of Granite is bfloat16 under autocast, and the stream is float32."""
    draw = np.random.default_rng(0).standard_normal
    x, y = draw((8, 16)).astype(np.float32), draw((8, 16)).astype(ml_dtypes.bfloat16)
    term = (np.float32(0.22) * y.astype(np.float32)).astype(ml_dtypes.bfloat16)
    result = x + term.astype(np.float32)
    right = expected.add(x, y, 0.22)
    np.testing.assert_array_equal(right.low_precision_reference, result)
    assert difference_of(result, right.value).relative <= right.bounds(np.float32)[0]
