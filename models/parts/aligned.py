"""Attention to chosen blocks of keys, where every document counts its blocks from its own start.

A document may begin anywhere in a packed row, so its tokens are first laid out anew: documents one
after another, each from a multiple of `block`. A document of fewer than `block` tokens is one
block, all of which a query sees: such documents stay where they are and take plain attention. The
others fill at most 2 T / block blocks, so the new row has a fixed length.

A state is a document's tokens by position: slots, of which the first `length` are filled; tokens
past the capacity are not kept. "sums" beside them hold one array for every `unit` tokens, the sum
of what these contribute, in wide(dtype): a choice that rests on them does not hang on the dtype of
the activations.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Shaped

from kernels import segments as packed
from models import cache, mixer
from models.parts.chosen_blocks import Row, by_block, lengthen

Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The new row: a slot for each token, `length` where it has none."""

    slot: Int[Array, "B T"]
    origin: Int[Array, "B T"]
    blocks: Int[Array, "B T"]
    length: int

    def spread(self, x: Shaped[Array, "B T ..."], base: Array | None = None) -> Array:
        """Tokens in their slots, after `base` (B, S, ...) or among zeros."""
        if base is None:
            base = jnp.zeros((x.shape[0], 0, *x.shape[2:]), x.dtype)
        row = lengthen(base.astype(x.dtype), self.length)
        return jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(row, self.slot, x)

    def back(self, y: Shaped[Array, "B L ..."]) -> Array:
        """What stands in each token's slot, zero where it has none."""
        take = lambda y, at: jnp.take(y, at, axis=0, mode="fill", fill_value=0)
        return jax.vmap(take)(y, self.slot)


