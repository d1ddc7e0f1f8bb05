"""Exponents, crossings and rooflines: planted ones are recovered, inside their intervals."""

import math

import numpy as np
import pytest

from resources import scaling

LENGTHS = [128, 256, 512, 1024, 2048, 4096]


def test_an_exact_power_is_recovered():
    found = scaling.exponent(LENGTHS, [3e-6 * n**1.7 for n in LENGTHS])
    assert found.exponent == pytest.approx(1.7)
    assert found.factor == pytest.approx(3e-6)
    assert found.high - found.low < 1e-10
    assert found.r2 == pytest.approx(1)
    assert found.local == pytest.approx([1.7] * 5)


def test_the_interval_is_students():
    """By hand: log2 y = 0, 1, 1 over log2 x = 0, 1, 2; t(0.975, 1) = 12.706."""
    found = scaling.exponent([1, 2, 4], [1, 2, 2])
    error = math.sqrt((1 / 6) / 1 / 2)
    assert found.exponent == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx(
        (0.5 - 12.7062 * error, 0.5 + 12.7062 * error), rel=1e-5
    )
    assert found.r2 == pytest.approx(0.75)


def test_the_interval_covers_at_its_confidence():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        y = np.array(LENGTHS) ** 1.3 * np.exp(0.1 * rng.normal(size=6))
        found = scaling.exponent(LENGTHS, y.tolist(), 0.9)
        covered += found.low <= 1.3 <= found.high
    assert 0.86 <= covered / 500 <= 0.94


def test_local_exponents_show_a_curve_that_r2_hides():
    """n + n^2 / 512 is linear first and quadratic last; r2 does not mind."""
    found = scaling.exponent(LENGTHS[::-1], [n + n**2 / 512 for n in LENGTHS[::-1]])
    assert found.r2 > 0.98
    assert list(found.local) == sorted(found.local)
    assert found.local[0] < 1.3 and found.local[-1] > 1.8


def test_repeats_and_constants():
    found = scaling.exponent([1, 1, 2, 4], [1, 4, 4, 8])
    assert found.local == pytest.approx([1, 1])
    constant = scaling.exponent([1, 2, 3], [7, 7, 7])
    assert (constant.exponent, constant.r2) == pytest.approx((0, 1))


def test_exact_curves_cross_where_they_do():
    quadratic, linear = [n**2 for n in LENGTHS], [700 * n for n in LENGTHS]
    found = scaling.crossover(LENGTHS, quadratic, linear)
    assert found.length == pytest.approx(700)
    assert found.low == found.high == found.length
    assert found.verdict == "B is better from 700 on"
    back = scaling.crossover(LENGTHS, linear, quadratic, names=("gla", "attention"))
    assert back.length == pytest.approx(700)
    assert back.verdict == "attention is better up to 700"
    column = np.array(LENGTHS)[:, None]
    at_a_point = scaling.crossover(LENGTHS, column**2, 512 * column)
    assert at_a_point.length == pytest.approx(512)


def test_curves_that_touch_and_curves_that_lie_on_each_other():
    one = [1.0] * 6
    touching = scaling.crossover(LENGTHS, one, [2, 1, 2, 2, 0.5, 0.5])
    assert touching.low == touching.length == pytest.approx(math.sqrt(1024 * 2048))
    assert touching.verdict == "B is better from 1448 on; no difference seen at 256"
    along = scaling.crossover(LENGTHS, one, [2, 2, 1, 1, 0.5, 0.5])
    assert (along.low, along.high) == pytest.approx((512, 1024))
    rng = np.random.default_rng(5)
    a, b = np.exp(0.05 * rng.normal(size=(2, 6, 20)))
    noisy = scaling.crossover(LENGTHS, a, b * np.array([[2, 2, 1, 1, 1, 0.5]]).T)
    assert noisy.low <= 540 and noisy.high >= 1950


def test_no_crossing_and_several():
    one = [1.0] * 6
    cases = {
        "B is better everywhere": [0.5] * 6,
        "A is better everywhere: B never within the range": [2.0] * 6,
        "no difference seen at any length": one,
        "several crossings: within 256 to 512, 1024 to 2048": [2, 2, 0.5, 0.5, 2, 2],
        "B is better wherever a difference is seen; no difference seen at 128": [1] + [0.5] * 5,
    }
    for verdict, b in cases.items():
        assert scaling.crossover(LENGTHS, one, b) == scaling.Crossover(None, None, None, verdict)


