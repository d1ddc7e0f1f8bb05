"""The cache of attention: a ring of the last tokens of a row, and positions that it is read by.

A cache is a dict of arrays (B, slots, ...) under the caller's names, such as "k" and "v", with
"position", 1 + the position of each slot's token (0: empty), and "length", the tokens read so far.
Positions count the real tokens of a row from 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from kernels import segments as boundaries

Cache = dict[str, Array]


def empty(batch: int, slots: int, dtype: DTypeLike, **shapes: tuple[int, ...]) -> Cache:
    """A ring of `slots` slots that holds an array of each shape a token."""
    held = {name: jnp.zeros((batch, slots, *shape), dtype) for name, shape in shapes.items()}
    position = jnp.zeros((batch, slots), jnp.int32)
    return held | {"position": position, "length": jnp.zeros(batch, jnp.int32)}


def positions(
    length_B: Int[Array, " B"], segments: Int[Array, "B T"] | None, count: int
) -> Int[Array, "B T"]:
    """Tokens of the row before each new one; padding, which is as if it were not there, repeats."""
    if segments is None:
        return length_B[:, None] + jnp.arange(count, dtype=jnp.int32)
    return length_B[:, None] + jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1


def document_positions(
    before_B: Int[Array, " B"], segments: Int[Array, "B T"] | None, count: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Tokens of its own document before each token, and the tokens of the row's last document.

    `before_B` is how many tokens of the first document came before the row: state 0 is a fresh one.
    """
    if segments is None:
        return positions(before_B, None, count), before_B + count
    row = positions(before_B, segments, count)
    first = jnp.where(boundaries.starts(segments), row, 0)
    position = row - jax.lax.cummax(first, axis=1)
    return position, jnp.where((segments != 0).any(1), position[:, -1] + 1, before_B)


def admit(
    wants_BTE: Int[Array, "B T E"],
    limit_BT: Int[Array, "B T"],
    before_BE: Int[Array, "B E"],
    segments: Int[Array, "B T"] | None,
) -> tuple[Bool[Array, "B T E"], Int[Array, "B E"]]:
    """c_t = min(c_{t-1} + wants_t, limit_t): which of `wants` (0 or 1) are let in, and the last c.

    c counts along a document, from `before` in the row's first one; `limit` never falls within a
    document. In parallel: c is all that wanted, less the most by which that ever was too much.
    """
    total_BTE = jnp.cumsum(wants_BTE, axis=1, dtype=jnp.int32) + before_BE[:, None]
    earlier_BTE = jnp.zeros_like(total_BTE)
    if segments is not None:  # what wanted before the document, so that sums never fall
        start_BT1 = boundaries.starts(segments)[..., None]
        earlier_BTE = jax.lax.cummax(jnp.where(start_BT1, total_BTE - wants_BTE, 0), axis=1)
    over_BTE = jnp.maximum(total_BTE - earlier_BTE - limit_BT[..., None], 0)
    out_BTE = jax.lax.cummax(earlier_BTE + over_BTE, axis=1)
    last_BTE = jnp.pad(out_BTE[:, :-1], ((0, 0), (1, 0), (0, 0)))
    refused_BTE = out_BTE > jnp.maximum(last_BTE, earlier_BTE)
    return (wants_BTE > 0) & ~refused_BTE, (total_BTE - out_BTE)[:, -1]


def write(
    cache: Cache,
    tokens: Cache,
    positions_BT: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
) -> Cache:
    """Put new tokens into the ring; only tokens of the row's last document stay visible."""
    batch, slots = cache["position"].shape
    count, kept = positions_BT.shape[1], cache["position"]
    total_B = positions_BT[:, -1] + 1
    written_BT = positions_BT >= total_B[:, None] - slots
    if segments is not None:
        written_BT &= boundaries.of_last(segments)
        kept = jnp.where(boundaries.goes_on(segments)[:, None], kept, 0)
    slot_BT = jnp.where(written_BT, positions_BT % slots, slots)  # the last index is dropped

    def put(old, new):
        new = new.astype(old.dtype)
        if batch == count == 1 and segments is None:  # decoding one row: no scatter
            at = (0, slot_BT[0, 0], *(0,) * (old.ndim - 2))
            return jax.lax.dynamic_update_slice(old, new, at)
        return old.at[jnp.arange(batch)[:, None], slot_BT].set(new, mode="drop")

    held = {name: put(cache[name], new) for name, new in tokens.items()}
    return held | {"position": put(kept, positions_BT + 1), "length": total_B}


def attend(
    tokens: Cache,
    old: Cache,
    positions_BT: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    *,
    training: bool,
    alone: Callable[[], Array],
    beside: Callable[..., Array],
) -> tuple[Array, Cache]:
    """What attention reads at `positions_BT`, and the cache after the new `tokens`.

    `alone()` reads the new tokens only: while training, and where no row has a past. Otherwise
    `beside(seen, positions=, kv_positions=, segments=, kv_segments=)`, whose names are those of
    `kernels.attention.cached_attention`, reads `seen`: for a single token the slots of the new
    cache, for several the slots of the old one and the new tokens after them.
    """
    new = write(old, tokens, positions_BT, segments)
    where = {"positions": positions_BT}
    if training:
        return alone(), new
    if positions_BT.shape[1] == 1:
        seen = {name: new[name] for name in tokens}
        where |= {"kv_positions": new["position"] - 1, "segments": None, "kv_segments": None}
        return beside(seen, **where), new

    def both():
        numbers = kv_numbers = None
        if segments is not None:
            numbers = boundaries.numbered(segments)  # the cache is of the first document
            kv_numbers = jnp.concatenate([jnp.ones_like(old["position"]), numbers], axis=1)
        seen = {
            name: jnp.concatenate([old[name].astype(given.dtype), given], axis=1)
            for name, given in tokens.items()
        }
        kv_positions = jnp.concatenate([old["position"] - 1, positions_BT], axis=1)
        return beside(
            seen,
            positions=positions_BT,
            kv_positions=kv_positions,
            segments=numbers,
            kv_segments=kv_numbers,
        )

    # A fresh cache costs nothing; a continued one is read beside the new tokens.
    return jax.lax.cond(jnp.all(old["length"] == 0), alone, both), new
