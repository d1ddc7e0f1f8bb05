"""Where the time of a program goes: its operations by measured seconds, from a profiler's trace.

    share(operation) = seconds(operation) / sum of all operations' seconds

Seconds are those of an operation itself, in one run of the program and on all threads or devices
together: a loop counts what it takes beyond the operations of its body, which count each time that
they run. Bytes are what the operation's lines in the compiled program read and write (operands and
results, of slices only the slices), times its calls; caches are not looked into.

An operation is mapped back by the name that JAX gave it, such as

    jit(step)/transpose(jvp())/while/body/closed_call/glu/dot_general

which is path "glu/dot_general", direction "backward". A fusion bears the name of one operation in
it, mostly the last; copies that the compiler adds bear none. Scopes come from `jax.named_scope`; a
program without any still has its lines of Python (`source`).
"""

import dataclasses
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from programs import flops, hlo
from programs.moved import touched

# What JAX's transforms and loops put into a name, and what says nothing of where it comes from.
_TRANSFORMS = re.compile(r"^(?:jvp|transpose|vmap|jit|pjit|remat|checkpoint|shard_map)\((.*)\)$")
_WRAPPERS = re.compile(
    r"^(?:|while|body|cond|closed_call|core_call|eval_jaxpr|checkpoint|remat2?|rematted_computation"
    r"|pjit|jit|custom_[jv][vj]p_call|branch_\d+_fun|shard_map)$"
)
_EVENT = re.compile(r"^%?([\w.\-]+)(?: = .*)?$", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, in one run of it."""

    path: str  # of scopes, the primitive last: "glu/dot_general"; the compiler's: "unnamed/copy"
    operation: str  # its name in the compiled program, as "fusion.3"
    direction: flops.Direction  # "other": outside of the gradient, as an optimizer, or unnamed
    calls: float  # the mean of the traced runs
    seconds: float  # without those of the operations within it
    share: float  # of all operations' seconds
    bytes: float  # read and written by all calls
    source: str  # where in Python, as "channel/glu.py:52 Mixer.__call__"; "" if not said


@dataclasses.dataclass(frozen=True)
class Profile:
    """The operations of one run, those that take longest first."""

    operations: tuple[Operation, ...]
    seconds: float  # wall time of one run while traced; the profiler slows short operations
    lines: int  # threads, streams or cores that operations ran on
    unmapped: float  # share of the seconds in operations that the program's text does not have


def profile(program: str, call: Callable[[], Any], runs: int = 3) -> Profile:
    """Trace `runs` calls of a program whose compiled text is `program`; one more call warms up.

    `call()` must run that program once and nothing else that was compiled.
    """
    if runs < 1:
        raise ValueError(f"runs={runs} must be at least 1.")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            for _ in range(runs):
                jax.block_until_ready(call())
            seconds = (time.perf_counter() - start) / runs
        return read(program, folder, runs, seconds)


def read(program: str, folder: str | Path, runs: int, seconds: float) -> Profile:
    """The profile of a trace in `folder` that holds `runs` runs, each of so many seconds."""
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise ValueError(
            f"{folder} holds no trace (*.xplane.pb); give jax.profiler.trace's folder."
        )
    return summed(program, ProfileData.from_file(str(files[-1])), runs, seconds)


def summed(program: str, data: Any, runs: int, seconds: float) -> Profile:
    """The profile of events that a profiler collected."""
    found, _ = hlo.computations(program)
    frames = hlo.sources(program)
    lines = {name: (inside, line) for inside in found.values() for name, line in inside.items()}
    gradient = any("jvp(" in line.name for _, line in lines.values())
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    used = 0
    for events in _lines_of_events(data, program):
        used += bool(events)
        for name, own in _own_seconds(events):
            calls[name] += 1
            spent[name] += own
    total = sum(spent.values())
    if not total:
        raise ValueError(f"the trace holds no operation of {program[:40]!r}; trace that program.")

    def operation(name: str) -> Operation:
        inside, line = lines[name]
        return Operation(
            path(line.name) or f"unnamed/{line.operation}",
            name,
            flops.direction(line.name) if gradient else "forward",
            calls[name] / runs,
            spent[name] / runs,
            spent[name] / total,
            calls[name] / runs * touched(found, inside, line),
            hlo.source(line, frames),
        )

    operations = sorted(map(operation, spent.keys() & lines.keys()), key=lambda o: -o.seconds)
    known = sum(o.share for o in operations)
    return Profile(tuple(operations), seconds, used, max(0.0, 1 - known))


def by_path(operations: Iterable[Operation], depth: int | None = None) -> list[Operation]:
    """Operations of equal direction and first `depth` scopes (None: all) as one, longest first.

    The primitive and the letters of an einsum are no scopes. `operation` says how many they are,
    `source` where the longest is from.
    """
    groups: dict[Any, list[Operation]] = defaultdict(list)
    for one in operations:
        scopes = [part for part in one.path.split("/")[:-1] if "->" not in part]
        groups["/".join(scopes[:depth]), one.direction].append(one)

    found = []
    for (scopes, way), group in groups.items():
        fields = ("calls", "seconds", "share", "bytes")
        sums = {field: sum(getattr(one, field) for one in group) for field in fields}
        longest = max(group, key=lambda one: one.seconds).source
        found.append(Operation(scopes, f"{len(group)} operations", way, **sums, source=longest))
    return sorted(found, key=lambda one: -one.seconds)


def path(name: str) -> str:
    """Scopes and primitive of JAX's name of an operation, without transforms, loops and the jit."""
    *scopes, primitive = _split(name)
    parts = _parts(scopes[1:] if name.startswith("jit(") else scopes)
    return "/".join(parts + (_parts([primitive]) or [primitive]))


def _parts(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        if inner := _TRANSFORMS.match(name):
            found += _parts(_split(inner[1]))
        elif name == "checkpoint":
            found = _once(found)
        elif not _WRAPPERS.match(name):
            found.append(name.partition("#")[0])
    return found


def _once(parts: list[str]) -> list[str]:
    """`parts` without its end where that repeats: JAX names the scopes around remat twice."""
    for size in range(len(parts) // 2, 0, -1):
        if parts[-size:] == parts[-2 * size : -size]:
            return parts[:-size]
    return parts


def _split(name: str) -> Iterator[str]:
    """`name` at the slashes that no bracket encloses."""
    depth, start = 0, 0
    for i, letter in enumerate(name):
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            yield name[start:i]
            start = i + 1
    yield name[start:]


class _Event(NamedTuple):
    name: str
    start: float  # nanoseconds
    duration: float

    def encloses(self, other: "_Event") -> bool:
        """Whether `other`, which starts later, ends within; to a nanosecond, as sums round."""
        return other.start + other.duration <= self.start + self.duration + 1


def _lines_of_events(data: Any, program: str) -> Iterator[list[_Event]]:
    """The program's operations on each thread of a CPU, stream of a GPU or core of a TPU.

    CPU threads and GPU streams say for an event which operation of which program it carries out; a
    TPU has a line of operations, named by their text. Where a GPU's trace has both, the line of
    operations repeats what the streams say.
    """
    module = re.match(r"HloModule ([\w.\-]+)", program)
    for plane in data.planes:
        lines = list(plane.lines)
        named = [line for line in lines if line.name == "XLA Ops"]
        for line in named or lines:
            events = []
            for event in line.events:
                said = dict(event.stats)
                name = said.get("hlo_op") or (event.name if named else None)
                other = module and said.get("hlo_module", module[1]) != module[1]
                if name is not None and not other and (match := _EVENT.match(str(name))):
                    events.append(_Event(match[1], event.start_ns, event.duration_ns))
            yield events


def _own_seconds(events: list[_Event]) -> Iterator[tuple[str, float]]:
    """(name, seconds outside of the events that it encloses) of each event of one line."""
    order = sorted(events, key=lambda e: (e.start, -e.duration))
    own = [event.duration for event in order]
    around: list[int] = []
    for i, event in enumerate(order):
        while around and not order[around[-1]].encloses(event):
            around.pop()
        if around:
            own[around[-1]] -= event.duration
        around.append(i)
    for event, nanoseconds in zip(order, own, strict=True):
        yield event.name, max(0.0, nanoseconds) / 1e9
