"""The comparison of a sweep: a row for each point, its seeds together, tuned axes chosen.

Of a tuned axis each row takes the value whose mean score over the seeds is best, all rows among the
same values. Intervals are those of the mean over seeds, 95 %, by Student's t.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import optuna
import rich.box
import rich.console
import rich.table
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from configs.sweep import Point, short
from report.table import PIPED, human
from science import study as studies

CONFIDENCE = 0.95
STOPPED = "stopped early"
SIZES = {"parameters": "", "flops": "FLOP/token", "state": "B", "rate": "tok/s", "seconds": "s"}
TITLES = {"flops": "FLOPs", "rate": "training", "seconds": "a trial"}


class Entry(NamedTuple):
    """One row: labels of its axes, what tuning chose for the others, and what its trials gave."""

    labels: dict[str, str]
    tuned: dict[str, str]
    scores: tuple[float, ...]  # of the seeds that were run to their end
    sizes: dict[str, float]  # means over these
    tried: int  # settings of the tuned axes that gave a score or were stopped early
    lacks: tuple[str, ...]  # what became of trials that gave none, a phrase each
    folders: tuple[str, ...]  # of the trials

    @property
    def mean(self) -> float:
        """Of the scores; NaN without any."""
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def name(self) -> str:
        """Its labels in one text."""
        return ", ".join(self.labels.values()) or "all"


def entries(
    study: optuna.Study, points: Sequence[Point], tuned: Sequence[str], higher: bool
) -> list[Entry]:
    """The rows in the order of the points."""
    held = studies.of_points(study)
    rows: dict[tuple, dict[tuple, list[Point]]] = {}
    for point in points:
        row = tuple((a, label) for a, label in point.labels.items() if a not in tuned)
        setting = tuple((a, label) for a, label in point.labels.items() if a in tuned)
        rows.setdefault(row, {}).setdefault(setting, []).append(point)
    return [_entry(dict(row), settings, held, higher) for row, settings in rows.items()]


def _entry(labels: dict, settings: dict, held: dict[str, FrozenTrial], higher: bool) -> Entry:
    found = []
    for setting, points in settings.items():
        trials = [held[point.key] for point in points if point.key in held]
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        lacks = [_fate(held.get(point.key)) for point in points]
        found.append(
            Entry(
                labels,
                dict(setting),
                tuple(float(trial.value) for trial in done if trial.value is not None),
                _means(done),
                0,
                tuple(filter(None, lacks)),
                tuple(trial.user_attrs["folder"] for trial in done),
            )
        )
    scored = [one for one in found if one.scores]
    if not scored:
        return found[0]._replace(lacks=tuple(lack for one in found for lack in one.lacks))
    # A setting with fewer seeds than another is not chosen: its mean is luckier.
    most = max(len(one.scores) for one in scored)
    full = [one for one in scored if len(one.scores) == most]
    best = (max if higher else min)(full, key=lambda one: one.mean)
    stopped = sum(not one.scores and STOPPED in one.lacks for one in found)
    return best._replace(tried=len(scored) + stopped)


def _fate(trial: FrozenTrial | None) -> str:
    """Why a point has no score, or ""."""
    if trial is None or trial.state == TrialState.WAITING:
        return "not run"
    if trial.state == TrialState.COMPLETE:
        return ""
    fates = {TrialState.RUNNING: "running", TrialState.PRUNED: STOPPED}
    return fates.get(trial.state, f"failed: {trial.user_attrs.get(studies.FAULT)}")


def _means(trials: list[FrozenTrial]) -> dict[str, float]:
    values = {n: [t.user_attrs[n] for t in trials if n in t.user_attrs] for n in SIZES}
    return {name: statistics.fmean(given) for name, given in values.items() if given}


def interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """mean -+ t s / sqrt(n) of the mean; None for fewer than two scores."""
    if len(scores) < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)
    half *= statistics.stdev(scores) / math.sqrt(len(scores))
    mean = statistics.fmean(scores)
    return mean - half, mean + half


def cells(found: Sequence[Entry], title: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows as texts; a column for each axis, for what was tuned, for each size."""
    axes = list(found[0].labels)
    tuned = list(found[0].tuned)
    sizes = [name for name in SIZES if any(name in entry.sizes for entry in found)]
    head = [short(axis) for axis in axes] + [title, "seeds"]
    head += [f"{short(axis)}, tuned" for axis in tuned] + ["tried"] * bool(tuned)
    head += [TITLES.get(name, name) for name in sizes]
    rows = []
    for entry in found:
        row = [entry.labels[axis] for axis in axes] + [score(entry), str(len(entry.scores))]
        row += [entry.tuned[axis] if entry.scores else "" for axis in tuned]
        row += [str(entry.tried)] * bool(tuned)
        rows.append(row + [_size(entry, name) for name in sizes])
    return head, rows


def score(entry: Entry) -> str:
    """The mean with its interval; or why there is none."""
    if not entry.scores:
        return "; ".join(dict.fromkeys(entry.lacks))
    around = interval(entry.scores)
    more = f" +-{(around[1] - around[0]) / 2:.4f}" if around else ""
    lacks = f" ({'; '.join(dict.fromkeys(entry.lacks))})" if entry.lacks else ""
    return f"{entry.mean:.4f}{more}{lacks}"


def _size(entry: Entry, name: str) -> str:
    return human(entry.sizes[name], SIZES[name]) if name in entry.sizes else ""


def show(found: Sequence[Entry], title: str, file: Any = None) -> None:
    """Print the comparison."""
    file = file or sys.stdout
    console = rich.console.Console(
        file=file, width=None if file.isatty() else PIPED, highlight=False
    )
    head, rows = cells(found, title)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    left = len(found[0].labels)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(rich.markup.escape, row))
    console.print(table)


def markdown(found: Sequence[Entry], title: str) -> str:
    """The same as a table in Markdown."""
    head, rows = cells(found, title)
    left = len(found[0].labels)
    bars = ["---"] * left + ["---:"] * (len(head) - left)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, bars, *escaped))
