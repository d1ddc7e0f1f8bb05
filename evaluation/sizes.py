"""Sizes of a config, and the search for those at which a measure that grows meets a target."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from configs.schema import Experiment
from evaluation.subject import Subject
from models import lm

LARGEST = 1 << 17  # size that is tried


def of(experiment: Experiment) -> dict[str, int]:
    """Width, depth, and hidden size of the channel mixer if it has one; 0 is by its own rule."""
    model = experiment.model
    channel = _channel(model)
    hidden = {} if channel is None else {"hidden": channel.hidden}
    return {"width": model.width, "depth": model.depth, **hidden}


def sized(
    experiment: Experiment,
    *,
    width: int | None = None,
    depth: int | None = None,
    hidden: int | None = None,
) -> Experiment:
    """The experiment with other sizes; those left out stay."""
    model = experiment.model
    if hidden is not None:
        old = _channel(model)
        model = _exchanged(model, old, dataclasses.replace(old, hidden=hidden))
    sizes = {"width": width or model.width, "depth": depth or model.depth}
    return dataclasses.replace(experiment, model=dataclasses.replace(model, **sizes))


def _channel(tree: Any) -> Any:
    """The first channel mixer at work that has a hidden size; None if there is none."""
    if isinstance(tree, lm.Config):
        tree = tree.blocks()
    if isinstance(tree, (tuple, list)):
        return next(filter(None, map(_channel, tree)), None)
    if not dataclasses.is_dataclass(tree):
        return None
    if lm.is_channel(tree) and hasattr(tree, "hidden"):
        return tree
    return _channel([getattr(tree, field.name) for field in dataclasses.fields(tree)])


def _exchanged(tree: Any, old: Any, new: Any) -> Any:
    """The tree with `new` in all places where `old` or its equal is."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_exchanged(node, old, new) for node in tree)
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return tree
    if tree == old:
        return new
    nodes = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **{k: _exchanged(node, old, new) for k, node in nodes.items()})


def depths(model: lm.Config) -> Iterator[int]:
    """The depth, then others by whole periods, the nearest first, from half of it to twice."""
    period = len(model.pattern)
    yield model.depth
    for away in range(period, model.depth + 1, period):
        yield model.depth + away
        if model.depth - away >= model.depth / 2:
            yield model.depth - away


def step(experiment: Experiment) -> int:
    """Between widths that train: they are multiples of a divisor of the width, the smallest sought.

    Heads have to divide them, rotary halves to be even, a mesh to split them.
    """
    width = experiment.model.width
    divisors = [size for size in range(1, width) if width % size == 0]
    legal = (size for size in divisors if trains(sized(experiment, width=width + size)))
    return next(legal, width)


def trains(experiment: Experiment) -> bool:
    """Whether the model builds, and its weights and batches can be laid out on the mesh."""
    try:
        Subject("", experiment).trainer  # noqa: B018
    except ValueError:
        return False
    return True


def around(
    measure: Callable[[int], float | None],
    start: int,
    step: int,
    target: float,
    *,
    near: float = 0.0,
) -> list[int]:
    """The two sizes start + k * step next to a target that a growing measure passes, nearest first.

    Only one where nothing lies beyond it, or where it is within `near`, a share of the target.
    Sizes without a measure (None) are passed over. Few calls: the next size is where a power law
    through two known ones meets the target; where that takes long, every second one halves what
    is left.
    """
    found: dict[int, float] = {}
    without: set[int] = set()
    size: int | None = start
    while size is not None:
        one = measure(size)
        if one is None:
            without.add(size)
        elif abs(one / target - 1) <= near:
            return [size]
        else:
            found[size] = one
        size = _next(found, without, start, step, target)
    ends = [size for size in _ends(found, target) if size is not None]
    return sorted(ends, key=lambda size: abs(found[size] / target - 1))


def _ends(found: Mapping[int, float], target: float) -> tuple[int | None, int | None]:
    """The largest size at or below the target, and the smallest above it."""
    low = max((size for size in found if found[size] <= target), default=None)
    high = min((size for size in found if found[size] > target), default=None)
    return low, high


def _next(
    found: Mapping[int, float], without: set[int], start: int, step: int, target: float
) -> int | None:
    """The size to measure next; None if none is left between those next to the target."""
    low, high = _ends(found, target)
    least = (start % step or step) if low is None else low + step
    most = LARGEST if high is None else high - step
    wanted = min(max(_guess(found, low, high, target), least), most) if found else start
    center = start + step * round((wanted - start) / step)
    close = (center + step * sign * k for k in range(17) for sign in (1, -1))
    return next((s for s in close if least <= s <= most and s not in without), None)


def _guess(found: Mapping[int, float], low: int | None, high: int | None, target: float) -> float:
    """Where the target may be met; from one side at most eight times as far as the known sizes."""
    if low is not None and high is not None and len(found) > 6 and len(found) % 2:
        return (low + high) / 2
    a, *more = sorted(found, key=lambda size: abs(found[size] - target))
    b = (low if a == high else high) or (more[0] if more else a)
    power = 2.0 if a == b else math.log(found[b] / found[a]) / math.log(b / a)
    away, most = math.log(target / found[a]), math.log(8)
    away = away / power if abs(away) < most * power else math.copysign(most, away)
    return a * math.exp(away)


def crossing(points: Sequence[tuple[int, float | None]], target: float | None) -> float | None:
    """Where the line through two points meets the target; None if it is level or not known."""
    (a, at_a), (b, at_b) = points
    if target is None or at_a is None or at_b is None or at_a == at_b:
        return None
    return a + (target - at_a) * (b - a) / (at_b - at_a)
