"""The loss curve of a run, drawn from its metrics.jsonl."""

import json
from pathlib import Path

import numpy as np

from training import log

INK, ACCENT, WARM = "#22252b", "#2563a8", "#c8512b"
SMOOTHING = 0.02  # width of the smoothing kernel, as a share of the x axis ...
EARLY = 0.1  # ... but at most this share of the place itself: the first steps fall steeply


def loss_curve(metrics_path: Path, png_path: Path, title: str) -> Path:
    """Bits per byte over training tokens as PNG and, beside it, SVG; returns the PNG's path.

    Training loss is drawn raw and smoothed (a Gaussian, 2 % of the axis wide, less at its start),
    validation as points. Without token counts the axis is steps. The footer names device and
    commit from environment.json. Raises ValueError where no record has a training loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, validation, unit = _series(log.records(Path(metrics_path)))
    if not len(train):
        raise ValueError(f"{metrics_path} holds no record with bits_per_byte: nothing to draw.")
    with pyplot.rc_context():
        pyplot.rcParams.update({"font.size": 9, "text.color": INK, "svg.hashsalt": "loss"})
        pyplot.rcParams.update({"axes.edgecolor": INK, "axes.labelcolor": INK})
        figure, axes = pyplot.subplots(figsize=(5.6, 3.5), layout="constrained")
        _draw(axes, train, validation)
        axes.set_xlabel(f"training {unit}")
        axes.set_ylabel("bits per byte")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        figure.supxlabel(_footer(Path(metrics_path)), fontsize=6.5, color="#777777", ha="center")
        figure.savefig(png_path, dpi=200, metadata={"Software": None})
        figure.savefig(Path(png_path).with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)
    return Path(png_path)


def _draw(axes, train: np.ndarray, validation: np.ndarray) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    x, y = train.T
    axes.plot(x, y, color=ACCENT, alpha=0.25, linewidth=0.8)
    smooth = _smooth(x, y)
    axes.plot(x, smooth, color=ACCENT, linewidth=1.6, label=f"train, last {smooth[-1]:.3f}")
    if len(validation):
        label = f"validation, last {validation[-1, 1]:.3f}"
        axes.plot(
            *validation.T, "o-", color=WARM, markersize=4, linewidth=0.8, label=label, zorder=3
        )
    lowest = min(smooth.min(), *validation[:, 1], y.min())
    # The first steps fall from log2(vocabulary): cut there so that the rest can be read.
    top = max(smooth[len(smooth) // 20], *validation[:, 1], y[-1])
    margin = 0.08 * (top - lowest) + 1e-3
    axes.set_ylim(lowest - margin, top + 2 * margin)
    axes.set_xlim(0, x.max() * 1.02)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(loc="upper right", framealpha=1.0, edgecolor="none", fancybox=False)


def _series(records: list[dict]) -> tuple[np.ndarray, np.ndarray, str]:
    """(n, 2) arrays of position and bits per byte for training and validation, and the unit."""
    train = [r for r in records if r.get("bits_per_byte") is not None]
    validation = [r for r in records if r.get("validation_bits_per_byte") is not None]
    unit = "tokens" if train and all("tokens" in r for r in train) else "step"
    steps = [r["step"] for r in train]
    places = [r["tokens" if unit == "tokens" else "step"] for r in train]

    def place(record: dict) -> float:
        # A validation record without tokens lies where its step lies among the training records.
        return record.get(unit, float(np.interp(record["step"], steps, places)))

    first = [(place(r), r["bits_per_byte"]) for r in train]
    second = [(place(r), r["validation_bits_per_byte"]) for r in validation]
    return np.reshape(first, (-1, 2)), np.reshape(second, (-1, 2)), unit


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gaussian mean of y around each x, over whatever points are there."""
    widths = np.minimum(SMOOTHING * (x.max() - x.min()), EARLY * x) + 1e-9
    rows = []
    for center, width in zip(x, widths, strict=True):
        near = slice(*np.searchsorted(x, (center - 4 * width, center + 4 * width)))
        weight = np.exp(-0.5 * ((x[near] - center) / width) ** 2)
        rows.append(np.sum(weight * y[near]) / np.sum(weight))
    return np.array(rows)


def _footer(metrics_path: Path) -> str:
    path = metrics_path.with_name("environment.json")
    facts = json.loads(path.read_text()) if path.exists() else {}
    device = f"{facts.get('devices', '?')} x {facts.get('device', 'unknown device')}"
    commit = (facts.get("commit") or "none")[:10] + ("+" if facts.get("dirty") else "")
    jax = facts.get("packages", {}).get("jax", "?")
    return f"{device}  |  commit {commit}  |  jax {jax}"
