"""Loss curves, drawn from the metrics.jsonl of one run or of several."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training import log

INK, ACCENT, WARM = "#22252b", "#2563a8", "#c8512b"
# Of several runs (Okabe and Ito 2008: apart for every kind of colour blindness).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LOSSES = {"bits_per_byte": "bits per byte", "bits_per_answer": "bits per answer"}  # as recorded
SMOOTHING = 0.02  # width of the smoothing kernel, as a share of the x axis ...
EARLY = 0.1  # ... but at most this share of the place itself: the first steps fall steeply


def loss_curve(folders: Sequence[str | Path], png_path: str | Path) -> Path:
    """The loss in bits over training tokens as PNG and, beside it, SVG; returns the PNG's path.

    `folders` are those of runs. Of a single one, training loss is drawn raw and smoothed (a
    Gaussian, 2 % of the axis wide, less at its start), validation as points, and the title says
    run and model; of several, each has a colour. Without token counts the axis is steps. The footer
    names device and commit from environment.json. Raises ValueError where no record of a run has a
    training loss, or a folder is no run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [Path(folder) for folder in folders]
    found = [_series(run) for run in runs]
    units, losses = {one.unit for one in found}, {one.loss for one in found}
    if len(units) > 1:
        raise ValueError("some of these runs count tokens and others only steps: draw them apart.")
    if len(losses) > 1:
        raise ValueError("some of these runs learn a text and others a task: draw them apart.")
    with pyplot.rc_context():
        pyplot.rcParams.update({"font.size": 9, "text.color": INK, "svg.hashsalt": "loss"})
        pyplot.rcParams.update({"axes.edgecolor": INK, "axes.labelcolor": INK})
        figure, axes = pyplot.subplots(figsize=(5.6, 3.5), layout="constrained")
        one = len(runs) == 1
        for i, (run, series) in enumerate(zip(runs, found, strict=True)):
            name, colours = run.resolve().name, (COLOURS[i % len(COLOURS)],) * 2
            _draw(axes, series, "" if one else name, (ACCENT, WARM) if one else colours)
        _frame(axes, found)
        axes.set_xlabel(f"training {units.pop()}")
        axes.set_ylabel(LOSSES[losses.pop()])
        title = f"{runs[0].resolve().name}: {model(runs[0])}" if one else "loss of several runs"
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", wrap=True)
        figure.supxlabel(_footer(runs), fontsize=6.5, color="#777777", ha="center")
        Path(png_path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png_path, dpi=200, metadata={"Software": None})
        figure.savefig(Path(png_path).with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)
    return Path(png_path)


def model(run: Path) -> str:
    """What a run trains, from its config.json: the layers of the pattern, width and depth."""
    path = run / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())["model"] if path.exists() else {}
    layers = dict.fromkeys(_architectures(config.get("pattern", [])))
    sizes = [f"{name} {config[name]}" for name in ("width", "depth") if name in config]
    return ", ".join([" + ".join(layers) or "a model", *sizes])


def _architectures(tree: Any) -> list[str]:
    """Names of the architectures in a part of a config that mix tokens, in order."""
    if isinstance(tree, dict):
        inner = [name for value in tree.values() for name in _architectures(value)]
        _, *family, name, _ = ["", *str(tree.get("class", "x.y")).split(".")]
        is_mixer = family[:1] == ["models"] and family[1:2] not in (["block"], ["channel"])
        return inner or ([name] if is_mixer else [])
    return [name for one in tree for name in _architectures(one)] if isinstance(tree, list) else []


class Series(NamedTuple):
    """Of a run: (n, 2) arrays of position and loss, their units."""

    train: np.ndarray
    validation: np.ndarray  # empty where another thing is judged than the loss
    unit: str  # of positions
    loss: str  # the name that records have