def timed(rng, exponents, repeats=12, noise=0.05):
    """Two power laws that meet at 700, with noise that both share and outliers that they do not."""
    lengths = np.array(LENGTHS)[:, None]
    shared = rng.normal(size=(6, repeats)) * 0.3
    both = []
    for power in exponents:
        slow = rng.normal(size=(6, repeats)) * noise
        slow += (rng.random((6, repeats)) < 0.03) * np.log1p(3 * rng.pareto(1.0, (6, repeats)))
        both.append((lengths / 700) ** power * np.exp(shared + slow))
    return both


def test_noisy_crossings_lie_inside_their_intervals():
    rng = np.random.default_rng(1)
    found = [
        scaling.crossover(LENGTHS, *timed(rng, (2.0, 1.0)), resamples=200, seed=i)
        for i in range(60)
    ]
    assert all(one.length is not None for one in found)
    assert sum(one.low <= 700 <= one.high for one in found) >= 55
    assert all(one.low <= one.length <= one.high for one in found)
    assert np.median([one.high / one.low for one in found]) < 1.3
    assert found[0].verdict.startswith(f"B is better from {found[0].length:.0f} on (")


def test_curves_that_hardly_part_give_a_wider_interval_or_none():
    rng = np.random.default_rng(2)
    found = [
        scaling.crossover(LENGTHS, *timed(rng, (1.1, 1.0)), resamples=200, seed=i)
        for i in range(40)
    ]
    known = [one for one in found if one.length is not None]
    assert len(known) >= 10
    assert sum(one.low <= 700 <= one.high for one in known) >= 0.9 * len(known)
    assert np.median([one.high / one.low for one in known]) > 1.5
    assert any("; no difference seen at " in one.verdict for one in found)


def test_identical_curves_do_not_cross():
    rng = np.random.default_rng(3)
    found = [scaling.crossover(LENGTHS, *timed(rng, (1.0, 1.0)), resamples=50) for _ in range(100)]
    assert sum(one.verdict == "no difference seen at any length" for one in found) >= 93
    assert all(one.length is None for one in found)


def test_a_seed_repeats_and_few_repeats_say_nothing():
    a, b = timed(np.random.default_rng(4), (2.0, 1.0), noise=0.3)
    assert scaling.crossover(LENGTHS, a, b, seed=1) == scaling.crossover(LENGTHS, a, b, seed=1)
    few = scaling.crossover(LENGTHS, a[:, :3], b[:, :3])
    assert few == scaling.Crossover(None, None, None, "too few repeats to say (3; 8 are needed)")


def test_roofline_by_hand():
    """A device of 100 FLOP/s and 10 B/s: its ridge is at 10 FLOP/B."""
    assert scaling.roofline(400, 20, 100, 10) == scaling.Roofline(4.0, "compute", 20.0, 10.0)
    assert scaling.roofline(100, 20, 100, 10) == scaling.Roofline(2.0, "memory", 5.0, 10.0)
    assert scaling.roofline(200, 20, 100, 10).bound == "compute"
    assert scaling.roofline(0, 20, 100, 10) == scaling.Roofline(2.0, "memory", 0.0, 10.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling.exponent([1, 2], [1, 2]), "2 different x cannot show a spread; 3"),
        (lambda: scaling.exponent([1, 1, 2], [1, 2, 3]), "2 different x"),
        (lambda: scaling.exponent([1, 2, 3], [1, 0, 3]), "y holds 0.0"),
        (lambda: scaling.exponent([1, 2, -3], [1, 2, 3]), "x holds -3.0"),
        (lambda: scaling.exponent([1, 2, 3], [1, 2]), "3 x and 2 y are not pairs"),
        (lambda: scaling.crossover([1, 2], [1, 2], [1, math.nan]), "b holds nan"),
        (lambda: scaling.crossover([2, 1], [1, 2], [1, 2]), "must rise"),
        (lambda: scaling.crossover([1, 2], [[1, 2]], [[1, 2]]), "for 2 lengths"),
        (lambda: scaling.crossover([1, 2], [1, 2], [1, 2], confidence=95), "confidence=95"),
        (lambda: scaling.roofline(1, 0, 1, 1), "bytes=0 must be above 0"),
        (lambda: scaling.roofline(-1, 1, 1, 1), "flops=-1 must be at least 0"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
