"""Which configs no other beats in every chosen row: Pareto ranks and the front's hypervolume."""

import difflib
import math
from collections.abc import Sequence

from report import pareto
from report.report import Column
from resources.row import Row, not_available


def ranks(columns: Sequence[Column], names: Sequence[str]) -> list[Row]:
    """The rank of each config in the rows `names`; ValueError for a name that no config has."""
    found = [[column.row(name) for name in names] for column in columns]
    for i, name in enumerate(names):
        if all(rows[i] is None for rows in found):
            known = sorted({row.name for column in columns for row in column.rows})
            near = difflib.get_close_matches(name, known, 1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"--pareto: no row is named {name!r}{meant}.")
    title = "Pareto rank"
    whole = [rows for rows in found if all(row and row.value is not None for row in rows)]
    if not whole:
        return [not_available(title, "", "no config has all of the rows")] * len(columns)
    senses: list[pareto.Sense] = [pareto.sense(row) for row in whole[0] if row]
    points = [[_value(row) for row in rows] for rows in whole]
    ranked = iter(pareto.ranks(points, senses))
    chosen = "; ".join(f"{n}, {sense} is better" for n, sense in zip(names, senses, strict=True))
    note = f"{chosen}; hypervolume {_hypervolume(points, senses):.3g}"
    return [
        Row(title, next(ranked), "", "modelled", note)
        if rows in whole
        else not_available(title, "", "it lacks one of the rows")
        for rows in found
    ]


def _value(row: Row | None) -> float:
    assert row is not None and row.value is not None
    return row.value


def _hypervolume(points: Sequence[Sequence[float]], senses: Sequence) -> float:
    """What the front dominates up to the worst of each row, in units of log10 where all are > 0."""
    scaled = [list(column) for column in zip(*points, strict=True)]
    for i, column in enumerate(scaled):
        if min(column) > 0:
            scaled[i] = [math.log10(value) for value in column]
    worst = [
        (min if sense == "higher" else max)(column)
        for sense, column in zip(senses, scaled, strict=True)
    ]
    return pareto.hypervolume([list(p) for p in zip(*scaled, strict=True)], worst, senses)
