"""Configs of one budget: as many parameters, FLOPs, state bytes, memory or dollars as another has.

The width is solved for. Where the widths that a model builds with lie too far apart, the hidden
size of its channel mixers is solved for too, then finer widths are tried, then other depths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from configs import schema
from configs.schema import Experiment
from evaluation import rows, sizes
from evaluation.subject import Subject
from report.table import human
from resources import memory as bytes_of

TOLERANCE = 0.01  # share of the target by which a config may miss it
ROUND = 8  # devices lay arrays out in multiples of it: such sizes are tried first

Known = dict[str, float | None]  # value by an experiment's fingerprint; None: it does not build


@dataclasses.dataclass(frozen=True)
class Budget:
    """What configs are compared at equal amounts of."""

    name: str
    unit: str
    measure: Callable[[Experiment], float]
    slow: bool = False  # a measurement takes seconds: search ends at the first size that will do


def parameters(experiment: Experiment) -> float:
    """All weights."""
    return rows.parameters(Subject("", experiment))[0].value or 0


def flops(experiment: Experiment) -> float:
    """Model FLOPs of the loss per token; of the experts only those that a token has."""
    subject = Subject("", experiment)
    return rows.model_flops(subject) / subject.tokens


def state(experiment: Experiment, tokens: int) -> float:
    """Bytes that decoding carries for one sequence of so many tokens."""
    subject = Subject("", experiment)
    if not subject.causal:
        raise ValueError(f"state:{tokens} has no value: {rows.NO_STATE}.")
    return rows.state_bytes(subject, tokens)


def memory(experiment: Experiment) -> float:
    """Bytes of one device at the peak of a training step, as the compiler planned them."""
    planned = bytes_of.program_bytes(Subject("", experiment).train.program)
    if planned is None:
        raise ValueError("memory has no value: the compiler does not say what it planned.")
    return planned.peak


BUDGETS = {
    "parameters": Budget("parameters", "", parameters),
    "flops": Budget("flops", "FLOP/token", flops),
    "memory": Budget("memory", "B", memory, slow=True),
}


def named(text: str) -> Budget:
    """The budget of that name; `state:4096` is the state after 4,096 tokens."""
    name, _, tokens = text.partition(":")
    if name == "state" and tokens.isdecimal() and int(tokens):
        return Budget(text, "B", functools.partial(state, tokens=int(tokens)))
    if text not in BUDGETS:
        names = ", ".join((*BUDGETS, "state:TOKENS"))
        raise ValueError(f"no budget {text!r}. Use {names} (such as state:4096).")
    return BUDGETS[text]


def match(
    experiments: Sequence[Experiment],
    budget: Budget,
    *,
    tolerance: float = TOLERANCE,
    known: Known | None = None,
    names: Sequence[str] = (),
) -> list[Experiment]:
    """The experiments, each after the first sized to the first one's budget; see `solve`.

    A ValueError says which of `names` (default: "config 1" and so on) could not be.
    """
    known = {} if known is None else known
    names = names or [f"config {i}" for i in range(1, len(experiments) + 1)]
    matched: list[Experiment] = []
    target = math.nan
    for name, experiment in zip(names, experiments, strict=True):
        try:
            if not matched:
                target = value(experiment, budget, known)
                matched.append(experiment)
                continue
            found = solve(experiment, budget, target, tolerance=tolerance, known=known)
            matched.append(found)
        except ValueError as error:
            raise ValueError(f"{name} cannot be matched: {error}") from error
    return matched


def solve(
    experiment: Experiment,
    budget: Budget,
    target: float,
    *,
    tolerance: float = TOLERANCE,
    known: Known | None = None,
) -> Experiment:
    """The experiment, its model sized so that abs(budget / target - 1) <= tolerance.

    One that is so already stays as it is. Otherwise, at its depth and then, unless the budget is
    slow, at depths further and further away, from half to twice, by whole periods of the pattern:

    1. the nearest width of those that the model builds with and that are multiples of 8;
    2. at the two such widths next to the target the hidden size of the channel mixer, from half
       to twice of what it is there: the nearest multiple of 8, else the nearest;
    3. the nearest width of all that the model builds with.

    Budgets are taken to grow with every size. `known` keeps values from call to call of one budget.
    ValueError with the nearest values and their sizes where nothing is within tolerance.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"{budget.name}: the target {target} must be positive and finite.")
    Subject("", experiment).trainer  # noqa: B018  one that does not train says so itself
    search = Search(experiment, budget, target, tolerance, {} if known is None else known)
    value(experiment, budget, search.known)  # and one without such a budget
    if search.suits(experiment):
        return experiment
    fine = sizes.step(experiment)
    coarse = math.lcm(fine, ROUND)
    for depth in [experiment.model.depth] if budget.slow else sizes.depths(experiment.model):
        ends = search.widths(depth, coarse)
        found = next(filter(search.suits, ends), None)
        found = found or next(filter(None, map(search.by_hidden, ends)), None)
        if found is None and fine != coarse:
            found = next(filter(search.suits, search.widths(depth, fine)), None)
        if found:
            return found
    raise ValueError(search.miss())


