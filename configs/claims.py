"""A claim of a paper as something that runs: what it says, and which rows of a sweep would show it.

A file of `configs/papers/<paper>/` has `get_config()`, `get_sweep()` and `CLAIM`; science/claims.py
runs it and gives the verdict. Neither JAX nor a model is imported here.
"""

import dataclasses
from typing import Literal


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
