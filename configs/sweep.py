"""A sweep: one experiment in many forms, every combination of the values of its axes.

A config file may have `get_sweep()` beside its `get_config()`; `sweep.py --sweep.KEY=A,B` makes one
from flags. Neither JAX nor a model is imported here.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from configs import checks, overrides
from configs.schema import RENAMED, Experiment, fingerprint, freeze

LARGEST = 100_000  # points of a sweep


@dataclasses.dataclass
class Sweep:
    """Every combination of values, one of each axis, with each seed.

    An axis is a key of the config with its values: `{"optimizer.learning_rate": (1e-3, 3e-3)}`.
    A value is what a flag takes, or a Config. With names for its values, an axis is a mapping; a
    value that is a mapping itself sets several keys, and then the axis is called as you like:
    `{"model": {"small": {"model.width": 64, "model.depth": 2}, "large": {...}}}`.
    """

    base: Experiment
    axes: Mapping[str, Sequence[Any] | Mapping[str, Any]]
    seeds: int = 1  # each adds its number to the base's `seed` and `data.seed`
    tuned: tuple[
        str, ...
    ] = ()  # axes of which a comparison takes the best value for each of the rest


class Point(NamedTuple):
    """One experiment of a sweep; `labels` names its value on each axis."""

    labels: dict[str, str]
    seed: int
    experiment: Experiment

    @property
    def key(self) -> str:
        """Equal for equal experiments alone."""
        return fingerprint(self.experiment)

    def __str__(self) -> str:
        axes = (f"{short(axis)}={label}" for axis, label in self.labels.items())
        return ", ".join([*axes, f"seed={self.seed}"])

    @property
    def folder(self) -> str:
        """A folder's name that says what is in it, another for every experiment."""
        words = re.sub(r"[^A-Za-z0-9.=+-]+", "_", str(self))[:90].strip("_")
        return f"{words}-{self.key[:8]}"


def short(axis: str) -> str:
    """The last part of a key: learning_rate for optimizer.learning_rate."""
    return axis.rpartition(".")[2]


def points(sweep: Sweep) -> list[Point]:
    """Every point, checked; ValueError in one line at the first that cannot be.

    Two points that come to the same experiment are one.
    """
    values = {axis: _labelled(axis, given) for axis, given in sweep.axes.items()}
    _check(sweep, values)
    found = {}
    for chosen in itertools.product(*values.values()):
        labels = dict(zip(values, chosen, strict=True))
        for seed in range(sweep.seeds):
            settings = {axis: values[axis][label] for axis, label in labels.items()}
            try:
                experiment = _made(sweep.base, settings, seed)
            except ValueError as error:
                where = ", ".join(f"{axis}={label}" for axis, label in labels.items())
                raise ValueError(f"the point {where}: {error}" if where else str(error)) from error
            point = Point(labels, sweep.base.seed + seed, experiment)
            found.setdefault(point.key, point)
    return list(found.values())


def _labelled(axis: str, given: Any) -> dict[str, Any]:
    """The values of an axis by their labels."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"sweep.{axis}={given!r} is no tuple of values.")
    labels = [_label(value) for value in given]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"sweep.{axis} has {twice[0]} twice. Leave one out, or name the values.")
    return dict(zip(labels, given, strict=True))


def _label(value: Any) -> str:
    """What a value is called: as it is written, or after the files of its Configs."""
    if isinstance(value, (tuple, list)) and overrides.is_section(value):
        return "+".join(map(_label, value))
    if dataclasses.is_dataclass(value):
        return type(value).__module__.rpartition(".")[2]
    return str(value).strip()


def _check(sweep: Sweep, values: dict[str, dict]) -> None:
    count = sweep.seeds
    for axis, named in values.items():
        if not named:
            raise ValueError(f"sweep.{axis} is empty. Give its values: --sweep.{axis}=A,B")
        count *= len(named)
    if sweep.seeds < 1:
        raise ValueError(f"seeds={sweep.seeds} must be at least 1.")
    if count > LARGEST:
        raise ValueError(f"the sweep has {count:,} points, more than {LARGEST:,}. Split it.")
    for axis in sweep.tuned:
        if axis not in values:
            near = overrides.hint(axis, values, 0)
            raise ValueError(f"tune={axis} is no axis of the sweep{near}.")


def _made(base: Experiment, settings: dict[str, Any], seed: int) -> Experiment:
    """The experiment with everything set, checked as a command line's is."""
    texts, whole = [], []
    for axis, value in settings.items():
        for key, one in (value if isinstance(value, Mapping) else {axis: value}).items():
            key = RENAMED.get(key, key)
            sections = overrides.is_section(one) or isinstance(one, tuple)
            (whole if sections else texts).append((key, one))
    # Sections first: other keys may lie in them.
    tree = overrides.placed(base, whole)
    texts += [("seed", base.seed + seed), ("data.seed", base.data.seed + seed)][: 2 * (seed > 0)]
    tree = overrides.apply(tree, [(key, str(value)) for key, value in texts])
    checks.check(tree)
    return freeze(tree)


def parse(pairs: Sequence[tuple[str, str | None]]) -> dict[str, tuple[str, ...]]:
    """Axes from flags: (KEY, "A,B,C") each; a comma inside brackets is part of a value."""
    axes = {}
    for key, text in pairs:
        if key in axes:
            raise ValueError(f"--sweep.{key} is given twice. Write its values in one.")
        axes[key] = tuple(split(text or ""))
    return axes


def split(text: str) -> list[str]:
    """The pieces between commas that lie in no brackets; ValueError where brackets do not close."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise ValueError(f"{text!r} has a bracket without its partner.")
    pieces = [piece.strip() for piece in pieces]
    if pieces == [""]:
        return []
    if "" in pieces:
        raise ValueError(f"{text!r} has an empty value between commas.")
    return pieces
