"""Ranks and volumes: hand cases, inclusion and exclusion, and the definition on random rows."""

import itertools
import math
import time

import numpy as np
import pytest

from report import pareto

LOWER = ("lower", "lower")
FIVE: list[pareto.Sense] = ["lower"] * 5


def test_ranks_of_a_case_by_hand():
    points = [(1, 5), (2, 3), (3, 4), (4, 1), (4, 5), (2, 3)]
    assert pareto.ranks(points, LOWER) == [1, 1, 2, 1, 3, 1]  # the last equals the second
    assert pareto.front(points, LOWER) == [0, 1, 3, 5]


def test_each_column_has_its_sense():
    points = [(10, 1), (20, 2), (10, 2)]  # seconds and accuracy
    assert pareto.ranks(points, ("lower", "higher")) == [2, 2, 1]
    assert pareto.ranks(points, ("higher", "lower")) == [1, 1, 2]
    assert pareto.ranks([(3,), (1,), (2,), (1,)], ("lower",)) == [3, 1, 2, 1]
    assert pareto.ranks([], LOWER) == pareto.front([], LOWER) == []


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_ranks_are_as_defined(columns):
    """Rank = 1 + the highest rank among those that dominate, computed one by one."""
    rows = np.random.default_rng(columns).integers(0, 4, (60, columns)).tolist()
    senses = ["lower"] * columns

    def better(p, q):
        return p != q and all(x <= y for x, y in zip(p, q, strict=True))

    by_hand: dict[int, int] = {}

    def rank(i):
        if i not in by_hand:
            above = [rank(j) for j in range(len(rows)) if better(rows[j], rows[i])]
            by_hand[i] = 1 + max(above, default=0)
        return by_hand[i]

    expected = [rank(i) for i in range(len(rows))]
    assert max(expected) > 1
    assert pareto.ranks(rows, senses) == expected
    assert pareto.front(rows, senses) == [i for i, r in enumerate(expected) if r == 1]


def union(points, reference) -> float:
    """Volume of the boxes between the points and the reference, by inclusion and exclusion."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in itertools.combinations(points, size):
            sides = np.maximum(0, np.asarray(reference) - np.max(some, axis=0))
            total -= (-1) ** size * np.prod(sides)
    return float(total)


def test_hypervolume_by_hand():
    assert pareto.hypervolume([(1, 2), (2, 1)], (3, 3), LOWER) == 3.0
    assert pareto.hypervolume([(1, 2), (2, 1), (2, 2)], (3, 3), LOWER) == 3.0
    assert pareto.hypervolume([(2,), (5,)], (6,), ("lower",)) == 4.0
    assert pareto.hypervolume([(1, 0.9)], (3, 0.5), ("lower", "higher")) == pytest.approx(0.8)
    assert pareto.hypervolume([(0,) * 5], (2,) * 5, ("lower",) * 5) == 32.0


def test_rows_that_do_not_beat_the_reference_span_nothing():
    assert pareto.hypervolume([(1, 1), (0, 9), (9, 0)], (3, 3), LOWER) == 4.0
    assert pareto.hypervolume([(3, 0)], (3, 3), LOWER) == 0.0
    assert pareto.hypervolume([], (3, 3), LOWER) == 0.0


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6])
def test_hypervolume_is_that_of_the_union(columns):
    rng = np.random.default_rng(columns)
    for grid in (3, 1000):  # with ties and without
        points = rng.integers(0, grid, (9, columns)) / grid
        found = pareto.hypervolume(points, [1.1] * columns, ["lower"] * columns)
        assert found == pytest.approx(union(points, [1.1] * columns), rel=1e-9)
        turned = pareto.hypervolume(-points, [-1.1] * columns, ["higher"] * columns)
        assert turned == pytest.approx(found)


def test_the_largest_front_that_is_promised():
    """150 rows, none of which dominates another, in 5 columns, against darts."""
    rng = np.random.default_rng(0)
    points = np.abs(rng.normal(size=(150, 5)))
    points = 1 - points / np.linalg.norm(points, axis=1, keepdims=True)
    assert len(pareto.front(points, FIVE)) == 150
    start = time.perf_counter()
    found = pareto.hypervolume(points, [1.0] * 5, FIVE)
    assert time.perf_counter() - start < 30
    darts = rng.random((20_000, 5))
    hit = np.zeros(len(darts), bool)
    for point in points:
        hit |= (darts >= point).all(axis=1)
    error = math.sqrt(hit.mean() * (1 - hit.mean()) / len(darts))
    assert abs(found - hit.mean()) < 4 * error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto.ranks([(1, 2), (1, None)], LOWER), r"points\[1\] has None in column 1"),
        (lambda: pareto.front([(math.nan, 2)], LOWER), r"points\[0\] has nan in column 0"),
        (lambda: pareto.ranks([(1, 2, 3)], LOWER), r"points\[0\] has 3 numbers for 2 senses"),
        (lambda: pareto.ranks([(1, 2)], ("low", "lower")), "sense 'low' is unknown"),
        (lambda: pareto.ranks([()], ()), "at least one sense"),
        (lambda: pareto.hypervolume([(1, 2)], (3, math.inf), LOWER), "reference has inf"),
    ],
)
def test_wrong_rows_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
