"""Documents laid into rows of T tokens, three ways; every row is addressed by its number.

A split's flat stream is [SEP, b1, ..., bn, SEP, ...]: position p predicts position p + 1, so a
document's inputs are [SEP, b1, ..., bn] and its targets [b1, ..., bn, SEP]. Each of the N - 1
predictions of a stream appears exactly once in an epoch of any layout.
"""

import difflib
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data import splitmix

LAYOUTS = ("windows", "packed", "stream")
# Numbers in the stream layout stay below this, and so in int32, for any number of epochs.
_NUMBERS = 1 << 30
_SCAN_BLOCK = 1 << 24

Batch = dict[str, np.ndarray]


class Layout(NamedTuple):
    """`take(rows, epochs)` gives the batch of those rows of an epoch; row -1 is padding.

    Every batch holds `inputs`, `targets`, `segments` (B, T) int32 and `weights` (B, T) float32:
    segments 0 and weights 0 at padding, documents numbered from 1 and weights 1 elsewhere.
    """

    rows: int
    take: Callable[[np.ndarray, np.ndarray], Batch]


def lay_out(name: str, flat: np.ndarray, length: int, batch: int, separator: int) -> Layout:
    """The layout `name` of a flat stream in rows of `length`; `batch` matters to "stream" only."""
    if name == "windows":
        return windows(flat, length, separator)
    if name == "packed":
        return packed(flat, length, separator)
    if name == "stream":
        return stream(flat, length, batch, separator)
    nearest = difflib.get_close_matches(name, LAYOUTS, 1, 0)[0]
    raise ValueError(
        f"unknown layout {name!r}: it must be one of {', '.join(LAYOUTS)}; nearest: {nearest}"
    )


