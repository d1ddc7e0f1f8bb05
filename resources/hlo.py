"""The text of a compiled program: its computations, how often each runs, what its lines touch."""

import math
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_PLACE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
# Tables before the first computation: a frame has a location, which has a file and a function.
_TEXT_ROW = re.compile(r'^(\d+) "(.*)"$')
_NUMBERS_ROW = re.compile(r"^(\d+) \{(.*)\}$")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_UNTOUCHED = frozenset(  # names for data, and callers, whose bodies have lines of their own
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all".split()
)
_SLICES = frozenset("slice dynamic-slice gather".split())


class Line(NamedTuple):
    """One operation."""

    operation: str  # as "dot"
    bytes: int  # of its result
    operands: list[str]
    rest: str  # what follows the opening bracket

    @property
    def name(self) -> str:
        """What JAX called it, as "jit(step)/jvp(head)/dot_general"; "" where the text has none."""
        found = _NAME.search(self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def fused(self) -> list[str]:
        """The computations that a fusion carries out."""
        return _FUSED.findall(self.rest)


Computations = dict[str, dict[str, Line]]  # lines by the names of their results


def computations(program: str) -> tuple[Computations, str]:
    """Every computation, and the name of the one that runs first."""
    found: Computations = {}
    entry, lines = "", {}
    for text in program.splitlines():
        if head := _HEAD.match(text):
            lines = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(text):
            name, kind, operation, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            lines[name] = Line(operation, bytes_of(kind), operands, rest)
    return found, entry


def bytes_of(kind: str) -> int:
    """Bytes of a type: an array such as bf16[8,128], or a tuple of them."""
    total = 0
    for name, shape in _ARRAY.findall(kind):
        digits = re.search(r"\d+", name)
        bits = int(digits[0]) if digits else 8 * (name == "pred")
        total += bits * math.prod(int(n) for n in shape.split(",") if n) // 8
    return total


def runs(found: Computations, name: str, times: int, notes: set[str]) -> Iterator:
    """(name, how often it runs) of a computation and of all that it calls, fusions aside."""
    yield name, times
    for line in found[name].values():
        inner = times
        if line.operation == "while":
            trips = _trips(found, line.rest)
            inner *= trips or 1
            if not trips:
                notes.add("a loop of unknown length counts once")
        if line.operation == "conditional":
            notes.add("every branch of a conditional counts")
        for called in re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(line.rest))):
            yield from runs(found, called, inner, notes)


def _trips(found: Computations, rest: str) -> int | None:
    """How often a loop runs: as the program says, or from a condition `counter < constant`."""
    if said := _TRIPS.search(rest):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = found[condition[1]] if condition else {}
    compared = [line for line in lines.values() if line.operation == "compare"]
    if len(compared) != 1 or "direction=LT" not in compared[0].rest:
        return None
    limit = lines[compared[0].operands[-1]]
    return int(limit.rest.partition(")")[0]) if limit.operation == "constant" else None


def touched(found: Computations, lines: dict[str, Line], line: Line) -> int:
    """Bytes that one run of a line of `lines` reads and writes: its operands and its result.

    Of an array that is only sliced the slices count, and of one that is updated in place the new
    part: a loop over stacked weights reads one layer's at a time. What a fusion keeps to itself
    counts nothing.
    """
    if line.operation in _UNTOUCHED or line.operation.endswith("-done"):
        return 0
    given = sum(lines[operand].bytes for operand in line.operands if operand in lines)
    if line.operation.endswith("-start") and line.bytes > given:  # names its operand and its result
        return 2 * (line.bytes - given)
    if line.operation != "fusion" or not line.fused:
        return _written(line, lines) + sum(
            _read(line, lines, operand) for operand in dict.fromkeys(line.operands)
        )
    inside = found[line.fused[0]]
    parameters = (name for name, one in inside.items() if one.operation == "parameter")
    *_, root = inside.values()
    return _written(root, inside) + sum(_read_inside(inside, name) for name in parameters)


def _read(line: Line, lines: dict[str, Line], operand: str) -> int:
    """Bytes of `operand` that `line` reads."""
    whole = lines[operand].bytes if operand in lines else 0
    if line.operands.index(operand) > 0:
        return whole
    if line.operation in _SLICES:
        return min(whole, line.bytes)
    return 0 if line.operation == "dynamic-update-slice" else whole


def _read_inside(lines: dict[str, Line], name: str) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    total = 0
    for user, line in lines.items():
        if name in line.operands:
            bare = line.operation == "bitcast"
            total += _read_inside(lines, user) if bare else _read(line, lines, name)
    return min(total, lines[name].bytes)


def _written(line: Line, lines: dict[str, Line]) -> int:
    """Bytes that the root of a fusion, or a line by itself, writes."""
    if line.operation == "dynamic-update-slice":
        return lines[line.operands[1]].bytes
    if line.operation in ("bitcast", "tuple"):
        return sum(_written(lines[operand], lines) for operand in line.operands)
    return 0 if line.operation == "parameter" else line.bytes


def sources(program: str) -> dict[int, str]:
    """Where each stack frame of the program's head is, as "channel/glu.py:52 Mixer.__call__"."""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    rows: dict[int, str] = {}
    for text in program.splitlines():
        if text in tables:
            rows = tables[text]
        elif row := _TEXT_ROW.match(text) or _NUMBERS_ROW.match(text):
            rows[int(row[1])] = row[2]
        elif _HEAD.match(text):
            break
    files, functions, locations, frames = tables.values()
    found = {}
    for frame, text in frames.items():
        place = _numbers(locations[_numbers(text)["file_location_id"]])
        file = _short(files[place["file_name_id"]])
        function = functions[place["function_name_id"]].replace("<locals>.", "")
        found[frame] = f"{file}:{place['line']} {function}"
    return found


def source(line: Line, frames: dict[int, str]) -> str:
    """Where in Python a line comes from; "" where the program does not say."""
    if frame := _FRAME.search(line.rest):
        return frames.get(int(frame[1]), "")
    place = _PLACE.search(line.rest)
    return f"{_short(place[1])}:{place[2]}" if place else ""


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}


def _short(file: str) -> str:
    return "/".join(PurePath(file).parts[-2:])