def _layout(segments, before_B, slots: int, block: int, least: int) -> _Layout:
    """Documents of at least `least` tokens, each from a new block.

    With slots > 0 the first document has `before_B` tokens there already, and all `slots` are its.
    """
    count = segments.shape[1]
    document, real = packed.ordinals(segments), packed.is_real(segments)
    position_BT, _ = cache.document_positions(before_B, segments, count)
    tally = lambda document, real: jnp.zeros(count, jnp.int32).at[document].add(real)
    tokens_BD = jax.vmap(tally)(document, real.astype(jnp.int32))
    blocks_BD = jnp.where(tokens_BD >= least, -(-tokens_BD // block), 0)
    if slots:
        blocks_BD = blocks_BD.at[:, 0].set(slots // block)
    first_BD = jnp.cumsum(blocks_BD, axis=1) - blocks_BD
    of_tokens = lambda x_BD: jnp.take_along_axis(x_BD, document, axis=1)
    origin, blocks = of_tokens(first_BD), of_tokens(blocks_BD)
    # A document has blocks / tokens <= 1 / least up to one block, and <= 2 / block above.
    length = slots + block * max(math.ceil(count / least), math.ceil(2 * count / block))
    slot = jnp.where(real & (blocks > 0), origin * block + position_BT, length)
    return _Layout(slot, origin, blocks, length)


def empty(
    batch: int,
    capacity: int,
    block: int,
    dtype: DTypeLike,
    tokens: dict[str, tuple],
    sums: dict[str, tuple] | None = None,
    unit: int = 0,
) -> Arrays:
    """A state of no tokens: whole blocks of slots, and sums of every `unit` (0: block) of them."""
    slots = math.ceil(capacity / block) * block
    entries, wide = slots // (unit or block), mixer.wide(dtype)
    state = {name: jnp.zeros((batch, slots, *shape), dtype) for name, shape in tokens.items()}
    for name, shape in (sums or {}).items():
        state[name] = jnp.zeros((batch, entries, *shape), wide)
    return state | {"length": jnp.zeros(batch, jnp.int32)}


def positions(state: Arrays | None, segments, x: Array) -> Int[Array, "B T"]:
    """Tokens of its own document before each token of x (B, T, D)."""
    return cache.document_positions(_before(state, x), segments, x.shape[1])[0]


def _before(state: Arrays | None, x: Array) -> Int[Array, " B"]:
    return jnp.zeros(x.shape[0], jnp.int32) if state is None else state["length"]


def write(state: Arrays, tokens: Arrays, sums: Arrays, segments, unit: int) -> Arrays:
    """The state after the new tokens: the row's last document, by position."""
    some = next(iter(tokens.values()))
    position_BT, length_B = cache.document_positions(state["length"], segments, some.shape[1])
    at_BT, kept = position_BT, None
    if segments is not None:
        at_BT = jnp.where(packed.of_last(segments), position_BT, jnp.iinfo(jnp.int32).max)
        kept = packed.goes_on(segments)
    put = lambda old, at, x: old.at[at].set(x.astype(old.dtype), mode="drop")
    new = {name: jax.vmap(put)(state[name], at_BT, x) for name, x in tokens.items()}
    for name, x in sums.items():
        old = state[name] if kept is None else mixer.keep_rows(kept, state[name])
        new[name] = _add(old, at_BT // unit, x)
    return new | {"length": length_B}


def attend(
    queries: Arrays,
    tokens: Arrays,
    state: Arrays | None,
    segments: Int[Array, "B T"] | None,
    *,
    block: int,
    read: Callable[[Arrays, Arrays, Row], Array],
    near: Callable[[Arrays, Arrays], Array],
    sums: Arrays | None = None,
    unit: int = 0,
    least: int = 0,
    init_state: Callable[[int, int, DTypeLike], Arrays] | None = None,
) -> tuple[Array, Arrays]:
    """What `read` finds for every query, and the state after the new `tokens`.

    `read(queries, keys, row)` gets the tokens by block, and in `keys` the `sums` (a contribution a
    token) added up over every `unit` (0: block). `near` answers for documents of fewer than `least`
    (0: block) tokens in the row as it came. Without `init_state` there is no state (encoders).
    """
    least, unit, sums = least or block, unit or block, sums or {}
    some = next(iter(tokens.values()))

    def alone():
        return _alone(queries, tokens, sums, segments, read, near, (block, unit, least))

    if init_state is None:
        return alone(), {}
    old = init_state(some.shape[0], some.shape[1], some.dtype) if state is None else state
    new = write(old, tokens, sums, segments, unit)
    if state is None:
        return alone(), new

    def beside():
        if segments is None:  # the new state is the document, by position
            slot = cache.positions(old["length"], None, some.shape[1])
            zero = jnp.zeros_like(slot)
            return read(queries, new, Row(block, slot, zero, zero, False, None))
        kept = next(old[name].shape[1] for name in tokens)
        layout = _layout(segments, old["length"], kept, block, least)
        keys = {name: layout.spread(x, old[name]) for name, x in tokens.items()}
        for name, x in sums.items():
            row = lengthen(old[name], layout.length // unit)
            keys[name] = _add(row, layout.slot // unit, x)
        row = Row(block, layout.slot, layout.origin, layout.blocks, False, None)
        return _either(layout, read(queries, keys, row), near(queries, tokens))

    if some.shape[1] == 1:
        return beside(), new
    return jax.lax.cond(jnp.all(old["length"] == 0), alone, beside), new


def _alone(queries, tokens, sums, segments, read, near, sizes: tuple[int, int, int]) -> Array:
    """What a row reads that has no past."""
    block, unit, least = sizes
    some = next(iter(tokens.values()))
    batch, count = some.shape[:2]
    if segments is None:
        slot = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
        blocks = jnp.full_like(slot, math.ceil(count / block))
        row = Row(block, slot, jnp.zeros_like(slot), blocks, True, None)
        whole = {name: lengthen(x, math.ceil(count / block) * block) for name, x in sums.items()}
        keys = tokens | {name: by_block(x, unit).sum(2) for name, x in whole.items()}
        return read(queries, keys, row)
    layout = _layout(segments, jnp.zeros(batch, jnp.int32), 0, block, least)
    keys = {name: layout.spread(x) for name, x in tokens.items()}
    keys |= {name: by_block(layout.spread(x), unit).sum(2) for name, x in sums.items()}
    laid = {name: layout.spread(x) for name, x in queries.items()}
    slot = jnp.broadcast_to(jnp.arange(layout.length, dtype=jnp.int32), (batch, layout.length))
    given = layout.origin, layout.blocks, packed.ordinals(segments) + 1
    origin, blocks, document = (layout.spread(x) for x in given)
    row = Row(block, slot, origin, blocks, True, document)
    return _either(layout, layout.back(read(laid, keys, row)), near(queries, tokens))


def _either(layout: _Layout, far: Array, near: Array) -> Array:
    laid = (layout.slot < layout.length).reshape(*layout.slot.shape, *(1,) * (far.ndim - 2))
    return jnp.where(laid, far, near)


def _add(row: Array, at: Int[Array, "B T"], x: Array) -> Array:
    """Row (B, N, ...) with tokens (B, T, ...) added at (B, T)."""
    add = lambda row, at, x: row.at[at].add(x.astype(row.dtype), mode="drop")
    return jax.vmap(add)(row, at, x)
