"""A report as text: a table for the terminal, Markdown, and comma-separated values."""

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any

import rich.box
import rich.console
import rich.table

from report.report import Column, Contest, Crossover, Report, row_names
from resources.row import Row

PIPED = 10_000  # columns for what is piped: it is not cut to a screen's width
LETTERS = {"measured": "m", "compiled": "c", "modelled": "f", "assumed": "a"}
LEGEND = (
    "m measured (clock, allocator, energy counter)   "
    "c compiled (read from the program and its shapes)   "
    "f modelled (a formula over c or m)   a assumed"
)


def show(report: Report, file: Any = None) -> None:
    """Print the table: a column a config, a row a number, and how each number was obtained."""
    file = file or sys.stdout
    width = None if file.isatty() else PIPED
    console = rich.console.Console(file=file, width=width, highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    for column in report.columns:
        table.add_column(column.config, justify="right", overflow="fold")
    notes: dict[str, int] = {}
    for resource, lines in _lines(report, notes):
        table.add_section()
        table.add_row(f"[bold]{resource}[/bold]")
        for name, *cells in lines:
            table.add_row(name, *cells)
    console.print(table)
    for column in report.columns:
        if column.profile:
            console.print(_profile(column))
    console.print("\n".join(footer(report, notes)), markup=False, soft_wrap=True)


def _profile(column: Column) -> rich.table.Table:
    """Where a training step spends its time, by module."""
    title = f"{column.config}: where a training step spends its time"
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for head in ("module", "pass", "time", "share", "bytes"):
        table.add_column(head, justify="left" if head in ("module", "pass") else "right")
    for hot in column.profile:
        numbers = human(hot.seconds, "s"), f"{hot.share:.1%}", human(hot.bytes, "B")
        table.add_row(hot.path, hot.direction, *numbers)
    return table


def markdown(report: Report) -> str:
    """The same as a Markdown page."""
    notes: dict[str, int] = {}
    head = ["", *(column.config for column in report.columns)]
    rows = []
    for resource, lines in _lines(report, notes):
        rows += [[f"**{resource}**", *[""] * len(report.columns)], *lines]
    table = [head, ["---", *["---:"] * len(report.columns)], *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    return text + "\n\n" + "\n\n".join(footer(report, notes)) + "\n"


def comma_separated(report: Report) -> str:
    """One line a number: config, resource, name, over, at, value, unit, provenance, interval, note.

    A number without a value has an empty one; `over` and `at` say where on a curve it lies.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    head = "config resource name over at value unit provenance low high note"
    writer.writerow(head.split())
    for column in report.columns:
        for resource, rows in column.resources.items():
            writer.writerows([column.config, resource, r.name, "", "", *_fields(r)] for r in rows)
        for curve in column.curves:
            for at, row in zip(curve.at, curve.rows, strict=True):
                place = [column.config, "curve", curve.name, curve.over, at]
                writer.writerow([*place, *_fields(row)])
    return text.getvalue()


def _fields(row: Row) -> list:
    low, high = row.interval or ("", "")
    value = "" if row.value is None else row.value
    return [value, row.unit, row.provenance or "not available", low, high, row.note]


def human(value: float, unit: str) -> str:
    """`value` with four digits and a prefix: 12.35k tok/s, 4.5 MB, 18 ms."""
    if unit == "s":
        for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
            if abs(value) >= scale:
                return f"{_digits(value / scale)} {name}"
        return f"{_digits(value * 1e6)} us" if value else "0 s"
    if unit == "%":
        return f"{_digits(value)} %"
    prefix = ""
    for scale, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            value, prefix = value / scale, name
            break
    if not unit or unit.startswith("tok"):
        return f"{_digits(value)}{prefix} {unit}".rstrip()
    if unit.startswith("$"):
        return f"{_digits(value)}{prefix} {unit}"
    return f"{_digits(value)} {prefix}{unit}"


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def cell(row: Row | None) -> str:
    """A number as the table shows it, without its note; empty where a config lacks the row."""
    if row is None:
        return ""
    if row.value is None or row.provenance is None:
        return "not available"
    return f"{human(row.value, row.unit)} {LETTERS[row.provenance]}"


def told(found: Contest | Crossover) -> str:
    """What a comparison of two configs shows, in a line."""
    if isinstance(found, Contest):
        return f"{found.kind}, {found.config} against {found.than}: {found.verdict}"
    line = f"{found.kind} over {found.over}, {found.config} against {found.than}: {found.verdict}"
    return f"{line}; {found.why}" if found.why else line


def _lines(report: Report, notes: dict[str, int]) -> Iterator[tuple[str, list[list[str]]]]:
    """For each resource its lines: a name, then a cell for each config, with numbers of notes."""
    columns = report.columns
    for resource in dict.fromkeys(name for column in columns for name in column.resources):
        rows = [{r.name: r for r in column.resources.get(resource, ())} for column in columns]
        names = row_names(columns, resource)
        yield resource, [[n, *(_noted(found.get(n), notes) for found in rows)] for n in names]


def _noted(row: Row | None, notes: dict[str, int]) -> str:
    if row is None or not row.note:
        return cell(row)
    return f"{cell(row)} ({notes.setdefault(row.note, len(notes) + 1)})"


def footer(report: Report, notes: dict[str, int]) -> list[str]:
    """The lines under a table: notes by number, who was faster, what letters mean, the origin."""
    return [
        *(f"({number}) {note}" for note, number in notes.items()),
        *report.notes,
        *map(told, (*report.contests, *report.crossovers)),
        LEGEND,
        origin(report),
    ]


def origin(report: Report) -> str:
    """Device, versions and commit in one line."""
    made_with = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"{report.device}; {made_with}; commit {report.commit or 'unknown'}"
