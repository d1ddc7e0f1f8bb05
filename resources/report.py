"""The report: rows that say how each number was obtained, as a table and as JSON."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import rich.box
import rich.console
import rich.table

SCHEMA_VERSION = 1
Provenance = Literal["measured", "compiled", "modelled", "assumed"]
LETTERS = {"measured": "m", "compiled": "c", "modelled": "f", "assumed": "a"}
LEGEND = (
    "m measured (clock, allocator)   c compiled (read from the program and its shapes)   "
    "f modelled (a formula over c or m)   a assumed"
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One number with its unit and provenance; or None, and in `note` the reason why not."""

    name: str
    value: float | int | None
    unit: str  # as "B", "tok/s", "FLOP/token"; "" for a count
    provenance: Provenance | None
    note: str = ""

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
class Column:
    """One config's rows; `fingerprint` identifies the config."""

    config: str
    fingerprint: str
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Report:
    """All columns, and what they were obtained on and with."""

    columns: Sequence[Column]
    device: str
    versions: Mapping[str, str]
    commit: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, with the version of their layout."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def write(self, file: str | Path) -> None:
        """Write the JSON; folders are made."""
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def commit() -> str | None:
    """The commit checked out, with "+changes" where files differ; None outside of a repository."""

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def human(value: float, unit: str) -> str:
    """`value` with four digits and a prefix: 12.35k tok/s, 4.5 MB, 18 ms."""
    if unit == "s":
        for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
            if abs(value) >= scale:
                return f"{_digits(value / scale)} {name}"
        return f"{_digits(value * 1e6)} us" if value else "0 s"
    prefix = ""
    for scale, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            value, prefix = value / scale, name
            break
    if not unit or unit.startswith("tok"):
        return f"{_digits(value)}{prefix} {unit}".rstrip()
    return f"{_digits(value)} {prefix}{unit}"


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def show(report: Report, file: Any = None) -> None:
    """Print the table: a column a config, a row a resource, and how each number was obtained."""
    file = file or sys.stdout
    width = None if file.isatty() else 60 + 30 * len(report.columns)
    console = rich.console.Console(file=file, width=width, highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    for column in report.columns:
        table.add_column(column.config, justify="right", overflow="fold")
    notes: dict[str, int] = {}
    by_name = [{row.name: row for row in column.rows} for column in report.columns]
    for name in dict.fromkeys(row.name for column in report.columns for row in column.rows):
        table.add_row(name, *(_cell(rows.get(name), notes) for rows in by_name))
    console.print(table)
    lines = [f"({number}) {note}" for note, number in notes.items()]
    made_with = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines += [LEGEND, f"{report.device}; {made_with}; commit {report.commit or 'unknown'}"]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    if row is None:
        return ""
    mark = f" ({notes.setdefault(row.note, len(notes) + 1)})" if row.note else ""
    if row.value is None or row.provenance is None:
        return f"not available{mark}"
    return f"{human(row.value, row.unit)} {LETTERS[row.provenance]}{mark}"