def windows(flat: np.ndarray, length: int, separator: int) -> Layout:
    """Row r holds the predictions [rT, rT + T); it may start inside a document.

    The documents of a row are numbered 1, 2, ... Only the last row may end in padding.
    """
    total = len(flat) - 1

    def take(rows: np.ndarray, _) -> Batch:
        starts = rows * length
        counts = np.where(rows < 0, 0, np.clip(total - starts, 0, length))
        inputs, targets, real = _cut(flat, starts, counts, length)
        marks = inputs == separator
        numbers = np.cumsum(marks, axis=1, dtype=np.int32) + ~marks[:, :1]
        return _batch(inputs, targets, numbers, real)

    return Layout(-(-total // length), take)


def stream(flat: np.ndarray, length: int, batch: int, separator: int) -> Layout:
    """Row b of batch i + 1 continues row b of batch i: B contiguous streams of the split.

    Stream b holds the predictions [bL, bL + L), L = ceil((N - 1) / B); the last batch of an epoch
    ends in padding. A document keeps its number from batch to batch, the next one has another
    number, and so has the first of the next epoch.
    """
    total = len(flat) - 1
    span = -(-total // batch)
    marks = separators(flat, separator)
    documents = len(marks) - 1

    def take(rows: np.ndarray, epochs: np.ndarray) -> Batch:
        step, row = np.divmod(rows, batch)
        starts = row * span + step * length
        ends = np.minimum((row + 1) * span, total)
        counts = np.where(rows < 0, 0, np.clip(ends - starts, 0, length))
        inputs, targets, real = _cut(flat, starts, counts, length)
        before = np.searchsorted(marks, starts, side="left") + epochs * documents
        numbers = np.cumsum(inputs == separator, axis=1, dtype=np.int64) + before[:, None]
        return _batch(inputs, targets, 1 + (numbers - 1) % _NUMBERS, real)

    return Layout(-(-span // length) * batch, take)


def _cut(
    flat: np.ndarray,
    starts: Int[np.ndarray, "B"],
    counts: Int[np.ndarray, "B"],
    length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`counts[b]` predictions from `starts[b]` on, left-aligned: inputs, targets, what is real."""
    inputs, targets = (np.zeros((len(starts), length), np.int32) for _ in range(2))
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        inputs[row, :count] = flat[start : start + count]
        targets[row, :count] = flat[start + 1 : start + count + 1]
    return inputs, targets, np.arange(length) < counts[:, None]


def _batch(inputs: np.ndarray, targets: np.ndarray, numbers: np.ndarray, real: np.ndarray) -> Batch:
    return {
        "inputs": inputs,
        "targets": targets,
        "segments": np.where(real, numbers, 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }


def packed(flat: np.ndarray, length: int, separator: int) -> Layout:
    """Whole documents, best-fit-decreasing; longer ones in pieces of at most T, each a segment.

    Rows come in the order of their first token in the stream, pieces in a row likewise.
    """
    starts, sizes, numbers, bounds = plan(flat, length, separator)

    def take(rows: np.ndarray, _) -> Batch:
        pieces = _ranges(bounds[rows], bounds[rows + 1] - bounds[rows])
        where = _ranges(starts[pieces], sizes[pieces]).reshape(len(rows), length)
        segments = np.repeat(numbers[pieces], sizes[pieces]).reshape(len(rows), length)
        real = segments > 0
        where *= real
        inputs, targets = (np.where(real, flat[where + i], 0).astype(np.int32) for i in range(2))
        return _batch(inputs, targets, segments, real)

    # The plan's last row is all padding, and bounds end with it: row -1 needs no case of its own.
    last = len(bounds) - 2
    return Layout(last, lambda rows, epochs: take(np.where(rows < 0, last, rows), epochs))


def plan(
    flat: np.ndarray, length: int, separator: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces in row order: start in the stream, size, segment number; and each row's bounds.

    Padding is a piece too (number 0), so the sizes of every row sum to `length`.
    """
    starts, sizes = _pieces(separators(flat, separator), length)
    rows = best_fit(sizes, length)
    count = int(rows.max(initial=-1)) + 1
    first = np.full(count, len(flat))
    np.minimum.at(first, rows, starts)
    rank = np.empty(count, np.int64)
    rank[np.argsort(first)] = np.arange(count)
    spare = length - np.bincount(rank[rows], sizes, count + 1).astype(np.int64)
    short = np.flatnonzero(spare)
    rows = np.concatenate([rank[rows], short])
    starts = np.concatenate([starts, np.full(len(short), len(flat))])
    sizes = np.concatenate([sizes, spare[short]])
    order = np.lexsort((starts, rows))
    rows, starts, sizes = rows[order], starts[order], sizes[order]
    bounds = np.searchsorted(rows, np.arange(count + 2))
    numbers = np.arange(len(rows)) - bounds[rows] + 1
    numbers[starts == len(flat)] = 0
    return starts, sizes, numbers, bounds


def _pieces(marks: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of the pieces of at most `length` inputs, in stream order."""
    whole = np.diff(marks)
    counts = -(-whole // length)
    within = _ranges(np.zeros_like(counts), counts) * length
    return np.repeat(marks[:-1], counts) + within, np.minimum(
        np.repeat(whole, counts) - within, length
    )


def best_fit(sizes: Int[np.ndarray, "N"], capacity: int) -> Int[np.ndarray, "N"]:
    """The row of each piece: largest first, each into the fullest row that still takes it."""
    rows = np.empty(len(sizes), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a row with r free tokens is open
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= 0 if open_rows[room] else 1 << room
        else:
            room, row, count = capacity, count, count + 1
        rows[piece] = row
        if room > size:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    return rows


def separators(flat: np.ndarray, separator: int) -> Int[np.ndarray, "M"]:
    """Positions of the separators, found block by block to bound memory."""
    found = [
        np.flatnonzero(flat[start : start + _SCAN_BLOCK] == separator) + start
        for start in range(0, len(flat), _SCAN_BLOCK)
    ]
    return np.concatenate(found)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """concatenate([arange(s, s + n) for s, n in zip(starts, counts)]), without the loop."""
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


def shuffled(layout: Layout, seed: int) -> Layout:
    """The layout with the rows of each epoch in an order of their own."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return permutation(layout.rows, seed, epoch)

    def take(rows: np.ndarray, epochs: np.ndarray) -> Batch:
        moved = rows.copy()
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            moved[here] = order(epoch)[rows[here]]
        return layout.take(moved, epochs)

    return Layout(layout.rows, take)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """0..size-1 in the order of SplitMix64(key(seed, epoch) + i), int64."""
    draws = splitmix.mixed(splitmix.key(f"{seed}/{epoch}") + splitmix.steps(size))
    return np.argsort(draws, kind="stable")
