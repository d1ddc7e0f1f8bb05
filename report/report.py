"""The report: rows that say how each number was obtained, by resource, and their JSON.

The layout of the JSON is docs/report.schema.json.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resources.row import Curve, Row

SCHEMA_VERSION = 2
RESOURCES = ("compute", "memory", "energy", "money", "network", "quality")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Hot:
    """One place of a profile: what the operations of a module take in one training step."""

    path: str  # of modules, the operation last
    direction: str  # forward, backward, recomputed or other
    calls: float
    seconds: float  # measured, all threads or devices together
    share: float  # of all operations' seconds
    bytes: float  # read and written, from the program


@dataclasses.dataclass(frozen=True)
class Column:
    """One config's rows by resource, and its curves; `fingerprint` identifies the config."""

    config: str
    fingerprint: str
    resources: Mapping[str, Sequence[Row]]
    curves: Sequence[Curve] = ()
    profile: Sequence[Hot] = ()  # those that take longest first

    def __post_init__(self):
        for name in self.resources:
            if name not in RESOURCES:
                raise ValueError(f"no resource {name!r}; use {', '.join(RESOURCES)}.")
        names = [row.name for row in self.rows]
        twins = sorted({name for name in names if names.count(name) > 1})
        if twins:
            raise ValueError(f"{self.config} has two rows {twins[0]!r}.")

    @property
    def rows(self) -> list[Row]:
        """All rows, resource after resource."""
        return [row for rows in self.resources.values() for row in rows]

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


def row_names(columns: Sequence[Column], resource: str) -> list[str]:
    """Names of all rows of a resource: one that the first config lacks follows its neighbour."""
    names: list[str] = []
    for column in columns:
        at = 0
        for row in column.resources.get(resource, ()):
            if row.name not in names:
                names.insert(at, row.name)
            at = names.index(row.name) + 1
    return names


@dataclasses.dataclass(frozen=True)
class Contest:
    """One kind of call of two configs that were timed in turn."""

    kind: str  # as "train"
    config: str
    than: str
    ratio: float  # the median of the seconds of `than` over those of `config`: above 1 is faster
    interval: tuple[float, float] | None  # of 99 %; None: too few calls to say
    verdict: str  # a speed-up only where the interval leaves 1 out


@dataclasses.dataclass(frozen=True)
class Crossover:
    """The size from which on one kind of call of `config` takes less than that of `than`."""

    kind: str  # as "prefill", in seconds a token, or "train memory", in bytes
    over: str  # as "length"
    config: str
    than: str
    at: float | None  # None: no single one within the sizes, see the verdict
    interval: tuple[float, float] | None  # of 99 %
    verdict: str
    why: str = ""  # the work of both at the first size after it


@dataclasses.dataclass(frozen=True)
class Report:
    """All columns, and what they were obtained on and with."""

    columns: Sequence[Column]
    device: str
    versions: Mapping[str, str]
    commit: str | None
    contests: Sequence[Contest] = ()
    crossovers: Sequence[Crossover] = ()
    notes: Sequence[str] = ()  # on all of it, as how the configs were sized

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, with the version of their layout."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def write(self, file: str | Path) -> None:
        """Write the JSON; folders are made."""
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")


def read(file: str | Path) -> Report:
    """The report in a JSON file; ValueError for a file that is none, or of another layout."""
    try:
        found = json.loads(Path(file).read_text())
        version = found.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"layout {version}; this version reads layout {SCHEMA_VERSION}")
        columns = [_column(**column) for column in found.pop("columns")]
        contests = [Contest(**_paired(one)) for one in found.pop("contests")]
        crossovers = [Crossover(**_paired(one)) for one in found.pop("crossovers")]
        return Report(columns=columns, contests=contests, crossovers=crossovers, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report of eval.py --json: {error}") from error


def _column(config: str, fingerprint: str, resources: dict, curves: list, profile: list) -> Column:
    rows = {name: [_row(row) for row in rows] for name, rows in resources.items()}
    places = [Hot(**place) for place in profile]
    return Column(config, fingerprint, rows, [_curve(**curve) for curve in curves], places)


def _curve(name: str, over: str, at: list, rows: list) -> Curve:
    return Curve(name, over, tuple(at), [_row(row) for row in rows])


def _row(found: dict) -> Row:
    return Row(**_paired(found))


def _paired(found: dict) -> dict:
    """JSON has no tuples."""
    interval = found["interval"]
    return found | {"interval": None if interval is None else tuple(interval)}


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
