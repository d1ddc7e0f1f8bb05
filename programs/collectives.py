"""Bytes that a compiled program moves between devices, by kind of collective and axis of the mesh.

Read from the text of the optimised program: every collective of every computation, as often as the
loops around it run. Bytes are what one device sends, in the ring forms that bandwidth allows (n
devices in a group, S bytes of operands on each):

    all-reduce 2 S (n - 1) / n          all-gather S (n - 1)        collective-permute S
    reduce-scatter S (n - 1) / n        all-to-all S (n - 1) / n
"""

import collections
import dataclasses
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from programs import hlo

SENT = {  # times S, of n devices
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Three ways in which groups of devices are written: lists, a counted grid, axes of a mesh.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]+)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All calls of one kind along the same axes."""

    kind: str  # as "all-reduce"
    axes: tuple[str, ...]  # in which the devices of a group differ
    calls: int  # in one run of the program
    bytes: float  # that a device sends in one run, the mean of all devices


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of a program sends; `notes` say what the text leaves open."""

    collectives: tuple[Collective, ...]
    notes: frozenset[str] = frozenset()

    @property
    def bytes(self) -> float:
        """What a device sends in one run, the mean of all devices."""
        return math.fsum(c.bytes for c in self.collectives)


def traffic(program: str, mesh: Mesh) -> Traffic:
    """The collectives of `program`, the text of a program compiled for `mesh`."""
    computations, entry = hlo.computations(program)
    notes: set[str] = set()
    calls: dict[tuple, int] = collections.Counter()
    sent: dict[tuple, float] = collections.defaultdict(float)
    for name, times in hlo.runs(computations, entry, 1, notes):
        for kind, size, rest in _collectives(computations, name).values():
            groups = _groups(rest, mesh.size)
            senders = len(groups) if kind == "collective-permute" else groups.size
            key = kind, _axes(groups, mesh)
            calls[key] += times
            sent[key] += times * size * SENT[kind](groups.shape[1]) * senders / mesh.size
    order = sorted(calls)
    found = (Collective(kind, axes, calls[kind, axes], sent[kind, axes]) for kind, axes in order)
    return Traffic(tuple(c for c in found if c.bytes), frozenset(notes))


def _collectives(computations: hlo.Computations, name: str) -> dict[Any, tuple[str, int, str]]:
    """(kind, bytes of operands, rest of the line) of a computation and its fusions, by channel.

    A TPU program writes a collective that runs beside other work into several fusions, its start,
    its steps and its end: the channel says that it is one.
    """
    found: dict[Any, tuple[str, int, str]] = {}
    lines = computations[name]
    for line in lines.values():
        kind = line.operation.removesuffix("-start")
        if kind in SENT:
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            channel = _CHANNEL.search(line.rest)
            size = sum(lines[operand].bytes for operand in line.operands)
            found[channel[1] if channel else (name, len(found))] = kind, size, line.rest
        for fused in line.fused:
            found = _collectives(computations, fused) | found
    return found


def _groups(rest: str, devices: int) -> np.ndarray:
    """Positions in the mesh of the devices that talk to each other, (groups, devices of one)."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]
    if listed := _LISTED.search(rest):
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if counted := _COUNTED.search(rest):
        shape, source, order = counted.groups()
        return _grid(numbers(source), numbers(order)).reshape(numbers(shape))
    if written := _MESH.search(rest):
        axes, source, order, chosen = written.groups()
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
        shape = [int(size) for size in sizes]
        ids = _grid(numbers(source) or shape, numbers(order)).reshape(shape)
        last = [names.index(axis) for axis in re.findall(r"\w+", chosen)]
        members = math.prod(shape[axis] for axis in last)
        return np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, members)
    return np.arange(devices)[None]


def _grid(shape: list[int], order: list[int]) -> np.ndarray:
    """0, 1, 2 ... in a grid, its axes in another order (none given: as they are)."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape)))


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Axes along which the devices of any group differ."""
    places = np.unravel_index(groups, mesh.devices.shape)
    differ = (np.any(place != place[:, :1]) for place in places)
    return tuple(name for name, moves in zip(mesh.axis_names, differ, strict=True) if moves)
