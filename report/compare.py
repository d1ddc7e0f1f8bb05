"""What changed between two reports, and whether the spread of the measurements allows to say so."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table

from report.report import Column, Report
from report.table import PIPED, cell, origin
from resources import intervals
from resources.row import Row


class Change(NamedTuple):
    """One row in both reports."""

    config: str
    name: str
    before: Row | None
    after: Row | None
    verdict: str


def changes(before: Report, after: Report) -> list[Change]:
    """Every row that either report has, configs paired by name; two single configs are a pair."""
    return [change for pair in _pairs(before, after) for change in _rows(*pair)]


def _pairs(before: Report, after: Report) -> list[tuple[Column, Column]]:
    if len(before.columns) == len(after.columns) == 1:
        return [(before.columns[0], after.columns[0])]
    later = {column.config: column for column in after.columns}
    pairs = [(c, later[c.config]) for c in before.columns if c.config in later]
    if not pairs:
        names = ", ".join(c.config for c in before.columns), ", ".join(later)
        raise ValueError(f"the reports have no config in common: {names[0]} and {names[1]}.")
    return pairs


def _rows(before: Column, after: Column) -> Iterator[Change]:
    same = before.config == after.config
    label = before.config if same else f"{before.config} -> {after.config}"
    for name in dict.fromkeys(row.name for row in (*before.rows, *after.rows)):
        old, new = before.row(name), after.row(name)
        yield Change(label, name, old, new, verdict(old, new))


def verdict(before: Row | None, after: Row | None) -> str:
    """Whether a number changed: exact ones by their values, measured ones by their intervals.

    The intervals hold what varied within each run. What differs from process to process, or from
    day to day, is not in them: for a speed-up that you publish time both configs in one run.
    """
    if before is None or after is None:
        return "only in one"
    if before.value is None or after.value is None:
        return "" if before.value is after.value else "not available in one"
    if before.value == after.value:
        return "equal"
    times = f"x {after.value / before.value:.3f}" if before.value else "from 0"
    kinds = {before.provenance, after.provenance}
    if kinds == {"compiled"} or (kinds == {"modelled"} and not _timed(before)):
        return times
    if None in (before.interval, after.interval):
        return "spread not known"
    if intervals.differ(before.value, before.interval, after.value, after.interval):
        return f"{times}, distinct"
    return "no difference seen: the intervals overlap"


def _timed(row: Row) -> bool:
    """Whether a modelled number rests on a clock: those in FLOPs and bytes do not."""
    return not row.unit.startswith(("FLOP", "B"))


def show(before: Report, after: Report, file: Any = None) -> None:
    """Print the rows that differ, and where the reports come from."""
    file = file or sys.stdout
    width = None if file.isatty() else PIPED
    console = rich.console.Console(file=file, width=width, highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if name in ("", "change") else "right")
    found = changes(before, after)
    for config in dict.fromkeys(change.config for change in found):
        table.add_section()
        table.add_row(f"[bold]{config}[/bold]")
        for change in found:
            if change.config == config and change.verdict not in ("", "equal"):
                cells = cell(change.before), cell(change.after)
                table.add_row(change.name, *cells, change.verdict)
    console.print(table)
    equal = sum(change.verdict == "equal" for change in found)
    lines = [f"{equal} rows are equal.", f"before: {origin(before)}", f"after: {origin(after)}"]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
