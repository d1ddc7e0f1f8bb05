"""HBM bytes of a compiled program, its loops counted by their trips, and the time they bound.

XLA's own analysis counts a loop's body once. This reads the optimised program's text instead:
every instruction moves its operands and its result unless they lie in on-chip memory, a fusion that
only slices an operand moves the slice, one that updates an array in place moves the update, and a
`while` moves what its body moves as often as it runs. Bytes are of the tiles that hold an array: 64
lanes of a tile's 128 count as 128.
"""

import functools
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all iota partition-id replica-id"
    " copy-done async-done slice-done send-done recv-done opt-barrier custom-call-done".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand the update is


class Array(NamedTuple):
    """One array of an instruction's result."""

    size: int  # bytes, of whole tiles
    content: int  # bytes without padding
    on_chip: bool


class Instruction(NamedTuple):
    """One line of the program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an HLO module's text by name, and the entry's name."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[1]] = {}
            if line.startswith("ENTRY"):
                entry = header[1]
        elif current is not None and (found := _LINE.match(line)):
            root, name, shape, opcode, rest = found.groups()
            operands = tuple(_NAME.findall(_until_closed(rest)))
            current[name] = Instruction(name, opcode, _arrays(shape), operands, rest, bool(root))
    return computations, entry


def _until_closed(text: str) -> str:
    """The text up to the parenthesis that closes an operand list."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:at]
    return text


def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for kind, dims, layout in _ARRAY.findall(shape):
        bits = BITS.get(kind) or int(re.sub(r"\D", "", kind.split("e")[0]) or 0)
        sizes = [int(d) for d in dims.split(",") if d]
        size, content = (math.prod(x) * bits // 8 for x in (_padded(sizes, layout), sizes))
        found.append(Array(size, content, re.search(r"S\([1-9]\)", layout) is not None))
    return tuple(found)


def _padded(sizes: list[int], layout: str) -> list[int]:
    """Sizes of an array in memory: a layout is its dimensions, minor first, and its tile."""
    found = re.match(r"([\d,]+):T\(([\d,]+)\)", layout)
    if not found:
        return sizes
    order, tile = ([int(n) for n in text.split(",")] for text in found.groups())
    padded = list(sizes)
    for dim, unit in zip(order, reversed(tile), strict=False):
        padded[dim] = -(-padded[dim] // unit) * unit
    return padded


def hbm_bytes(text: str) -> int:
    """Bytes between memory and the chip in one run of an optimised HLO module, on one device."""
    computations, entry = parse(text)

    @functools.cache
    def total(name: str) -> int:
        computation = computations[name]
        return sum(moved(computation, one) for one in computation.values())

    def moved(computation, one) -> int:
        if one.opcode == "while":
            condition, body = (_called(one, kind) for kind in ("condition", "body"))
            return trips(computations, condition, body) * (total(body) + total(condition))
        if one.opcode in ("call", "async-start") and (inner := _called(one, "to_apply|calls")):
            return total(inner)
        if one.opcode == "conditional":
            return max(total(n) for n in _NAME.findall(one.text) if n in computations)
        if one.opcode == "fusion":
            return _fusion(computations, computation, one)
        return _plain(computation, one)

    return total(entry)


def _called(one: Instruction, kind: str) -> str:
    found = re.search(rf"(?:{kind})=%?([\w.\-]+)", one.text)
    return found[1] if found else ""


def trips(computations: dict[str, Computation], condition: str, body: str) -> int:
    """Runs of a counted loop: its condition's limit over its counter's step; 1 if not counted."""
    limit = max((_constant(one) or 1 for one in computations[condition].values()), default=1)
    inside = computations[body]
    counter = next((name for name, one in inside.items() if "index=0" in one.text), "")
    steps = (
        _constant(inside[name])
        for one in inside.values()
        if one.opcode == "add" and counter in one.operands
        for name in one.operands
        if name in inside
    )
    return math.ceil(limit / next((step for step in steps if step), 1))


def _constant(one: Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", one.text) if one.opcode == "constant" else None
    return int(found[1]) if found else None


def _plain(computation: Computation, one: Instruction) -> int:
    if one.opcode in _FREE or "AllocateBuffer" in one.text:
        return 0
    if one.opcode == "custom-call" and (cost := re.search(r'"bytes_accessed":"(\d+)"', one.text)):
        return round(int(cost[1]) * _padding(computation, one))
    results = sum(a.size for a in one.arrays if not a.on_chip)
    if one.opcode.endswith("-start"):
        return results  # a pair of source and destination
    sources = [computation[n] for n in one.operands if n in computation]
    if one.opcode in _SLICES:
        return results + _share(sources[0], sum(a.size for a in one.arrays))
    if one.opcode in _UPDATES:
        update = computation[one.operands[_UPDATES[one.opcode]]]
        size = sum(a.size for a in update.arrays)
        old = size if one.opcode == "scatter" else 0  # what is added to is read
        return sum(_share(s) for s in sources[1:]) + _share(sources[0], old) + _share(one, size)
    return results + sum(_share(source) for source in sources)


def _padding(computation: Computation, one: Instruction) -> float:
    """By what tiles make a kernel's arrays larger; a kernel states bytes without padding."""
    sources = (computation[n] for n in one.operands if n in computation)
    arrays = [*one.arrays, *(a for source in sources for a in source.arrays)]
    return sum(a.size for a in arrays) / max(1, sum(a.content for a in arrays))


def _share(source: Instruction, size: int | None = None) -> int:
    """Bytes of an array, or `size` of them, that come from HBM."""
    if size is None:
        return sum(a.size for a in source.arrays if not a.on_chip)
    return 0 if any(a.on_chip for a in source.arrays) else size


def _fusion(computations: dict[str, Computation], caller: Computation, one: Instruction) -> int:
    inside = computations[_called(one, "calls")]
    count = _written(one, inside)
    for number, name in enumerate(one.operands):
        if name in caller:
            count += _share(caller[name], _read(computations, inside, number))
    return count


def _read(computations: dict[str, Computation], inside: Computation, number: int) -> int:
    """Bytes that a fused computation reads of its operand: all, or what it slices out of it."""
    parameter = next(
        i
        for i in inside.values()
        if i.opcode == "parameter" and int(i.text.split(")")[0]) == number
    )
    whole = sum(a.size for a in parameter.arrays)
    names, count = [parameter.name], 0
    while names:
        name = names.pop()
        for user in inside.values():
            if name not in user.operands:
                continue
            position = user.operands.index(name)
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "fusion":
                count += _read(computations, computations[_called(user, "calls")], position)
            elif user.opcode in _SLICES and position == 0:
                count += sum(a.size for a in user.arrays)
            elif user.opcode == "scatter" and position == 0:
                count += sum(a.size for a in inside[user.operands[_UPDATES["scatter"]]].arrays)
            elif user.opcode != "dynamic-update-slice" or position:
                count += whole
    return min(whole, count)


def _written(one: Instruction, inside: Computation) -> int:
    """A fusion's results; where one is an update in place, the update."""
    root = next(i for i in inside.values() if i.is_root)
    outputs = [inside[n] for n in root.operands] if root.opcode == "tuple" else [root]
    count = 0
    for array, output in zip(one.arrays, outputs, strict=False):
        while output.opcode in ("bitcast", "copy") and output.operands[0] in inside:
            output = inside[output.operands[0]]
        size = array.size
        if output.opcode in _UPDATES:
            update = inside[output.operands[_UPDATES[output.opcode]]]
            size = sum(a.size for a in update.arrays)
        count += 0 if array.on_chip else size
    return count
