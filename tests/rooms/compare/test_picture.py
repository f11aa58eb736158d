"""Tests of the small pictures of two arrays and their difference."""

from types import SimpleNamespace

import numpy as np
import pytest

from minitp.compare.picture import (
    BRIGHT,
    COLUMNS,
    DIFFERENT,
    FIRST,
    NEAR,
    NOT_FINITE,
    ROWS,
    Pictures,
    picture,
)

INF, NAN = np.inf, np.nan


def values(picture, codes):
    """Return the numbers that int8 codes stand for."""
    return codes * picture.scale / 127


def test_a_small_array_is_shown_element_by_element():
    a = np.array([[1.0, -2.0, 0.0], [0.5, 4.0, -4.0]])
    b = a.copy()
    b[1, 0] = -0.5
    made = picture(a, b)
    assert (made.shape, made.a.shape, made.scale) == ((2, 3), (2, 3), 4.0)
    np.testing.assert_allclose(values(made, made.a), a, atol=made.scale / 254)
    np.testing.assert_allclose(values(made, made.b), b, atol=made.scale / 254)
    assert made.rms == pytest.approx(np.sqrt(np.mean(a**2)))
    assert np.argwhere(made.difference).tolist() == [[1, 0]]
    assert made.rms * 10 ** ((int(made.difference[1, 0]) - 1) / 20 - 10) == pytest.approx(1, rel=0.06)


def test_heads_are_rows():
    a = np.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    assert picture(a, a).a.shape == (6, 4)
    assert picture(a[0, 0], a[0, 0]).a.shape == (1, 4)
    assert picture(np.float64(3), np.float64(3)).a.tolist() == [[127]]
    assert picture(np.zeros((0, 4)), np.zeros((0, 4))) is None


@pytest.mark.parametrize("shape", [(500, 576), (7, 130), (49, 65), (48, 64), (3, 50, 1000)])
def test_no_element_is_lost_in_a_large_array(shape):
    """One element that stands out, in A, B or both, is in the picture, with its sign."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.uniform(-0.1, 0.1, shape)
        b = a.copy()
        index = tuple(rng.integers(0, n) for n in shape)
        a[index], b[index] = -5, 7
        made = picture(a, b)
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        assert made.a.shape == (min(rows, ROWS), min(columns, COLUMNS))
        (place,) = np.argwhere(made.difference)
        assert made.a[tuple(place)] == -127  # brighter than the brightest percent
        assert made.b[tuple(place)] == 127
        flat = np.ravel_multi_index(index[:-1], shape[:-1])
        assert abs(place[0] - flat * made.a.shape[0] / rows) <= 1
        assert abs(place[1] - index[-1] * made.a.shape[1] / columns) <= 1


def test_a_few_large_elements_do_not_darken_the_rest():
    a = np.random.default_rng(0).standard_normal((48, 64))
    a[3, 5] = 1e6
    made = picture(a, a)
    assert made.scale == pytest.approx(np.percentile(np.abs(a), BRIGHT), rel=0.01)
    assert np.abs(made.a).mean() > 20


def test_what_is_not_finite_is_marked():
    a = np.array([[1.0, -INF, NAN, INF, 2.0, -INF]])
    b = np.array([[1.0, -INF, NAN, -INF, NAN, -1e9]])
    made = picture(a, b)
    assert (made.a == NOT_FINITE).tolist() == [[False, True, True, True, False, True]]
    assert (made.b == NOT_FINITE).tolist() == [[False, True, True, True, True, False]]
    assert made.difference.tolist() == [[0, 0, 0, DIFFERENT, DIFFERENT, DIFFERENT]]
    assert np.isfinite([made.scale, made.rms]).all()
    everything = picture(np.full((2, 2), NAN), np.full((2, 2), 1.0))
    assert (everything.a == NOT_FINITE).all()
    assert (everything.difference == DIFFERENT).all()
    zeros = picture(np.zeros((2, 2)), np.array([[0, 0], [0, 1e-300]]))
    assert zeros.difference.tolist() == [[0, 0], [0, 1]]


def test_the_pictures_of_a_long_comparison_are_few():
    """The first differing steps have pictures, with their neighbors; of the rest, those that differ most."""
    pictures = Pictures(limit=3 * 12 * 5)
    array = np.ones((3, 4))
    for i in range(200):
        departs = i in (40, 41, 90) or i >= 100
        error = 1.0 if departs else i / 1e4
        pictures.add(SimpleNamespace(name=str(i), departs=departs, relative=error), array, array)
    kept = {int(name) for name in pictures.by_name()}
    first = [40, 41, 90, *range(100, 200)][:FIRST]
    near = {i for n in first for i in range(n - NEAR, n + NEAR + 1)}
    assert near <= kept
    assert len(kept - near) == 5
    assert min(kept - near) > first[-1]  # also differ


def test_all_steps_of_a_short_comparison_have_pictures():
    pictures = Pictures()
    for name in "abc":
        pictures.add(
            SimpleNamespace(name=name, departs=False, relative=0.0), np.ones((2, 2)), np.ones((2, 2))
        )
    pictures.add(SimpleNamespace(name="empty", departs=False, relative=0.0), np.ones((0, 2)), np.ones((0, 2)))
    assert list(pictures.by_name()) == ["a", "b", "c"]
