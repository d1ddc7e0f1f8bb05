"""Bytes that the operations of a compiled program read and write, by two accounts.

    touched(line)      operands and results of one line, wherever they lie: any backend
    hbm_bytes(text)    what passes between a TPU's memory and its chip in one run of a program

Both take a fusion from outside, of an array that is only sliced the slices, and of one that is
updated in place the update. The second leaves out what lies on the chip, counts tiles with their
padding, and believes a kernel's own cost estimate.
"""

import functools
import re

from programs import hlo
from programs.hlo import Computations, Line, Lines

_UNTOUCHED = frozenset(  # names for data, and callers, whose bodies have lines of their own
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all".split()
)
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all iota partition-id replica-id"
    " copy-done async-done slice-done send-done recv-done opt-barrier custom-call-done".split()
)
_SLICES = frozenset("slice dynamic-slice gather".split())
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand the update is
_ESTIMATE = re.compile(r'"bytes_accessed":"(\d+)"')
_STARTED = re.compile(r"(?:to_apply|calls)=%?([\w.\-]+)")


def touched(found: Computations, lines: Lines, line: Line) -> int:
    """Bytes that one run of a line of `lines` reads and writes: its operands and its result.

    A loop over stacked weights reads one layer's at a time. What a fusion keeps to itself counts
    nothing.
    """
    if line.operation in _UNTOUCHED or line.operation.endswith("-done"):
        return 0
    given = sum(lines[operand].bytes for operand in line.operands if operand in lines)
    if line.operation.endswith("-start") and line.bytes > given:  # names its operand and its result
        return 2 * (line.bytes - given)
    if line.operation != "fusion" or not line.fused:
        return _result(line, lines) + sum(
            _operand(line, lines, operand) for operand in dict.fromkeys(line.operands)
        )
    inside = found[line.fused[0]]
    parameters = (name for name, one in inside.items() if one.operation == "parameter")
    *_, root = inside.values()
    return _result(root, inside) + sum(_parameter(inside, name) for name in parameters)


def _operand(line: Line, lines: Lines, operand: str) -> int:
    """Bytes of `operand` that `line` reads."""
    whole = lines[operand].bytes if operand in lines else 0
    if line.operands.index(operand) > 0:
        return whole
    if line.operation in _SLICES:
        return min(whole, line.bytes)
    return 0 if line.operation == "dynamic-update-slice" else whole


def _parameter(lines: Lines, name: str) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    total = 0
    for user, line in lines.items():
        if name in line.operands:
            bare = line.operation == "bitcast"
            total += _parameter(lines, user) if bare else _operand(line, lines, name)
    return min(total, lines[name].bytes)


def _result(line: Line, lines: Lines) -> int:
    """Bytes that the root of a fusion, or a line by itself, writes."""
    if line.operation == "dynamic-update-slice":
        return lines[line.operands[1]].bytes
    if line.operation in ("bitcast", "tuple"):
        return sum(_result(lines[operand], lines) for operand in line.operands)
    return 0 if line.operation == "parameter" else line.bytes


def hbm_bytes(text: str) -> int:
    """Bytes between memory and the chip in one run of an optimised TPU program, on one device."""
    found, entry = hlo.computations(text)

    @functools.cache
    def total(name: str) -> int:
        return sum(moved(found[name], line) for line in found[name].values())

    def moved(lines: Lines, line: Line) -> int:
        if line.operation == "while":
            known = hlo.trips(found, lines, line)
            inner = total(line.called[0]) + total(line.condition)
            return (1 if known is None else known) * inner
        if line.operation in ("call", "async-start") and (inner := _STARTED.search(line.rest)):
            return total(inner[1])
        if line.operation == "conditional":
            return max(total(branch) for branch in line.called)
        if line.operation == "fusion":
            return _fusion(found, lines, line)
        return _plain(lines, line)

    return total(entry)


def _plain(lines: Lines, line: Line) -> int:
    if line.operation in _FREE or "AllocateBuffer" in line.rest:
        return 0
    if line.operation == "custom-call" and (said := _ESTIMATE.search(line.rest)):
        return round(int(said[1]) * _padding(lines, line))
    written = _from_hbm(line)
    if line.operation.endswith("-start"):
        return written  # a pair of source and destination
    operands = [lines[name] for name in line.operands if name in lines]
    if line.operation in _SLICES:
        return written + _from_hbm(operands[0], line.size)
    if line.operation in _UPDATES:
        update = lines[line.operands[_UPDATES[line.operation]]].size
        old = update if line.operation == "scatter" else 0  # what is added to is read
        read = sum(map(_from_hbm, operands[1:])) + _from_hbm(operands[0], old)
        return read + _from_hbm(line, update)
    return written + sum(map(_from_hbm, operands))


def _padding(lines: Lines, line: Line) -> float:
    """By what tiles make a kernel's arrays larger; a kernel states bytes without padding."""
    all_of = [line, *(lines[name] for name in line.operands if name in lines)]
    return sum(one.size for one in all_of) / max(1, sum(one.bytes for one in all_of))


def _from_hbm(line: Line, size: int | None = None) -> int:
    """Bytes of a result, or `size` of them, that lie in memory."""
    if size is None:
        return sum(array.size for array in line.arrays if not array.on_chip)
    return 0 if any(array.on_chip for array in line.arrays) else size


def _fusion(found: Computations, lines: Lines, line: Line) -> int:
    inside = found[line.fused[0]]
    count = _stored(line, inside)
    for number, name in enumerate(line.operands):
        if name in lines:
            count += _from_hbm(lines[name], _loaded(found, inside, number))
    return count


def _loaded(found: Computations, inside: Lines, number: int) -> int:
    """Bytes that a fusion reads of its operand: all, or what it slices out of it."""
    start, parameter = next((name, line) for name, line in inside.items() if line.number == number)
    names, count = [start], 0
    while names:
        name = names.pop()
        for user, line in inside.items():
            if name not in line.operands:
                continue
            position = line.operands.index(name)
            if line.operation == "bitcast":
                names.append(user)
            elif line.operation == "fusion":
                count += _loaded(found, found[line.fused[0]], position)
            elif line.operation in _SLICES and position == 0:
                count += line.size
            elif line.operation == "scatter" and position == 0:
                count += inside[line.operands[_UPDATES["scatter"]]].size
            elif line.operation != "dynamic-update-slice" or position:
                count += parameter.size
    return min(parameter.size, count)


def _stored(line: Line, inside: Lines) -> int:
    """A fusion's results; where one is an update in place, the update."""
    root = next(one for one in inside.values() if one.is_root)
    outputs = [inside[name] for name in root.operands] if root.operation == "tuple" else [root]
    count = 0
    for array, output in zip(line.arrays, outputs, strict=False):
        while output.operation in ("bitcast", "copy") and output.operands[0] in inside:
            output = inside[output.operands[0]]
        size = array.size
        if output.operation in _UPDATES:
            size = inside[output.operands[_UPDATES[output.operation]]].size
        count += 0 if array.on_chip else size
    return count
