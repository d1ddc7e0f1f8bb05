"""The order in which attention's TPU kernels visit the pairs of blocks that hold a visible score.

Everything here is known when a kernel is built: plain NumPy.
"""

from typing import NamedTuple

import numpy as np

from kernels.attention import xla

BLOCK, LEAST = 512, 128  # tokens; rows shorter than LEAST, and narrow windows, have fewer
FIRST, LAST, CUT, OPENS, CLOSES = 1, 2, 4, 8, 16  # marks of a pair, see `Walk`


class Rule(NamedTuple):
    """Who sees whom, and how a product becomes a score; static."""

    length: int
    causal: bool
    window: int
    scale: float
    softcap: float


def block_length(length: int, window: int) -> int:
    """Tokens of a block: a power of two that about halves a short row; no more than a window."""
    half = 1 << ((length + 1) // 2 - 1).bit_length()
    inside = max(LEAST, 1 << (window - 1).bit_length()) if window else BLOCK
    return min(BLOCK, max(8, half), inside)


class Walk(NamedTuple):
    """A kernel's way through the pairs: its scalar-prefetched lists, and what follows from them.

    The marks of a pair: FIRST and LAST of its run (of the block that the kernel stays at), CUT by a
    mask; in the backward pass the pair OPENS or CLOSES its block of queries.
    """

    queries: np.ndarray  # block of each pair
    keys: np.ndarray
    marks: np.ndarray
    opened: np.ndarray | None = None  # block that this pair, or the last that did so, opens
    closed: np.ndarray | None = None  # block that this pair, or the next that does so, closes
    ring: int = 1  # blocks of queries that are open at once, at most

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        """What the kernel's index maps and body read."""
        return tuple(np.asarray(x, np.int32) for x in self[:5] if x is not None)


def visible_pairs(rule: Rule, block: int) -> np.ndarray:
    """(n, 3): block of queries, block of keys, 1 if a mask cuts through the pair."""
    plan = xla.Plan(rule.length, block, block, rule.causal, rule.window, 1.0, 0.0)
    full, cut = (np.insert(x, 2, n, axis=1) for n, x in enumerate(xla.block_pairs(plan)))
    return np.concatenate([full, cut])


def forward_walk(rule: Rule, block: int) -> Walk:
    """Each block of queries with all its blocks of keys."""
    pairs = visible_pairs(rule, block)
    i, j, cut = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
    return Walk(i, j, _ends(i) | CUT * cut)


def backward_walk(rule: Rule, block: int, first: int, count: int) -> Walk:
    """Each block of keys with those of `count` blocks of queries from `first` on that see it."""
    pairs = visible_pairs(rule, block)
    pairs = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + count)]
    i, j, cut = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].T
    blocks, opens = np.unique(i, return_index=True)
    closes = len(i) - 1 - np.unique(i[::-1], return_index=True)[1]
    marks = _ends(j) | CUT * cut
    marks[opens] |= OPENS
    marks[closes] |= CLOSES
    at = np.arange(len(i))
    forth, back = np.argsort(opens), np.argsort(closes)
    opened = blocks[forth][np.searchsorted(opens[forth], at, side="right") - 1]
    closed = blocks[back][np.searchsorted(closes[back], at)]
    is_open = (opens <= at[:, None]) & (at[:, None] <= closes)
    highest = np.where(is_open, blocks, -1).max(axis=1)
    lowest = np.where(is_open, blocks, first + count).min(axis=1)
    return Walk(i, j, marks, opened, closed, int((highest - lowest).max()) + 1)


def _ends(x: np.ndarray) -> np.ndarray:
    """FIRST and LAST of each run of equal numbers."""
    change = np.diff(x) != 0
    return FIRST * np.append(True, change) | LAST * np.append(change, True)
