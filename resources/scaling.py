"""Curves over length: the exponent of growth, where two cross, and the roofline that says why."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from resources import intervals


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent, the exponent between `low` and `high` at the confidence asked."""

    exponent: float
    low: float
    high: float
    factor: float
    r2: float  # share of the variance of log y that the line explains
    local: tuple[float, ...]  # exponents between neighbours, by rising x: a curve shows here


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Where one curve meets another, its interval, and in words who is better where.

    All three numbers are None where there is no crossing, more than one, or no telling.
    """

    length: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of a program on a device, and what sets them."""

    seconds: float
    bound: Literal["compute", "memory"]
    intensity: float  # FLOP/B of the program
    ridge: float  # FLOP/B of the device: below it the memory is what one waits for


def exponent(x: intervals.Values, y: intervals.Values, confidence: float = 0.95) -> PowerLaw:
    """log y = log factor + exponent * log x by least squares; Student's t with n - 2 degrees.

    The interval holds if the logarithms scatter about a line, alike at every x. A curve is no
    line, however high its r2: look at `local`. Raises ValueError for fewer than three different
    x or for numbers that are not above 0.
    """
    from scipy.special import stdtrit

    log_x, log_y = _logs("x", x), _logs("y", y)
    if len(log_x) != len(log_y):
        raise ValueError(f"{len(log_x)} x and {len(log_y)} y are not pairs; give as many of each.")
    different = np.unique(log_x)
    if len(different) < 3:
        raise ValueError(f"{len(different)} different x cannot show a spread; 3 are needed.")
    intervals.check_confidence(confidence)
    from_mean_x, from_mean_y = log_x - log_x.mean(), log_y - log_y.mean()
    square_x = float(from_mean_x @ from_mean_x)
    slope = float(from_mean_x @ from_mean_y) / square_x
    rest = from_mean_y - slope * from_mean_x
    unexplained, total = float(rest @ rest), float(from_mean_y @ from_mean_y)
    free = len(log_x) - 2
    reach = float(stdtrit(free, (1 + confidence) / 2)) * math.sqrt(unexplained / free / square_x)
    # A constant y leaves nothing to explain but rounding.
    rounding = len(log_y) * (np.finfo(float).eps * max(1.0, np.abs(log_y).max())) ** 2
    r2 = 1 - unexplained / total if total > rounding else 1.0
    means = np.array([log_y[log_x == at].mean() for at in different])
    local = tuple((np.diff(means) / np.diff(different)).tolist())
    factor = math.exp(log_y.mean() - slope * log_x.mean())
    return PowerLaw(slope, slope - reach, slope + reach, factor, r2, local)