def _draw(axes, series: Series, run: str, colours) -> None:
    """One run: its training loss, its validation; `run` "" where it is the only one."""
    validation, (x, y) = series.validation, series.train.T
    smooth = _smooth(x, y)
    last = validation[-1, 1] if run and len(validation) else smooth[-1]
    label = f"{run or 'train'}, last {last:.3f}"
    axes.plot(x, y, color=colours[0], alpha=0.15 if run else 0.25, linewidth=0.8)
    alone = "o" if len(x) == 1 else ""  # a single point is no line
    axes.plot(x, smooth, alone + "-", color=colours[0], linewidth=1.6, markersize=3, label=label)
    if len(validation):
        label = None if run else f"validation, last {validation[-1, 1]:.3f}"
        look: dict[str, Any] = dict(color=colours[1], markersize=4, linewidth=0.8, zorder=3)
        axes.plot(*validation.T, "o-", label=label, **look)


def _frame(axes, found: list) -> None:
    """Limits that show the later part of every run, ticks, grid and legend."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lows, tops = [], []
    for train, validation, *_ in found:
        smooth = _smooth(*train.T)
        lows += [smooth.min(), *validation[:, 1], train[:, 1].min()]
        # The first steps fall from log2(vocabulary): cut there so that the rest can be read.
        tops += [smooth[len(smooth) // 20], *validation[:, 1], train[-1, 1]]
    lowest, top = min(lows), max(tops)
    margin = 0.08 * (top - lowest) + 1e-3
    axes.set_ylim(lowest - margin, top + 2 * margin)
    ends = [part[:, 0].max() for one in found for part in one[:2] if len(part)]
    axes.set_xlim(0, max(ends) * 1.02)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(loc="upper right", framealpha=1.0, edgecolor="none", fancybox=False)


def _series(run: Path) -> Series:
    """What the records of a run say."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no folder of a run: it has no metrics.jsonl.")
    records = log.records(path)
    known = [name for name in LOSSES if any(r.get(name) is not None for r in records)]
    if not known:
        raise ValueError(f"{path} holds no record with bits_per_byte: nothing to draw.")
    loss = known[0]
    train = [r for r in records if r.get(loss) is not None]
    validation = [r for r in records if r.get(f"validation_{loss}") is not None]
    unit = "tokens" if all("tokens" in r for r in train) else "step"
    steps = [r["step"] for r in train]
    places = [r["tokens" if unit == "tokens" else "step"] for r in train]

    def place(record: dict) -> float:
        # A validation record without tokens lies where its step lies among the training records.
        return record.get(unit, float(np.interp(record["step"], steps, places)))

    first = [(place(r), r[loss]) for r in train]
    second = [(place(r), r[f"validation_{loss}"]) for r in validation]
    return Series(np.reshape(first, (-1, 2)), np.reshape(second, (-1, 2)), unit, loss)


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gaussian mean of y around each x, over whatever points are there."""
    widths = np.minimum(SMOOTHING * (x.max() - x.min()), EARLY * x) + 1e-9
    rows = []
    for center, width in zip(x, widths, strict=True):
        near = slice(*np.searchsorted(x, (center - 4 * width, center + 4 * width)))
        weight = np.exp(-0.5 * ((x[near] - center) / width) ** 2)
        rows.append(np.sum(weight * y[near]) / np.sum(weight))
    return np.array(rows)


def _footer(runs: list[Path]) -> str:
    """Device, commit and version of jax; what several runs do not share is said to vary."""
    paths = [run / "environment.json" for run in runs]
    facts = [json.loads(path.read_text()) if path.exists() else {} for path in paths]

    def shared(say) -> str:
        values = {say(one) for one in facts}
        return values.pop() if len(values) == 1 else "varies"

    device = shared(lambda f: f"{f.get('devices', '?')} x {f.get('device', 'unknown device')}")
    commit = shared(lambda f: (f.get("commit") or "none")[:10] + ("+" if f.get("dirty") else ""))
    jax = shared(lambda f: f.get("packages", {}).get("jax", "?"))
    return f"{device}  |  commit {commit}  |  jax {jax}"
