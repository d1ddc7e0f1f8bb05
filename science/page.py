"""The page of a sweep: its comparison as a report, curves with bands of seeds, Pareto fronts."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report import figures, html, picture, report
from report.picture import Picture
from report.report import Column, Report
from resources import throughput
from resources.row import Row, not_available
from science import table
from science.table import SIZES, TITLES, Entry

RESOURCES = {"parameters": "compute", "flops": "compute", "rate": "compute", "state": "memory"}
PROVENANCE = {"flops": "modelled", "rate": "measured"}
COSTS = ("parameters", "flops", "state")  # across the Pareto fronts


def write(
    root: Path, found: Sequence[Entry], title: str, metric: str, tuned: Sequence[str]
) -> Path:
    """Write `comparison.html`, `.json` and `.md` into the folder of a study; the page's path."""
    made = as_report(found, metric, tuned)
    pictures = [curves(root, found, made, metric)]
    for name in COSTS:
        if any(name in entry.sizes for entry in found):
            pictures.append(figures.front(made, TITLES.get(name, name), metric))
    page = root / "comparison.html"
    page.write_text(html.page(made, title=title, pictures=pictures, confidence="95 %"))
    made.write(root / "comparison.json")
    (root / "comparison.md").write_text(table.markdown(found, metric))
    return page


def as_report(found: Sequence[Entry], metric: str, tuned: Sequence[str]) -> Report:
    """The comparison as a report: a column for each row of the table."""
    notes = [_tuning(found)] if tuned else []
    columns = [_column(entry, metric) for entry in found]
    device, versions = throughput.device_name(), report.versions()
    return Report(columns, device, versions, report.commit(), notes=notes)


def _tuning(found: Sequence[Entry]) -> str:
    chosen = (
        f"{entry.name}: {', '.join(f'{axis}={label}' for axis, label in entry.tuned.items())} "
        f"(best of {entry.tried})"
        for entry in found
        if entry.scores
    )
    return f"Tuned, each among the same values: {'; '.join(chosen)}."


def _column(entry: Entry, metric: str) -> Column:
    resources: dict[str, list[Row]] = {}
    for name, resource in RESOURCES.items():
        if name in entry.sizes:
            row = Row(
                TITLES.get(name, name),
                entry.sizes[name],
                SIZES[name],
                PROVENANCE.get(name, "compiled"),
            )
            resources.setdefault(resource, []).append(row)
    if entry.scores:
        note = f"{len(entry.scores)} seeds" if len(entry.scores) > 1 else ""
        note = "; ".join(filter(None, [note, *dict.fromkeys(entry.lacks)]))
        around = table.interval(entry.scores)
        quality = Row(metric, entry.mean, "", "measured", note, around)
    else:
        quality = not_available(metric, "", table.score(entry) or "not run")
    resources["quality"] = [quality]
    return Column(entry.name, "", resources)


def curves(root: Path, found: Sequence[Entry], made: Report, metric: str) -> Picture:
    """The validation score over steps: the mean over seeds, and between the lowest and highest."""
    title = f"{metric} over steps".capitalize()
    series = {i: _series(root, entry) for i, entry in enumerate(found)}
    series = {i: values for i, values in series.items() if len(values[0])}
    if not series:
        return picture.missing(title, "no trial has a record of validation")
    with picture.style():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=metric)
        entries = []
        for i, (steps, values) in series.items():
            axes.plot(steps, values.mean(0), **picture.mark(i, markersize=3))
            low, high = values.min(0), values.max(0)
            axes.fill_between(steps, low, high, color=picture.colour(i), alpha=0.18, linewidth=0)
            line = Line2D([], [], **picture.mark(i))
            entries.append((picture.short(found[i].name), line))
        axes.grid(True)
        picture.legend(axes, entries)
        rows = {i: [row for row in made.columns[i].rows if row.name == metric] for i in series}
        text = "Lines: means over seeds. Bands: from the lowest seed to the highest."
        return picture.finish(figure, title, made, rows, text)


def _series(root: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which all seeds were validated, and scores (seed, step)."""
    runs = [_validations(root / folder / "metrics.jsonl") for folder in entry.folders]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return np.asarray(steps), np.asarray([[run[step] for step in steps] for run in runs])


def _validations(path: Path) -> dict[int, float]:
    """Score by step; nothing where the file is not on this machine."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        scores = [value for name, value in record.items() if name.startswith("validation_")]
        if scores and scores[0] is not None:
            found[record["step"]] = scores[0]
    return found
