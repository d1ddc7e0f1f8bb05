"""Rows that no other row beats in everything: ranks, the front, and the volume it dominates."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from resources.row import Row

Sense = Literal["lower", "higher"]
Points = Sequence[Sequence[float]] | np.ndarray
# Names of rows, as they begin, of which more is better though they are no rates.
HIGHER = ("agreement", "loyalty", "compression", "train MFU", "train HFU", "train share")
HIGHER += ("accuracy", "rows all right")  # of tasks


def sense(row: Row) -> Sense:
    """Whether more of a row is better: of rates, of likeness and of use; of all else it is not."""
    more = row.unit.endswith("/s") or row.name.startswith(HIGHER)
    return "higher" if more else "lower"


def ranks(points: Points, senses: Sequence[Sense]) -> list[int]:
    """1 for a row that no row dominates, 2 for one that only rows of rank 1 dominate, and so on.

    A row dominates another if it is at least as good in every column and better in one; so equal
    rows share a rank. `senses` says for each column whether lower or higher is better.
    Non-dominated sorting (Deb et al. 2002, NSGA-II).
    """
    costs = _costs(points, senses)
    dominates = _dominates(costs)
    found = np.zeros(len(costs), int)
    rank = 0
    while (found == 0).any():
        rank += 1
        left = found == 0
        found[left & ~dominates[left].any(axis=0)] = rank
    return found.tolist()


def front(points: Points, senses: Sequence[Sense]) -> list[int]:
    """Indices of the rows of rank 1, in their order."""
    return np.flatnonzero(~_dominates(_costs(points, senses)).any(axis=0)).tolist()


def hypervolume(points: Points, reference: Sequence[float], senses: Sequence[Sense]) -> float:
    """Volume of what at least one row dominates, bounded by `reference`; exact.

    `reference` is a row worse than all that should count, in the units of `points`: one that is
    not better than it in every column spans no volume. The unit is the product of the columns'
    units, so columns over orders of magnitude are better given as logarithms. Slices along the
    last column, down to three: a front of 150 rows in 5 columns takes seconds.
    """
    costs = _costs(points, senses)
    bound = _costs([reference], senses, "reference")[0]
    inside = np.unique(costs[(costs < bound).all(axis=1)], axis=0)
    return _volume(inside[~_dominates(inside).any(axis=0)], bound)


def _volume(costs: np.ndarray, bound: np.ndarray) -> float:
    """Slabs between neighbours of the last column, each with the volume of the rows below it."""
    if not len(costs):
        return 0.0
    if costs.shape[1] <= 3:
        return _volume_3(costs, bound)
    costs = costs[np.argsort(costs[:, -1], kind="stable")]
    thick = np.diff(costs[:, -1], append=bound[-1])
    slabs = (
        height * _volume(costs[: i + 1, :-1], bound[:-1])
        for i, height in enumerate(thick)
        if height
    )
    return float(sum(slabs))


def _volume_3(costs: np.ndarray, bound: np.ndarray) -> float:
    """The same for one to three columns, missing ones of thickness 1, on the grid of all rows."""
    missing = 3 - costs.shape[1]
    costs = np.pad(costs, ((0, 0), (0, missing)))
    bound = np.pad(bound, (0, missing), constant_values=1.0)
    order_x, order_z = np.argsort(costs[:, 0]), np.argsort(costs[:, 2])
    place_x, place_z = np.argsort(order_x), np.argsort(order_z)
    lowest = np.full((len(costs), len(costs)), bound[1])
    lowest[place_z, place_x] = costs[:, 1]
    lowest = np.minimum.accumulate(np.minimum.accumulate(lowest, axis=0), axis=1)
    wide = np.diff(costs[order_x, 0], append=bound[0])
    thick = np.diff(costs[order_z, 2], append=bound[2])
    return float(thick @ (bound[1] - lowest) @ wide)


def _dominates(costs: np.ndarray) -> np.ndarray:
    """(i, j): whether row i dominates row j; lower is better."""
    left, right = costs[:, None], costs[None]
    return np.logical_and((left <= right).all(axis=-1), (left < right).any(axis=-1))


def _costs(points: Points, senses: Sequence[Sense], name: str = "points") -> np.ndarray:
    """Numbers with every column turned so that lower is better."""
    for sense in senses:
        if sense not in ("lower", "higher"):
            raise ValueError(f"sense {sense!r} is unknown; use 'lower' or 'higher'.")
    if not len(senses):
        raise ValueError("there is no column to rank by; give at least one sense.")
    for i, row in enumerate(points):
        where = f"{name}[{i}]" if name == "points" else name
        if len(row) != len(senses):
            raise ValueError(f"{where} has {len(row)} numbers for {len(senses)} senses.")
        for j, value in enumerate(row):
            if not _finite(value):
                raise ValueError(f"{where} has {value} in column {j}; leave such a row out.")
    rows = [[float(value) for value in row] for row in points]
    signs = np.array([1.0 if sense == "lower" else -1.0 for sense in senses])
    return np.array(rows).reshape(-1, len(senses)) * signs


def _finite(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))
