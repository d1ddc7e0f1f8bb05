"""Why a program executes other FLOPs than the mathematics needs, operation by operation.

    executed - model = form + gradient + recomputed + other

    form       = forward executed - model FLOPs of the forward pass: masked pairs of attention,
                 pairs within a chunk, norms and activations, gradients that a loss forms early
    gradient   = backward executed - (times - 1) x model FLOPs of the forward pass
    recomputed = what remat computes again
    other      = outside of the gradient: optimizer, clipping, constants such as rotary angles

`times` is how many forward passes the program needs by convention: 3 for a training step, 1 for a
forward pass. Operations are those of kernels/; all else is a contraction or arithmetic. XLA takes
each loop's body once: the same walk in that manner (`once`) says which operations it misses.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from programs.flops import Flops, flops_of_loops_once, labelled, model_flops
from resources.compute import executed_flops

CONTRACTIONS, ARITHMETIC = "other contractions", "other arithmetic"


@dataclasses.dataclass(frozen=True)
class Part:
    """FLOPs of all calls of one operation in one run of a program, gradients included."""

    operation: str  # of kernels/, as "attention"; or what stands outside of all of them
    needed: float  # model FLOPs of the forward pass
    times: float  # forward passes that the program needs by convention
    forward: float  # executed; in a program without a gradient all that runs
    backward: float
    recomputed: float
    other: float
    once: float  # executed if each loop ran once, as XLA counts

    @property
    def model(self) -> float:
        """Model FLOPs of the program."""
        return self.times * self.needed

    @property
    def executed(self) -> float:
        """All that runs."""
        return self.forward + self.backward + self.recomputed + self.other

    @property
    def form(self) -> float:
        """What the form that runs forward adds to the model FLOPs; below 0 where it saves."""
        return self.forward - self.needed

    @property
    def gradient(self) -> float:
        """What the backward pass adds to its share of the model FLOPs."""
        return self.backward - (self.times - 1) * self.needed


def parts(
    program: Callable,
    args: Sequence[Any],
    forward: Callable,
    inputs: Sequence[Any],
    times: float = 3.0,
) -> tuple[Part, ...]:
    """Operations of `program(*args)`, most executed first, beside what `forward(*inputs)` needs.

    Arguments are arrays or shapes: both functions are traced, nothing runs. `program` may be a
    jitted function; it must be traced here, as only then its calls are labelled.
    """
    traced, labels = labelled(program, *args)
    executed = _shares(executed_flops(traced, labels))
    once = _shares(flops_of_loops_once(traced, labels))
    needed = _shares(model_flops(forward, *inputs))
    gradient = any(direction != "other" for _, direction in executed)
    found = []
    for name in {name for name, _ in (*executed, *needed)}:
        directions = ("forward", "backward", "recomputed", "other")
        ran = {direction: executed.get((name, direction), 0.0) for direction in directions}
        if not gradient:
            ran = dict.fromkeys(directions, 0.0) | {"forward": sum(ran.values())}
        alone = sum(count for (other, _), count in needed.items() if other == name)
        body = sum(count for (other, _), count in once.items() if other == name)
        found.append(Part(name, alone, times, **ran, once=body))
    found = [part for part in found if part.executed or part.model]
    return tuple(sorted(found, key=lambda part: (-part.executed, part.operation)))


def _shares(flops: Flops) -> dict[tuple[str, str], float]:
    """FLOPs by operation and direction."""
    found: dict[tuple[str, str], float] = {}
    for place, part in flops.by_place.items():
        function = place.operation.rpartition(".")[2]
        counts = {function: part.total} if function else _besides(part)
        for name, number in counts.items():
            key = name, place.direction
            found[key] = found.get(key, 0.0) + number
    return found


def _besides(part: Flops) -> dict[str, float]:
    return {CONTRACTIONS: part.matmul, ARITHMETIC: part.elementwise}