class Search:
    """What `solve` has tried for one experiment."""

    def __init__(
        self,
        experiment: Experiment,
        budget: Budget,
        target: float,
        tolerance: float,
        known: Known,
    ):
        self.experiment, self.budget, self.known = experiment, budget, known
        self.target, self.tolerance = target, tolerance
        self.tried: dict[str, Experiment] = {}
        self.has_hidden = "hidden" in sizes.of(experiment)  # a size that the budget depends on

    def value(self, experiment: Experiment) -> float | None:
        """The budget of a candidate; None if it does not build."""
        key = schema.fingerprint(experiment)
        self.tried[key] = experiment
        try:
            return value(experiment, self.budget, self.known)
        except ValueError:
            self.known[key] = None
            return None

    def suits(self, experiment: Experiment) -> bool:
        """Whether a candidate is within tolerance, and trains on the mesh."""
        found = self.value(experiment)
        if found is None or abs(found / self.target - 1) > self.tolerance:
            return False
        return sizes.trains(experiment)

    def widths(self, depth: int, step: int) -> list[Experiment]:
        """The candidates with multiples of `step` next to the target, the nearest first."""
        model = self.experiment.model
        near = self.tolerance if self.budget.slow else 0.0
        sized = functools.partial(sizes.sized, self.experiment, depth=depth)
        start = max(1, round(model.width / step)) * step
        measure = lambda width: self.value(sized(width=width))
        found = sizes.around(measure, start, step, self.target, near=near)
        return [sized(width=width) for width in found]

    def by_hidden(self, candidate: Experiment) -> Experiment | None:
        """The candidate with the hidden size of its channel mixer that meets the target.

        The budget is a line over it, or nearly. It starts at the rule's size, which no one knows.
        """
        if not self.has_hidden:
            return None
        width = candidate.model.width
        at = functools.partial(sizes.sized, candidate)
        points = [(h, self.value(at(hidden=h))) for h in (2 * width, 4 * width)]
        own = self.value(candidate)
        self.has_hidden = points[0][1] != points[1][1]
        for _ in range(3):
            size, natural = sizes.crossing(points, self.target), sizes.crossing(points, own)
            if size is None or natural is None or not natural / 2 <= size <= 2 * natural:
                return None
            rounded = [max(1, round(size / grain)) * grain for grain in (ROUND, 1)]
            for hidden in rounded:
                if self.suits(at(hidden=hidden)):
                    return at(hidden=hidden)
            points = [*points, (rounded[-1], self.value(at(hidden=rounded[-1])))][-2:]
        return None

    def miss(self) -> str:
        """One line: what was asked for, and the nearest values below and above with their sizes."""
        found = [(v, e) for key, e in self.tried.items() if (v := self.known[key]) is not None]
        below = max((p for p in found if p[0] <= self.target), key=lambda p: p[0], default=None)
        above = min((p for p in found if p[0] > self.target), key=lambda p: p[0], default=None)
        nearest = [
            f"{', '.join(f'{name} {size}' for name, size in sizes.of(e).items() if size)}: "
            f"{amount(self.budget, v, self.target)}"
            for v, e in filter(None, (below, above))
        ]
        wanted = human(self.target, self.budget.unit)
        return (
            f"{self.budget.name}: nothing within {100 * self.tolerance:g} % of {wanted}. "
            f"Nearest: {'; '.join(nearest)}."
        )


def value(experiment: Experiment, budget: Budget, known: Known) -> float:
    """The budget of an experiment, measured once."""
    key = schema.fingerprint(experiment)
    if key not in known:
        known[key] = budget.measure(experiment)
    found = known[key]
    if found is None:
        raise ValueError("the experiment does not build.")
    return found


def describe(
    before: Sequence[Experiment],
    after: Sequence[Experiment],
    budget: Budget,
    known: Known | None = None,
) -> list[str]:
    """A line for each experiment: `width 512 -> 496, depth 6: parameters 19.1M (+0.21 %)`.

    The difference is to the first one. With the `known` of `match` nothing is measured again.
    """
    known = {} if known is None else known
    target = value(after[0], budget, known)
    lines = []
    for old, new in zip(before, after, strict=True):
        had, has = sizes.of(old), sizes.of(new)
        changes = [_change(name, had[name], has[name]) for name in has if has[name]]
        lines.append(f"{', '.join(changes)}: {amount(budget, value(new, budget, known), target)}")
    return lines


def amount(budget: Budget, found: float, target: float) -> str:
    """A value of a budget, and how far it is off the target."""
    share = 100 * (found / target - 1)
    return f"{budget.name} {human(found, budget.unit)} ({share:+.2g} %)"


def _change(name: str, old: int, new: int) -> str:
    return f"{name} {new}" if old == new else f"{name} {old or 'by its rule'} -> {new}"


def dollars(experiment: Experiment, seconds: float, per_hour: float) -> float:
    """The price of a training run: per_hour / 3600 * seconds of a step * steps."""
    return per_hour / 3600 * seconds * experiment.steps


def match_dollars(
    experiments: Sequence[Experiment], seconds: Sequence[float], *, tolerance: float = TOLERANCE
) -> list[Experiment]:
    """The experiments, each after the first with the steps that the first one's money buys.

    steps = steps of the first * seconds of its step / seconds of a step: one price for all.
    ValueError where no whole number of steps is within tolerance, or they end in the warmup.
    """
    if len(seconds) != len(experiments) or not all(0 < each < math.inf for each in seconds):
        raise ValueError(f"seconds={list(seconds)}: give one above 0 for each experiment.")
    first, sized = experiments[0], [experiments[0]]
    money = f"dollars: the money of {first.steps} steps of the first config"
    for experiment, each in zip(experiments[1:], seconds[1:], strict=True):
        exact = first.steps * seconds[0] / each
        steps, warmup = round(exact), experiment.optimizer.warmup_steps
        if abs(steps / exact - 1) > tolerance:
            raise ValueError(f"{money} buys {exact:.4g}, no whole number; give it more steps.")
        if steps < warmup:
            raise ValueError(f"{money} buys {steps}, below optimizer.warmup_steps={warmup}.")
        sized.append(dataclasses.replace(experiment, steps=steps))
    return sized