def crossover(
    lengths: Sequence[float],
    a: Sequence | np.ndarray,
    b: Sequence | np.ndarray,
    *,
    names: tuple[str, str] = ("A", "B"),
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Crossover:
    """The length at which log(a / b), linear in log length between neighbours, crosses 0.

    `a` and `b` are costs, lower is better: (lengths, repeats), timed in turn and so paired, or
    (lengths,) or one column for exact numbers. First the signs: at each length b is better or
    worse only if the `median_interval` of the ratios leaves 1 out, at a confidence that holds for
    all lengths together. Between the lengths where the sign is sure to change, the medians
    give the crossing, and resampled repeats (percentile bootstrap) its interval: from the
    first crossing of a resample to its last. For exact numbers the interval is that point, or
    the stretch over which they are equal. Repeats too few for that confidence give no crossing.
    """
    intervals.check_confidence(confidence)
    log_length = _logs("lengths", lengths)
    if len(log_length) < 2 or not (np.diff(log_length) > 0).all():
        raise ValueError(f"lengths={list(lengths)} must rise, and be at least 2.")
    ratios = _ratios(log_length, a, b)
    repeats = ratios.shape[1]
    share = 1 - (1 - confidence) / len(log_length)
    needed = intervals.least_count(share)
    if 1 < repeats < needed:
        text = f"too few repeats to say ({repeats}; {needed} are needed)"
        return Crossover(None, None, None, text)
    signs = _signs(ratios, share)
    sure = np.flatnonzero(signs)
    changes = [(i, j) for i, j in zip(sure, sure[1:], strict=False) if signs[i] != signs[j]]
    if len(changes) != 1:
        return Crossover(None, None, None, _several(lengths, signs, changes, names))
    start, end = changes[0]
    between = slice(start, end + 1)
    middle = _crossings(log_length[between], np.median(ratios[between], axis=1))
    point = math.exp(middle[len(middle) // 2])
    low, high = _bootstrap(
        log_length[between], ratios[between], confidence, resamples, np.random.default_rng(seed)
    )
    low, high = min(low, point), max(high, point)
    where = f"from {_number(point)} on" if signs[end] > 0 else f"up to {_number(point)}"
    interval = f" ({_number(low)} to {_number(high)})" if repeats > 1 else ""
    outside = [int(at) for at in np.flatnonzero(signs == 0) if not start < at < end]
    text = f"{names[1]} is better {where}{interval}{_undecided(lengths, outside)}"
    return Crossover(point, low, high, text)


def roofline(flops: float, bytes: float, peak_flops: float, bandwidth: float) -> Roofline:
    """seconds = max(flops / peak_flops, bytes / bandwidth); FLOP, B, FLOP/s and B/s.

    No program is faster: it must do its arithmetic and move its bytes, at best at the same time.
    "compute" where the intensity, flops / bytes, reaches the ridge, peak_flops / bandwidth.
    Source: Williams, Waterman and Patterson 2009, "Roofline".
    """
    given = {"bytes": bytes, "peak_flops": peak_flops, "bandwidth": bandwidth}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite.")
    if not 0 <= flops < math.inf:
        raise ValueError(f"flops={flops} must be at least 0 and finite.")
    arithmetic, traffic = flops / peak_flops, bytes / bandwidth
    bound = "compute" if arithmetic >= traffic else "memory"
    return Roofline(max(arithmetic, traffic), bound, flops / bytes, peak_flops / bandwidth)


def _ratios(
    log_length: np.ndarray, a: Sequence | np.ndarray, b: Sequence | np.ndarray
) -> np.ndarray:
    """log(a / b) as (lengths, repeats): above 0 where b is better."""
    x, y = (np.asarray(values, np.float64) for values in (a, b))
    if x.shape != y.shape or x.ndim not in (1, 2) or len(x) != len(log_length) or not x.size:
        raise ValueError(
            f"a {x.shape} and b {y.shape} must both be (lengths,) or (lengths, repeats) "
            f"for {len(log_length)} lengths."
        )
    columns = [_logs(name, v.ravel()).reshape(len(v), -1) for name, v in (("a", x), ("b", y))]
    return columns[0] - columns[1]


def _signs(ratios: np.ndarray, confidence: float) -> np.ndarray:
    """1 where b is surely better, -1 where surely worse, else 0; of one column, the sign."""
    if ratios.shape[1] == 1:
        return np.sign(ratios[:, 0]).astype(int)
    found = [intervals.median_interval(row, confidence) for row in ratios]
    return np.array([0 if i is None else (i[0] > 0) - (i[1] < 0) for i in found])


def _crossings(log_length: np.ndarray, values: np.ndarray) -> list[float]:
    """Every log length at which a line through the points is 0, rising; the ends may be too."""
    found = [at for at, value in zip(log_length, values, strict=True) if value == 0]
    for i in np.flatnonzero(values[:-1] * values[1:] < 0):
        part = values[i] / (values[i] - values[i + 1])
        found.append(log_length[i] + part * (log_length[i + 1] - log_length[i]))
    return sorted(float(at) for at in found)


def _bootstrap(
    log_length: np.ndarray,
    ratios: np.ndarray,
    confidence: float,
    resamples: int,
    generator: np.random.Generator,
) -> intervals.Interval:
    """Quantiles of the first and of the last crossing over resampled repeats."""
    count, repeats = ratios.shape
    if repeats == 1:
        found = _crossings(log_length, ratios[:, 0])
        return math.exp(found[0]), math.exp(found[-1])
    ends = []
    for _ in range(resamples):
        # Repeats are drawn anew at each length: the lengths were not timed together.
        drawn = generator.integers(repeats, size=(count, repeats))
        medians = np.median(np.take_along_axis(ratios, drawn, axis=1), axis=1)
        found = _crossings(log_length, medians)
        # The signs at both ends are sure; a rare resample without a crossing tells nothing.
        ends.append((found[0], found[-1]) if found else (log_length[0], log_length[-1]))
    first, last = np.array(ends).T
    tail = (1 - confidence) / 2
    return math.exp(np.quantile(first, tail)), math.exp(np.quantile(last, 1 - tail))


def _several(
    lengths: Sequence[float], signs: np.ndarray, changes: list, names: tuple[str, str]
) -> str:
    """The verdict where the sure signs change never, or more than once."""
    open_at = _undecided(lengths, np.flatnonzero(signs == 0))
    if changes:
        between = ", ".join(f"{_number(lengths[i])} to {_number(lengths[j])}" for i, j in changes)
        return f"several crossings: within {between}{open_at}"
    if not signs.any():
        return "no difference seen at any length"
    better = names[1] if signs.max() > 0 else names[0]
    if signs.all():
        return f"{better} is better everywhere" + (
            "" if better == names[1] else f": {names[1]} never within the range"
        )
    return f"{better} is better wherever a difference is seen{open_at}"


def _undecided(lengths: Sequence[float], at: Sequence[int] | np.ndarray) -> str:
    if not len(at):
        return ""
    return "; no difference seen at " + ", ".join(_number(lengths[i]) for i in at)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _logs(name: str, values: intervals.Values) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{name} has shape {numbers.shape}; give a row of numbers.")
    wrong = ~(np.isfinite(numbers) & (numbers > 0))
    if wrong.any():
        raise ValueError(f"{name} holds {numbers[wrong][0]}; a logarithm needs numbers above 0.")
    return np.log(numbers)
