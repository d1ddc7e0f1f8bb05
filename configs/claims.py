"""A claim of a paper as something that runs: what it says, and which rows of a sweep would show it.

A file of `configs/papers/<paper>/` has `CLAIM` and either `get_config()` with `get_sweep()`, what
is trained, or `get_measures()`, what is counted or timed; science/claims.py runs it and gives the
verdict. Neither JAX nor a model is imported here.
"""

import dataclasses
from typing import Literal

from configs.schema import Experiment


@dataclasses.dataclass(frozen=True)
class Above:
    """Row `better` has a better mean than row `worse` by more than `by`.

    The 95 % interval of the difference of means (Welch's t) must lie above `by`.
    """

    better: str
    worse: str
    by: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reaches:
    """A row's score is at least `value`."""

    row: str
    value: float


@dataclasses.dataclass(frozen=True)
class Stays:
    """A row's score is at most `value`."""

    row: str
    value: float


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is held against a sweep; rows are named by their labels, joined by ", "."""

    says: str  # in one sentence
    source: str  # arXiv id, and the table, figure or section
    published: str  # its numbers
    scaled: str  # what is smaller or other here, and why the claim is still tested by it
    checks: tuple[Above | Reaches | Stays, ...]  # all must hold
    cost: str  # time on a device
    statistic: Literal["mean", "best", "median"] = "mean"  # of the seeds, for Reaches and Stays
    needs: str = ""  # hardware without which it is not run


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number of an experiment, untrained, over the tokens of its rows.

    flops: of the loss of a row, from the program's trace. state: bytes that decoding carries after
    so many tokens. memory: bytes of one device at the peak of a training step, as compiled. decode:
    seconds of a token that is written after so many.
    """

    quantity: Literal["flops", "state", "memory", "decode"]
    experiment: Experiment | tuple[Experiment, ...]  # or one for each of `at`
    at: tuple[int, ...]  # tokens
    # exponent: of growth over `at`; slope: last minus first, a token; growth: last over first
    form: Literal["value", "exponent", "slope", "growth"]
