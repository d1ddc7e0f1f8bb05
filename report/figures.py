"""A report as pictures: curves, bars, roofline and Pareto fronts.

A config has one colour and one marker in all of them. Solid is measured or compiled, hatched is
modelled or assumed. Where the report lacks what a picture needs, the reason stands in its place.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from report import pareto, picture
from report.picture import INK, QUIET, Picture
from report.report import Report
from report.table import LETTERS, human
from resources.row import Curve, Row

RATES = ("train throughput", "prefill throughput", "decode throughput")
ROOFS = ("train intensity", "train achieved", "roof, compute", "roof, memory")
FRONTS = (("state at 64k tokens", "train throughput"), ("train throughput", "validation"))
USUAL = {  # curves that are missed where a report has none: size, unit
    ("length", "s"): "Time over length",
    ("context", "B"): "State over context",
    ("length", "B"): "Train memory over length",
}
SIZES = {"length": "length, tokens", "context": "context, tokens", "batch": "batch, sequences"}
HATCHES = {"modelled": "/////", "assumed": "....."}
DOMINATED = "#c3c7cd"


def draw(report: Report, fronts: Sequence[tuple[str, str]] = FRONTS) -> list[Picture]:
    """Every picture of a report; `fronts` are pairs of rows' names: what lies across, what up."""
    kinds = dict.fromkeys([*USUAL, *(_kind(c) for col in report.columns for c in col.curves)])
    energy = [row for column in report.columns for row in column.resources.get("energy", ())]
    joules = [r.name for r in energy if r.unit == "J/token" and not r.name.endswith(", spread")]
    return [
        *(curves(report, over, unit) for over, unit in kinds),
        bars(report, "Throughput", RATES),
        bars(report, "Energy of a token", list(dict.fromkeys(joules)) or ["train energy"]),
        roofline(report),
        *(front(report, across, up) for across, up in dict.fromkeys(fronts)),
    ]


def curves(report: Report, over: str, unit: str) -> Picture:
    """All curves of one unit over one size, log-log: a panel for each name of a curve.

    Bands are the intervals; thin lines grow as the size and, for time, as its square.
    """
    found = {
        i: [curve for curve in column.curves if _kind(curve) == (over, unit)]
        for i, column in enumerate(report.columns)
    }
    rows = {i: [row for curve in own for row in curve.rows] for i, own in found.items()}
    drawn = {i: own for i, own in rows.items() if any(map(_positive, own))}
    own = [curve for i in drawn for curve in found[i]]
    names = dict.fromkeys(curve.name for curve in own if any(map(_positive, curve.rows)))
    what = {"s": "time", "B": "bytes", "tok/s": "throughput"}.get(unit, unit or "count")
    title = f"{what} over {over}".capitalize()
    if not names:
        notes = dict.fromkeys(row.note for own in rows.values() for row in own if row.note)
        reason = "; ".join(notes) or f"no config has a curve of {what} over {over}"
        return picture.missing(USUAL.get((over, unit), title), reason)
    if len(names) == 1:
        title = f"{next(iter(names))} over {over}".capitalize()
    with picture.style():
        figure = _panels(report, list(names), list(drawn), over, unit)
        powers = [
            report.columns[i].row(f"{name}, exponent over {over}") for i in drawn for name in names
        ]
        text = f"Dashed: growth as {'n and n²' if unit == 's' else 'n'}."
        if any(row.interval for own in drawn.values() for row in own):
            text += " Bands: 99 % intervals."
        if _valued(powers):
            text += " p: fitted exponent."
        if left_out := [report.columns[i].config for i in rows if i not in drawn]:
            text += f" Without a number above 0: {', '.join(left_out)}."
        return picture.finish(figure, title, report, drawn, text)


