"""Intervals: the binomial's by hand, and how often they are right on a machine that misbehaves."""

import math

import numpy as np
import pytest

from resources import intervals


@pytest.mark.parametrize(
    ("count", "confidence", "places"),
    [  # the order statistics of the sign test, as tables of it print them, counted from 1
        (8, 0.99, (1, 8)),
        (12, 0.99, (2, 11)),
        (20, 0.99, (4, 17)),
        (6, 0.95, (1, 6)),
        (10, 0.95, (2, 9)),
        (25, 0.95, (8, 18)),
    ],
)
def test_the_interval_is_the_sign_tests(count, confidence, places):
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1)).tolist()
    assert intervals.median_interval(values, confidence) == places


def test_too_few_values_give_no_interval():
    assert (
        intervals.least_count(0.99),
        intervals.least_count(0.95),
        intervals.least_count(0.5),
    ) == (
        8,
        6,
        2,
    )
    assert intervals.median_interval([1.0] * 7) is None
    assert intervals.median_interval([1.0] * 8) == (1.0, 1.0)


def test_ratio_is_the_median_of_pairs_and_turns_over_exactly():
    a, b = [1.0, 8.0, 9.0], [1.0, 4.0, 3.0]
    assert intervals.ratio(a, b).value == pytest.approx(2.0)
    rng = np.random.default_rng(3)
    a, b = rng.uniform(1, 2, 20), rng.uniform(1, 2, 20)
    forth, back = intervals.ratio(a, b), intervals.ratio(b, a)
    assert forth.value * back.value == pytest.approx(1)
    assert forth.low * back.high == pytest.approx(1) == forth.high * back.low
    assert (forth.rounds, forth.needed) == (20, 8)


def machine(rng, rounds: int, *, speed_up: float = 1.0, drift=0.3, wander=0.05, noise=0.02):
    """Seconds of two calls in turn, A B B A, under all that a shared machine does at once.

    A linear drift, a speed that wanders (autocorrelation 0.9), noise with heavy tails, bursts of
    other work over several calls, and single calls that take many times as long.
    """
    calls = 2 * rounds
    slow = rng.choice([-1, 1]) * drift * np.linspace(0, 1, calls)
    state = rng.normal() * wander
    for i in range(calls):
        slow[i] += state
        state = 0.9 * state + rng.normal() * wander * math.sqrt(1 - 0.9**2)
    slow += noise * rng.standard_t(3, calls)
    slow += (rng.random(calls) < 0.03) * np.log1p(3 * rng.pareto(1.0, calls))
    for start in np.flatnonzero(rng.random(calls) < 0.02):
        slow[start : start + rng.geometric(0.2)] += rng.exponential(0.4)
    seconds = np.exp(slow).reshape(rounds, 2)
    seconds[1::2] = seconds[1::2, ::-1]
    return seconds[:, 0] * speed_up, seconds[:, 1]


@pytest.mark.parametrize("rounds", [8, 9, 20, 50])
def test_identical_calls_are_called_alike(rounds):
    rng = np.random.default_rng(rounds)
    tries = [intervals.ratio(*machine(rng, rounds)) for _ in range(1000)]
    assert sum(found.distinct for found in tries) <= 20  # of 1,000


def test_drift_alone_never_looks_like_a_speed_up():
    rng = np.random.default_rng(4)
    drifting = [machine(rng, 20, drift=2.0, wander=0.0, noise=0.001) for _ in range(200)]
    assert sum(intervals.ratio(*pair).distinct for pair in drifting) <= 4
    # Without turning around it would, so the test above is not empty.
    first = np.exp(np.linspace(0, 2, 40))
    assert intervals.ratio(first[::2], first[1::2]).distinct


@pytest.mark.parametrize(("order", "most"), [("reversed", 0.035), ("random", 0.012)])
def test_the_outermost_of_ten_calls(order, most):
    """Nominal is 2 / 2^8 = 0.8 %; a speed that wanders over a few calls is the worst case."""
    rng, tries, rounds, calls = np.random.default_rng(6), 4000, 8, 10
    slow = np.empty((rounds * calls, tries))
    slow[0] = rng.normal(size=tries)
    for i in range(1, rounds * calls):
        slow[i] = 0.8 * slow[i - 1] + 0.6 * rng.normal(size=tries)
    first, last = np.exp(0.05 * slow.reshape(rounds, calls, tries))[:, [0, -1]].swapaxes(0, 1)
    turned = np.arange(rounds)[:, None] % 2 == 1
    if order == "random":
        turned = rng.random((rounds, tries)) < 0.5
    a, b = np.where(turned, last, first), np.where(turned, first, last)
    assert np.mean([intervals.ratio(a[:, i], b[:, i]).distinct for i in range(tries)]) <= most


@pytest.mark.parametrize(("rounds", "least"), [(20, 0.9), (50, 0.99)])
def test_ten_percent_are_found(rounds, least):
    rng = np.random.default_rng(5)
    tries = [intervals.ratio(*machine(rng, rounds, speed_up=1.1)) for _ in range(300)]
    right = [found.distinct and found.low > 1 for found in tries]
    covered = [found.low <= 1.1 <= found.high for found in tries]
    assert np.mean(right) >= least
    assert np.mean(covered) >= 0.98


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (intervals.Ratio(1.31, 1.25, 1.38, 9, 8), "1.31x faster (1.25 to 1.38)"),
        (intervals.Ratio(0.8, 0.5, 1 / 1.2, 9, 8), "1.25x slower (1.20 to 2.00)"),
        (intervals.Ratio(1.0, 0.97, 1.05, 9, 8), "no difference seen (0.97 to 1.05)"),
        (intervals.Ratio(2.0, 1.0, 3.0, 9, 8), "no difference seen (1.00 to 3.00)"),
        (intervals.Ratio(1.3, None, None, 5, 8), "too few calls to say (5; 8 are needed)"),
        (intervals.Ratio(1.0051, 1.0042, 1.006, 9, 8), "1.005x faster (1.004 to 1.006)"),
    ],
)
def test_only_a_distinct_ratio_is_described_as_one(found, text):
    assert intervals.describe(found) == text
    assert found.distinct == ("x " in text)


def test_reports_differ_where_intervals_do_not_overlap():
    assert intervals.differ(1, (0.9, 1.1), 2, (1.2, 2.2))
    assert intervals.differ(2, (1.2, 2.2), 1, (0.9, 1.1))
    assert intervals.differ(5, (5, 5), 6, (6, 6))
    assert not intervals.differ(1, (0.9, 1.2), 2, (1.2, 2.2))
    assert not intervals.differ(1, (0.1, 9.0), 2, (1.9, 2.2))
    assert not intervals.differ(1, None, 2, (1.9, 2.2))
    with pytest.raises(ValueError, match="3 does not lie in its interval"):
        intervals.differ(3, (1, 2), 1, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.ratio([1.0], [1.0, 2.0]), "1 and 2 values are not pairs"),
        (
            lambda: intervals.ratio([1.0, 0.0], [1.0, 2.0]),
            "seconds must be above 0; the least is 0.0",
        ),
        (lambda: intervals.ratio([1.0, math.nan], [1.0, 2.0]), "a holds nan"),
        (lambda: intervals.median_interval([]), "at least one number"),
        (lambda: intervals.median_interval([1.0], 99), "confidence=99 must lie between 0 and 1"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
