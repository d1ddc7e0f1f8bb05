"""Numbers over the size of something: context, length, batch or width, with fitted exponents and
with the sizes from which on one config takes less than another, and why.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation import rows, speed
from evaluation.subject import DECODED, Subject
from report.report import Crossover
from resources import compute, memory, scaling
from resources.row import Curve, Row, not_available

AXES = ("length", "batch", "width")
CONTEXT = tuple(2**power for power in range(8, 21, 2))  # tokens at which a state is weighed
VAGUE = 1.0  # width of an exponent's interval from which on it tells T from T^2 no more
PARTS = {"train": 1, "prefill": 1, "decode": DECODED}  # a call's equal parts


def parse(text: str) -> list[tuple[str, list[int]]]:
    """`length:128,256;batch:1,2` as [("length", [128, 256]), ("batch", [1, 2])]."""
    found = []
    for part in filter(None, text.split(";")):
        match = re.fullmatch(r"(\w+):(\d+(?:,\d+)*)", part)
        if not match or match[1] not in AXES:
            axes = ", ".join(AXES)
            raise ValueError(f"--curves={text}: write AXIS:N,N,..., with an axis of {axes}.")
        sizes = sorted({int(size) for size in match[2].split(",")})
        if len(sizes) < 3 or sizes[0] < 1:
            raise ValueError(f"--curves={text}: {part!r} needs at least three sizes, above 0.")
        found.append((match[1], sizes))
    return found


def state(subject: Subject) -> Curve:
    """Bytes that decoding carries for one sequence, over the tokens that it has read."""
    found = [rows.state("state", subject, tokens) for tokens in CONTEXT]
    return Curve("state", "context", CONTEXT, found)


class Swept:
    """Configs timed at several sizes of one axis: their curves, exponents and crossovers."""

    def __init__(self, subjects: Sequence[Subject], axis: str, sizes: list[int], seconds: float):
        self.subjects, self.axis, self.sizes = subjects, axis, sizes
        self.timed: dict[str, list[list[speed.Timed | None]]] = {kind: [] for kind in speed.KINDS}
        self.peaks: list[list[Row]] = []
        for size in sizes:  # one size after the other: the programs of one are dropped
            there = [subject.at(**{axis: size}) for subject in subjects]
            for kind in speed.KINDS:
                self.timed[kind].append(speed.timed(there, kind, seconds))
            self.peaks.append([rows.planned_peak(subject) for subject in there])

    def curves(self, column: int) -> list[Curve]:
        """Seconds of a call, or of a token that is written, and planned memory of training."""
        found = []
        for kind, parts in PARTS.items():
            name = f"{kind} {'call' if parts == 1 else 'token'}"
            points = [self._point(name, row[column], parts) for row in self.timed[kind]]
            found.append(Curve(name, self.axis, self.sizes, points))
        peaks = [row[column] for row in self.peaks]
        return [*found, Curve("train memory", self.axis, self.sizes, peaks)]

    def _point(self, name: str, found: speed.Timed | None, parts: int) -> Row:
        if found is None:
            return not_available(name, "s", speed.ENCODER)
        interval = found.timing.interval
        scaled = interval and (interval[0] / parts, interval[1] / parts)
        return Row(name, found.timing.median / parts, "s", "measured", interval=scaled)

    def exponents(self, column: int) -> list[Row]:
        """p of value = c size^p, for each curve that has values."""
        found = []
        for curve in self.curves(column):
            name = f"{curve.name}, exponent over {self.axis}"
            values = [row.value for row in curve.rows if row.value is not None]
            if len(values) < len(curve.rows):
                reason = next(row.note for row in curve.rows if row.value is None)
                found.append(not_available(name, "", reason))
                continue
            fit = scaling.exponent(self.sizes, values, confidence=0.99)
            found.append(exponent_row(name, self.sizes, fit))
        return found

    def crossovers(self) -> list[Crossover]:
        """Where each config begins to take less than the first: seconds a token, and memory."""
        found = []
        for other in range(1, len(self.subjects)):
            for kind, timed in self.timed.items():
                pair = [[one for one in (row[i] for row in timed) if one] for i in (0, other)]
                if all(len(side) == len(timed) for side in pair):  # an encoder writes no text
                    found.append(self._crossover(kind, other, *map(_seconds, pair)))
            a, b = (np.array([row[i].value for row in self.peaks], float) for i in (0, other))
            if np.isfinite([a, b]).all():  # not every backend tells its plan
                found.append(self._crossover("train memory", other, a, b))
        return found

    def _crossover(self, kind: str, other: int, a: np.ndarray, b: np.ndarray) -> Crossover:
        than, config = self.subjects[0].name, self.subjects[other].name
        where = scaling.crossover(self.sizes, a, b, names=(than, config), confidence=0.99)
        interval = None if where.low is None or where.high is None else (where.low, where.high)
        why = self._why(kind, where.length, other) if where.length and kind in self.timed else ""
        return Crossover(kind, self.axis, config, than, where.length, interval, where.verdict, why)

    def _why(self, kind: str, length: float, other: int) -> str:
        """The work of a token by both at the first size from `length` on, and each one's roof."""
        i = next(i for i, size in enumerate(self.sizes) if size >= length)
        than, config = self.subjects[0], self.subjects[other]
        one, own = self.timed[kind][i][0], self.timed[kind][i][other]
        assert one and own  # only what both can do has a crossover
        a, b = _work(than, one), _work(config, own)
        bound = f"it is bound by {b.bound}, {than.name} by {a.bound}"
        if a.bound == b.bound:
            bound = f"both are bound by {a.bound}"
        return (
            f"at {self.axis} {self.sizes[i]} {config.name} executes {b.flops / a.flops:.2f} x the "
            f"FLOPs of {than.name} and moves {b.moved / a.moved:.2f} x its bytes; {bound}"
        )


def exponent_row(name: str, sizes: Sequence[int], fit: scaling.PowerLaw) -> Row:
    """The exponent; no number where its interval would hold both T and T^2."""
    if fit.high - fit.low > VAGUE:
        reason = (
            f"{len(sizes)} sizes leave it within {fit.low:.2f} to {fit.high:.2f}: "
            "measure more sizes, further apart"
        )
        return not_available(name, "", reason)
    note = f"R2 {fit.r2:.3f}, sizes {min(sizes)} to {max(sizes)}"
    return Row(name, fit.exponent, "", "modelled", note, (fit.low, fit.high))


class Work(NamedTuple):
    """FLOPs and bytes of a token on one device, and the roof that bounds their time."""

    flops: float
    moved: float
    bound: str


def _work(subject: Subject, timed: speed.Timed) -> Work:
    dtype, devices = subject.experiment.model.dtype, subject.mesh.size
    flops = compute.executed_flops(timed.compiled.jaxpr).total / devices
    moved = memory.moved(timed.compiled.program.as_text())
    roofs = compute.matmul_peak(dtype), memory.copy_bandwidth()
    bound = scaling.roofline(flops, moved, *roofs).bound
    return Work(flops / timed.tokens, moved / timed.tokens, bound)


def _seconds(timed: list[speed.Timed]) -> np.ndarray:
    """Seconds a token by size and call; as many calls at each size as at that with the fewest."""
    calls = min(len(one.timing.seconds) for one in timed)
    return np.array([np.array(one.timing.seconds[:calls]) / one.tokens for one in timed])