def _panels(
    report: Report, names: Sequence[str], configs: Sequence[int], over: str, unit: str
) -> Figure:
    """One panel with its legend beside it; or three a line, each above its exponents."""
    across, label = min(len(names), 3), SIZES.get(over, over)
    down = -(-len(names) // across)
    beside = across == 1
    room = 0.0 if beside else 0.15 * len(configs) + 0.1  # inches for a legend below
    size = (6, 3.2) if beside else (2.4 * across, down * (2.35 + room))
    figure = Figure(figsize=size, layout="constrained")
    heights = [1.0] if beside else [1.75, room] * down
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    for place, name in enumerate(names):
        line, column = divmod(place, across)
        axes = figure.add_subplot(grid[line * (2 - beside), column], xlabel=label)
        _panel(axes, report, (name, over), configs, unit)
        entries = []
        for i in configs:
            config = "" if column else picture.short(report.columns[i].config)
            text = f"{config}  {_exponent(report.columns[i].row(f'{name}, exponent over {over}'))}"
            entries.append((text.strip(), Line2D([], [], **picture.mark(i))))
        if beside:
            picture.legend(axes, entries, (1.06, 1.0))
        else:
            below = figure.add_subplot(grid[2 * line + 1, column])
            below.axis("off")
            picture.legend(below, entries, (0.0 if column else -0.2, 1.0))
    return figure


def _exponent(row: Row | None) -> str:
    # Rounded before 0 is added, which turns -0.0 into 0.0.
    return "" if row is None or row.value is None else f"p = {round(row.value, 2) + 0.0:.2f}"


def _panel(
    axes: Axes, report: Report, kind: tuple[str, str], configs: Sequence[int], unit: str
) -> None:
    """The curves of one name over one size."""
    ends, sizes = [], set()
    for place, i in enumerate(configs):
        curves = report.columns[i].curves
        curve = next((c for c in curves if (c.name, c.over) == kind), None)
        if curve is None or not any(map(_positive, curve.rows)):
            continue
        # A gap stays a gap: not a number is not drawn, and no line leads across it.
        values = [_number(row) for row in curve.rows]
        pairs = [row.interval or (math.nan, math.nan) for row in curve.rows]
        low, high = zip(*pairs, strict=True)
        # The later the thinner, so that of two curves in one place both are seen.
        thin = place / len(configs)
        look = picture.mark(i, linewidth=2 - 1.1 * thin, markersize=6 - 2.2 * thin)
        axes.plot(curve.at, values, **look)
        axes.fill_between(curve.at, low, high, color=picture.colour(i), alpha=0.18, linewidth=0)
        ends += [end for end in (*values, *low, *high) if 0 < end < math.inf]
        sizes |= set(curve.at)
    axes.set(xscale="log", yscale="log")
    axes.set_ylabel(f"time of one {kind[0]}" if unit == "s" else kind[0])
    # At least a decade, or noise would look like growth.
    room = max(1.3, math.sqrt(10 * min(ends) / max(ends)))
    axes.set_ylim(min(ends) / room, max(ends) * room)
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    picture.log_ticks(axes.yaxis, unit, max(ends) / min(ends))
    shown = sorted(sizes)[:: -(-len(sizes) // 7)]
    axes.set_xticks(shown, [_size(at) for at in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True)
    for slope in (1, 2) if unit == "s" else (1,):
        _guide(axes, slope)


def _guide(axes: Axes, slope: int) -> None:
    """A thin line y ~ x^slope from the lower left corner to where it leaves the panel."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = min(right, left * (top / bottom) ** (1 / slope))
    y = bottom * (x / left) ** slope
    axes.plot([left, x], [bottom, y], color=QUIET, linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
    offset, align = ((2, 0), ("left", "center")) if x == right else ((0, 1), ("center", "bottom"))
    axes.annotate(
        "n" if slope == 1 else "n²",
        (x, y),
        offset,
        textcoords="offset points",
        color=QUIET,
        fontsize=7,
        ha=align[0],
        va=align[1],
    )


def bars(report: Report, title: str, names: Sequence[str]) -> Picture:
    """Bars from 0 with interval and provenance: a panel for each name of a row, a bar a config.

    Where a row has no interval, but the column a row "NAME, spread", that deviation is drawn.
    """
    found = {name: [column.row(name) for column in report.columns] for name in names}
    drawn = {name: rows for name, rows in found.items() if any(map(_positive, rows))}
    if not drawn:
        return picture.missing(title, _why(report, names) or "no number above 0")
    count = len(report.columns)
    with picture.style():
        figure = Figure(figsize=(7, 0.75 + 0.21 * count), layout="constrained")
        first = None
        for place, (name, rows) in enumerate(drawn.items()):
            axes = figure.add_subplot(1, len(drawn), place + 1, sharey=first)
            first = first or axes
            spreads = [column.row(f"{name}, spread") for column in report.columns]
            ends = [_bar(axes, i, row, spreads[i]) for i, row in enumerate(rows)]
            axes.set_xlim(0, 1.45 * max(ends))
            picture.linear_ticks(axes.xaxis, 4)
            axes.set_xlabel(f"{name}, {next(row.unit for row in rows if row)}")
            axes.grid(True, axis="x")
            axes.tick_params(axis="y", length=0, labelleft=place == 0)
            if place == 0:
                axes.set_yticks(range(count), [picture.short(c.config) for c in report.columns])
                axes.set_ylim(count - 0.4, -0.6)
        text = "Whiskers: 99 % interval or, where a column has it instead, standard deviation."
        text += " Solid: measured (m) or compiled (c); striped: modelled (f); dotted: assumed (a)."
        rows = {i: _valued(own[i] for own in drawn.values()) for i in range(count)}
        return picture.finish(figure, title, report, _filled(rows), text)


def _bar(axes: Axes, i: int, row: Row | None, spread: Row | None) -> float:
    """The bar of the config in column `i`; returns how far it reaches."""
    if row is None or row.value is None or row.provenance is None:
        axes.text(0, i, " not available", color=QUIET, fontsize=6.5, va="center")
        return 0.0
    hatch, colour = HATCHES.get(row.provenance), picture.colour(i)
    axes.barh(i, row.value, 0.66, color="white" if hatch else colour, edgecolor=colour, hatch=hatch)
    low, high = row.interval or (row.value, row.value)
    if row.interval is None and spread is not None and spread.value is not None:
        low, high = row.value - spread.value, row.value + spread.value
    if high > low:
        # White under it, or a dark bar would hide its lower half.
        axes.plot([low, high], [i, i], color="white", linewidth=2.6, solid_capstyle="butt")
        axes.plot([low, high], [i, i], color=INK, linewidth=0.9, marker="|", markersize=5)
    end = max(high, row.value)
    axes.text(
        end, i, f"  {human(row.value, '')} {LETTERS[row.provenance]}", fontsize=6.5, va="center"
    )
    return end


def roofline(report: Report) -> Picture:
    """FLOP/s of each config's training step over its FLOP/B, under min(compute, memory x FLOP/B).

    Source: Williams, Waterman and Patterson 2009, "Roofline".
    """
    title = "Roofline of a training step"
    rows = {i: _valued(col.row(name) for name in ROOFS) for i, col in enumerate(report.columns)}
    rows = {i: own for i, own in rows.items() if len(own) == 4 and all(map(_positive, own))}
    if not rows:
        return picture.missing(title, _why(report, ROOFS) or "no config has all its numbers")
    with picture.style():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        places: dict[int, list[Any]] = {i: [row.value for row in own] for i, own in rows.items()}
        ends = [end for x, _, compute, memory in places.values() for end in (x, compute / memory)]
        left, right, entries = min(ends) / 3, max(ends) * 3, []
        for compute, memory in sorted({(place[2], place[3]) for place in places.values()}):
            ridge = compute / memory
            line = axes.plot([left, ridge, right], [left * memory, compute, compute], color=QUIET)
            entries.append((f"{human(compute, 'FLOP/s')}, {human(memory, 'B/s')}", line[0]))
        for i, (x, y, _, _) in places.items():
            line = axes.plot(x, y, **picture.mark(i, linestyle="none", markersize=6))
            entries.append((picture.short(report.columns[i].config), line[0]))
        axes.set(xscale="log", yscale="log", xlim=(left, right))
        axes.set(xlabel="arithmetic intensity, FLOP/B", ylabel="attained")
        low, high = axes.get_ylim()
        picture.log_ticks(axes.xaxis, "", right / left)
        picture.log_ticks(axes.yaxis, "FLOP/s", high / low)
        axes.grid(True)
        picture.legend(axes, entries)
        text = "Grey: the most that the device could do; left of the bend its memory sets it."
        return picture.finish(figure, title, report, rows, text)


def front(report: Report, across: str, up: str) -> Picture:
    """Two rows against each other: in colour what no config beats in both, grey what one does.

    `pareto.sense` says of which rows more is better.
    """
    title = f"{up} against {across}".capitalize()
    rows = {i: _valued(c.row(name) for name in (across, up)) for i, c in enumerate(report.columns)}
    rows = {i: own for i, own in rows.items() if len(own) == 2}
    if len(rows) < 2:
        why = _why(report, (across, up))
        reason = "fewer than two configs have both numbers" + (f" ({why})" if why else "")
        return picture.missing(title, reason)
    with picture.style():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        units = [row.unit for row in next(iter(rows.values()))]
        senses: list[pareto.Sense] = [pareto.sense(row) for row in next(iter(rows.values()))]
        places: dict[int, list[Any]] = {i: [row.value for row in own] for i, own in rows.items()}
        best = {list(places)[k] for k in pareto.front(list(places.values()), senses)}
        corners = sorted(places[i] for i in best)
        axes.plot(*zip(*corners, strict=True), color=INK, linewidth=0.8, zorder=1)
        entries = []
        for i in sorted(places, key=lambda i: i not in best):
            grey = {} if i in best else {"color": DOMINATED}
            line = axes.plot(*places[i], **picture.mark(i, linestyle="none", markersize=6, **grey))
            entries.append((picture.short(report.columns[i].config), line[0]))
        for k, letter in enumerate("xy"):
            values = [place[k] for place in places.values()]
            label = f"{(across, up)[k]}{{}} ({senses[k]} is better)"
            _scale(axes, letter, label, units[k], values)
        axes.grid(True)
        picture.legend(axes, entries)
        text = "Grey: another config is as good in both and better in one. Joined: all others."
        return picture.finish(figure, title, report, rows, text)


def _scale(axes: Axes, letter: str, label: str, unit: str, values: Sequence[float]) -> None:
    """A logarithmic axis for values above 0 over more than a decade, otherwise a linear one."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[letter]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set(**{f"{letter}scale": "log", f"{letter}label": label.format("")})
        picture.log_ticks(axis, unit, max(values) / min(values))
    else:
        axes.set(**{f"{letter}label": label.format(f", {unit}" if unit else "")})
        picture.linear_ticks(axis, 5)


def _kind(curve: Curve) -> tuple[str, str]:
    return curve.over, curve.rows[0].unit if curve.rows else ""


def _positive(row: Row | None) -> bool:
    """Whether a row can be drawn on a logarithmic axis."""
    return row is not None and row.value is not None and 0 < row.value < math.inf


def _number(row: Row) -> float:
    return row.value if _positive(row) and row.value is not None else math.nan


def _valued(rows: Iterable[Row | None]) -> list[Row]:
    return [row for row in rows if row is not None and row.value is not None]


def _filled(rows: Mapping[int, list[Row]]) -> dict[int, list[Row]]:
    return {i: own for i, own in rows.items() if own}


def _why(report: Report, names: Sequence[str]) -> str:
    """The notes of rows without a value, or which rows no config has."""
    reasons = []
    for name in names:
        rows = [row for column in report.columns if (row := column.row(name)) is not None]
        gaps = dict.fromkeys(row.note for row in rows if row.value is None)
        reasons += [f"{name}: {note}" for note in gaps]
        if not rows:
            reasons.append(f"no config has a row {name!r}")
    return "; ".join(reasons)


def _size(at: int) -> str:
    """256, 1k for 1,024, 1M for 1,048,576: as in the names of rows."""
    for scale, letter in ((2**20, "M"), (2**10, "k")):
        if at >= scale and at % scale == 0:
            return f"{at // scale}{letter}"
    return str(at)
