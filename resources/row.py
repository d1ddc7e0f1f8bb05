"""What every meter gives: numbers with a unit, and how each was obtained."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

Provenance = Literal["measured", "compiled", "modelled", "assumed"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One number with its unit and provenance; or None, and in `note` the reason why not."""

    name: str
    value: float | int | None
    unit: str  # as "B", "tok/s", "FLOP/token"; "" for a count
    provenance: Provenance | None
    note: str = ""
    interval: tuple[float, float] | None = None  # in which the value lies with 99 % confidence

    def __post_init__(self):
        if self.value is None:
            if self.provenance is not None or not self.note:
                raise ValueError(f"row {self.name!r} has no value; give the reason, no provenance.")
        elif self.provenance not in get_args(Provenance):
            legal = ", ".join(get_args(Provenance))
            raise ValueError(f"row {self.name!r} has provenance {self.provenance!r}; use {legal}.")


def not_available(name: str, unit: str, reason: str) -> Row:
    """A row for a number that could not be had, and why."""
    return Row(name, None, unit, None, reason)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One number at several sizes: `rows[i]` is it when `over` is `at[i]`."""

    name: str  # as "state"
    over: str  # as "context", in tokens
    at: Sequence[int]
    rows: Sequence[Row]
