"""The order in which a kernel visits pairs of blocks: by query block, and by key block.

A pass takes one step after another along each row and key head. Every step belongs to one owner, a
block of the kind whose results it adds to, and visits up to `each` members, blocks of the other
kind. The steps of an owner follow each other and every owner has at least one, so that results are
written once and none is forgotten. Lists in NumPy give NumPy, with as many steps as they need;
lists that the program computes give as many as they could need.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

LISTS = Int[Array | np.ndarray, "C L N M"]
WORD = 32
STEP = 2  # what a step costs beside its blocks, in blocks


class Schedule(NamedTuple):
    """The steps of one pass for every list: axes 0 and 1 are the lists', or 1 where all agree."""

    owner: Array | np.ndarray  # (1 or C, 1 or L, steps)
    member: Array | np.ndarray  # (C, L, steps x each), -1 for none

    @property
    def steps(self) -> int:
        return self.owner.shape[2]

    @property
    def each(self) -> int:
        return self.member.shape[2] // self.owner.shape[2]


def by_query(chosen: LISTS, counts: np.ndarray, most: int, none: int) -> Schedule:
    """Owners are query blocks; `counts` (N,) bounds their lists, which hold `none` at the end."""
    each = _each(lambda n: int(np.maximum(1, -(-counts // n)).sum()), most)
    steps = np.maximum(1, -(-counts // each))
    owner = np.repeat(np.arange(len(counts), dtype=np.int32), steps)
    first = np.cumsum(steps) - steps
    entry = ((np.arange(len(owner)) - first[owner]) * each)[:, None] + np.arange(each)
    width = chosen.shape[3]
    place = (owner[:, None] * width + np.minimum(entry, width - 1)).reshape(-1).astype(np.int32)
    xp = _library(chosen)
    member = xp.take(chosen.reshape(*chosen.shape[:2], -1), place, axis=2)
    member = xp.where((entry < width).reshape(-1) & (member != none), member, -1)
    return Schedule(owner[None, None], member.astype(xp.int32))


def by_key(chosen: LISTS, counts: np.ndarray, reached: np.ndarray, most: int) -> Schedule:
    """Owners are key blocks, `reached` (J,) bounds how many lists name each; members are lists."""
    blocks, lists = len(reached), chosen.shape[2]
    named = _named(chosen, blocks)
    if isinstance(named, np.ndarray):
        reached = named.sum(-1).max((0, 1))
        order = np.where(named, np.arange(lists, dtype=np.int32), np.int32(lists))
        return by_query(np.sort(order, axis=-1), reached, most, lists)
    before = jnp.cumsum(named, axis=-1, dtype=jnp.int32)
    bound = lambda n: int(counts.sum()) // n + blocks
    each = _each(bound, most)
    if np.maximum(1, -(-reached // each)).sum() <= 1.25 * bound(each):
        entry = np.arange(int(reached.max()), dtype=np.int32)
        return by_query(_list_at(before, entry), reached, most, lists)
    run = functools.partial(_keys_in_turn, steps=bound(each), each=each)
    owner, member = jax.vmap(jax.vmap(run))(before)
    return Schedule(owner, jnp.where(member < lists, member, -1))


def _each(steps: Callable[[int], int], most: int) -> int:
    """The number of blocks a step that makes a pass shortest; a step costs as much as STEP more."""
    return min(range(most, 0, -1), key=lambda n: steps(n) * (n + STEP))


def _named(chosen: LISTS, blocks: int) -> Bool[Array | np.ndarray, "C L J N"]:
    """Whether list n names block j."""
    if isinstance(chosen, np.ndarray):
        found = np.zeros((*chosen.shape[:3], blocks + 1), bool)
        np.put_along_axis(found, chosen, True, axis=3)
        return np.swapaxes(found[..., :blocks], 2, 3)
    row = np.arange(blocks, dtype=np.int32)[:, None, None]
    return jnp.any(chosen[:, :, None] == row, axis=-1)


def _list_at(before: Array, entry) -> Array:
    """The lists that name a block in order, the entry-th ones; their number after the last.

    `before` (..., J, N) counts the lists up to n that name j. Compared and summed: a sort of long
    rows takes a TPU's compiler many seconds.
    """
    return jnp.sum(before[..., None, :] <= entry[:, None], axis=-1, dtype=jnp.int32)


def _keys_in_turn(before: Int[Array, "J N"], *, steps: int, each: int) -> tuple[Array, Array]:
    """(owner (S,), member (S x each,)): a block has the steps that the lists naming it need."""
    needed = jnp.maximum(1, -(-before[:, -1] // each))
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    step = np.arange(steps, dtype=np.int32)
    owner = jnp.sum(ends <= step[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, len(before) - 1)
    first = (step - (ends - needed)[owner]) * each
    entry = first[:, None] + np.arange(each, dtype=np.int32)
    return owner, jax.vmap(_list_at)(before[owner], entry).reshape(-1)


def tile(
    chosen: LISTS, heads: int, rows: int, span: int, blocks: int
) -> tuple[Int[Array | np.ndarray, "C L tiles spans"], Array | np.ndarray]:
    """(lists of spans that `rows` query blocks name together, their bits): coarser lists.

    A tile is `rows` consecutive lists of one head (axis 2 holds `heads` heads), a span `span` key
    blocks. Bit i % 32 of word (C, L, tile, span x words + i // 32, row) says whether the row's own
    list names block i of the span. `chosen` holds no entry twice.
    """
    xp = _library(chosen)
    first, second, count, width = chosen.shape
    tiles = math.ceil(count // heads / rows)
    chosen = chosen.reshape(first, second, heads, -1, width)
    missing = ((0, 0),) * 3 + ((0, tiles * rows - count // heads), (0, 0))
    chosen = xp.pad(chosen, missing, constant_values=blocks)
    chosen = chosen.reshape(first, second, heads * tiles, rows, width)
    spans, words = math.ceil(blocks / span), math.ceil(span / WORD)
    within = chosen % span
    word = xp.where(chosen < blocks, chosen // span * words + within // WORD, -1)[..., None]
    bit = xp.left_shift(xp.int32(1), (within % WORD).astype(xp.int32))[..., None]
    at = np.arange(spans * words, dtype=np.int32)
    bits = xp.sum(xp.where(word == at, bit, 0), axis=4, dtype=xp.int32)
    named = (bits != 0).reshape(*bits.shape[:4], spans, words).any((3, 5))
    coarse = xp.sort(xp.where(named, np.arange(spans, dtype=np.int32), spans), axis=-1)
    return coarse, xp.swapaxes(bits, 3, 4)


def _library(x):
    return np if isinstance(x, np.ndarray) else jnp
