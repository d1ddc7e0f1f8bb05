"""How sure a timing is: intervals from the order of the values, whatever their distribution."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
Values = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median of a_i / b_i with its interval; both ends None where `rounds` is below `needed`."""

    value: float
    low: float | None
    high: float | None
    rounds: int
    needed: int  # the fewest rounds that allow an interval

    @property
    def distinct(self) -> bool:
        """Whether there is an interval and 1 lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless `confidence` is a probability that an interval can have."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.99.")


def least_count(confidence: float = 0.99) -> int:
    """The smallest n with 2 * 0.5^n <= 1 - confidence: 8 for 99 %, 6 for 95 %."""
    check_confidence(confidence)
    n = 1
    while _outside(n, 1) > 1 - confidence:
        n += 1
    return n


def median_interval(values: Values, confidence: float = 0.99) -> Interval | None:
    """(x_(k), x_(n+1-k)), the largest k with 2 P(Binomial(n, 1/2) < k) <= 1 - confidence.

    The sign test, inverted: each of n independent values lies below the median with probability
    1/2, and the median lies outside of these two only if fewer than k lie on one side of it.
    Nothing else is assumed of the distribution. None where even the smallest and the largest
    value do not reach the confidence (`least_count`).
    """
    ordered = np.sort(_numbers("values", values))
    n, k = len(ordered), 0
    if n < least_count(confidence):
        return None
    while _outside(n, k + 1) <= 1 - confidence:
        k += 1
    return float(ordered[k - 1]), float(ordered[n - k])


def ratio(a: Values, b: Values, confidence: float = 0.99) -> Ratio:
    """exp(median of log(a_i / b_i)) with `median_interval`: above 1 where b is faster.

    `a` and `b` are seconds of two calls timed in turn, paired by round, as `interleaved` returns
    them. A burst or an outlier spoils a round, not the median. Drift enters a_i / b_i with the
    sign of the order in that round: as each round reverses the order, A B B A, it pushes as many
    rounds up as down, and the interval holds although neighbouring calls depend on each other.
    Timed as A B A B it would not. Each round's order drawn at random makes it exact: for equal
    calls every sign is a fair coin, whatever the machine does. Reversing comes close for two
    calls; of ten calls in turn the outermost meet at every turn, and where the speed wanders
    over a few calls, 99 % become 97 %.

    It speaks of one process: what is fixed for its lifetime, as the layout of its memory, does
    not show in any interval.
    """
    x, y = _numbers("a", a), _numbers("b", b)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values are not pairs; give as many of each.")
    if not (x > 0).all() or not (y > 0).all():
        raise ValueError(f"seconds must be above 0; the least is {min(x.min(), y.min())}.")
    logs = np.log(x) - np.log(y)
    found = median_interval(logs, confidence)
    low, high = (None, None) if found is None else (math.exp(found[0]), math.exp(found[1]))
    value = math.exp(float(np.median(logs)))
    return Ratio(value, low, high, len(logs), least_count(confidence))


def describe(found: Ratio) -> str:
    """One phrase for b against a; a speed-up only where the interval leaves 1 out."""
    if found.low is None or found.high is None:
        return f"too few calls to say ({found.rounds}; {found.needed} are needed)"
    if not found.distinct:
        return f"no difference seen ({found.low:.2f} to {found.high:.2f})"
    if found.low > 1:
        value, low, high, word = found.value, found.low, found.high, "faster"
    else:
        value, low, high, word = 1 / found.value, 1 / found.high, 1 / found.low, "slower"
    digits = _digits(low)
    return f"{value:.{digits}f}x {word} ({low:.{digits}f} to {high:.{digits}f})"


def differ(
    value_a: float, interval_a: Interval | None, value_b: float, interval_b: Interval | None
) -> bool:
    """Whether two numbers of different reports are distinct: their intervals do not overlap.

    False where either has no interval: nothing is known of its spread. An exact number is its own
    interval, (v, v). The intervals cover what varied within each run; that the machine itself
    changed between the runs is not in them, so times are better compared by `ratio`.
    """
    for value, interval in ((value_a, interval_a), (value_b, interval_b)):
        if interval is not None and not interval[0] <= value <= interval[1]:
            raise ValueError(f"{value} does not lie in its interval {interval}.")
    if interval_a is None or interval_b is None:
        return False
    return interval_a[1] < interval_b[0] or interval_b[1] < interval_a[0]


def _outside(n: int, k: int) -> float:
    """2 P(Binomial(n, 1/2) < k)."""
    return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


def _digits(low: float) -> int:
    """Decimals that tell `low`, above 1, from 1: two, or as many as it takes."""
    return max(2, -math.floor(math.log10(low - 1)))


def _numbers(name: str, values: Values) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"{name} has shape {numbers.shape}; give a row of at least one number.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds {numbers[~np.isfinite(numbers)][0]}; every value counts.")
    return numbers
