"""The text of a compiled program: its computations, how often each runs, where lines come from.

Every array is read with its place: a layout may put it into tiles, whose padding takes memory too,
and onto the chip, where nothing moves to reach it. Programs for CPUs and GPUs say neither.
"""

import math
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILED = re.compile(r"([\d,]+):T\(([\d,]+)\)")
_ON_CHIP = re.compile(r"S\([1-9]\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:body|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"index=(\d+)")
_INTEGER = re.compile(r"(-?\d+)\)")
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_PLACE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
# Tables before the first computation: a frame has a location, which has a file and a function.
_TEXT_ROW = re.compile(r'^(\d+) "(.*)"$')
_NUMBERS_ROW = re.compile(r"^(\d+) \{(.*)\}$")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Array(NamedTuple):
    """One array of a line's result."""

    size: int  # bytes in memory: of whole tiles
    content: int  # bytes without padding
    on_chip: bool


class Line(NamedTuple):
    """One operation."""

    operation: str  # as "dot"
    arrays: tuple[Array, ...]  # its result
    operands: list[str]
    rest: str  # what follows the opening bracket
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of its result, without padding."""
        return sum(array.content for array in self.arrays)

    @property
    def size(self) -> int:
        """Bytes of its result in memory."""
        return sum(array.size for array in self.arrays)

    @property
    def name(self) -> str:
        """What JAX called it, as "jit(step)/jvp(head)/dot_general"; "" where the text has none."""
        found = _NAME.search(self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def fused(self) -> list[str]:
        """The computations that a fusion carries out."""
        return _FUSED.findall(self.rest)

    @property
    def called(self) -> list[str]:
        """The computations that it runs, fusions and the conditions of loops aside."""
        return re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.rest)))

    @property
    def condition(self) -> str:
        """The computation that says whether a loop goes on."""
        found = _CONDITION.search(self.rest)
        return found[1] if found else ""

    @property
    def number(self) -> int | None:
        """Which parameter of its computation it is, if it is one."""
        found = _INTEGER.match(self.rest) if self.operation == "parameter" else None
        return int(found[1]) if found else None

    @property
    def constant(self) -> int | None:
        """Its value, if it is an integer known when compiled."""
        found = _INTEGER.match(self.rest) if self.operation == "constant" else None
        return int(found[1]) if found else None


Lines = dict[str, Line]  # by the names of their results
Computations = dict[str, Lines]


def computations(program: str) -> tuple[Computations, str]:
    """Every computation, and the name of the one that runs first."""
    found: Computations = {}
    entry, lines = "", {}
    for text in program.splitlines():
        if head := _HEAD.match(text):
            lines = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(text):
            root, name, kind, operation, rest = match.groups()
            operands = _OPERAND.findall(_until_closed(rest))
            lines[name] = Line(operation, arrays(kind), operands, rest, root is not None)
    return found, entry


def _until_closed(text: str) -> str:
    """The text up to the parenthesis that closes a list of operands."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:at]
    return text


def arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type: one such as bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, or a tuple of them."""
    found = []
    for name, shape, layout in _ARRAY.findall(kind):
        digits = re.search(r"\d+", name)
        bits = int(digits[0]) if digits else 8 * (name == "pred")
        sizes = [int(n) for n in shape.split(",") if n]
        size, content = (bits * math.prod(ns) // 8 for ns in (_padded(sizes, layout), sizes))
        found.append(Array(size, content, _ON_CHIP.search(layout) is not None))
    return tuple(found)


def _padded(sizes: list[int], layout: str) -> list[int]:
    """Sizes of an array in memory: a layout is its dimensions, minor first, and its tile."""
    found = _TILED.match(layout)
    if not found:
        return sizes
    order, tile = ([int(n) for n in text.split(",")] for text in found.groups())
    padded = list(sizes)
    for dim, unit in zip(order, reversed(tile), strict=False):
        padded[dim] = -(-padded[dim] // unit) * unit
    return padded


def runs(found: Computations, name: str, times: int, notes: set[str]) -> Iterator[tuple[str, int]]:
    """(name, how often it runs) of a computation and of all that it calls, fusions aside."""
    yield name, times
    for line in found[name].values():
        inner = times
        if line.operation == "while":
            known = trips(found, found[name], line)
            inner *= 1 if known is None else known
            if known is None:
                notes.add("a loop of unknown length counts once")
        if line.operation == "conditional":
            notes.add("every branch of a conditional counts")
        for called in line.called:
            yield from runs(found, called, inner, notes)


def trips(found: Computations, lines: Lines, loop: Line) -> int | None:
    """How often a `while` of `lines` runs its body; None where the text does not tell.

    As the program says, or (limit - start) / step where the condition is `counter < limit`, with
    the counter one of the values that the loop carries. A start or a step that does not stand in
    the text is taken for 0 and 1.
    """
    if said := _TRIPS.search(loop.rest):
        return int(said[1])
    condition = found.get(loop.condition, {})
    compared = [one for line in condition.values() for one in _compares(found, condition, line)]
    if len(compared) != 1 or "direction=LT" not in compared[0][0].rest:
        return None
    counter, limit = (_copied(condition, line) for line in compared[0][1])
    index = _INDEX.search(counter.rest)
    if limit.constant is None or counter.operation != "get-tuple-element" or not index:
        return None
    before = next((lines[name] for name in loop.operands if name in lines), None)
    start = _value(lines, before, int(index[1]))
    begin = start.constant if start else None
    return max(0, math.ceil((limit.constant - (begin or 0)) / _step(found, loop, int(index[1]))))


def _compares(found: Computations, lines: Lines, line: Line) -> Iterator[tuple[Line, list[Line]]]:
    """A comparison, bare or within a fusion, and the lines that it compares."""
    if line.operation == "compare":
        yield line, [lines[name] for name in line.operands]
    for inside in (found[name] for name in line.fused):
        for one in inside.values():
            for compare, operands in _compares(found, inside, one):
                given = (None if x.number is None else line.operands[x.number] for x in operands)
                pairs = zip(given, operands, strict=True)
                yield compare, [x if name is None else lines[name] for name, x in pairs]


def _step(found: Computations, loop: Line, index: int) -> int:
    """What the body of a loop adds to the value of this index that it carries."""
    body = next((found[name] for name in loop.called if name in found), {})
    root = next((line for line in body.values() if line.is_root), None)
    added = _value(body, root, index)
    if added and added.operation == "add":
        terms = [body[name].constant for name in added.operands if name in body]
        return next((term for term in terms if term), 1)
    return 1


def _value(lines: Lines, values: Line | None, index: int) -> Line | None:
    """The line behind one value of a tuple, if it stands in the text."""
    if values is None or values.operation != "tuple" or values.operands[index] not in lines:
        return None
    return _copied(lines, lines[values.operands[index]])


def _copied(lines: Lines, line: Line) -> Line:
    """What a copy is of, the line itself if it is none."""
    while line.operation in ("copy", "bitcast") and line.operands[0] in lines:
        line = lines[line.operands[0]]
    return line


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
