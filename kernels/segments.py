"""Document boundaries inside packed rows, said once for every operation.

`segments` is (B, T) int32: 0 is padding, 1.. are document numbers. Three rules hold everywhere:
the initial state belongs to the document of the row's first real token; a real token whose number
differs from that of the real token before it starts from nothing; padding contributes nothing,
changes no state and has output zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def is_real(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token belongs to a document."""
    return segments != 0


def ordinals(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number the documents of a row by order: 0 for the first, + 1 at every change of document.

    Padding inherits the ordinal of the real token before it (0 before the first), so equal
    ordinals mean that no document starts between two tokens, whatever the numbers were.
    """
    time = jnp.arange(segments.shape[1], dtype=jnp.int32)
    real = is_real(segments)
    last = jax.lax.cummax(jnp.where(real, time, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1)
    starts = real & (before >= 0) & (segments != previous)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def numbered(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The same documents as 1, 2, .. by order, padding as 0: no number stands for two of them.

    Whoever compares numbers compares these: the given ones may come back later in a row.
    """
    return jnp.where(is_real(segments), 1 + ordinals(segments), 0)


def of_last(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the tokens of the row's last document."""
    document = ordinals(segments)
    return is_real(segments) & (document == document[:, -1:])


def goes_on(segments: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """True for rows in which no document starts after the first: its state is the row's."""
    return ordinals(segments)[:, -1] == 0


def starts(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the first token of every document but the row's first."""
    document = ordinals(segments)
    return jnp.diff(document, axis=1, prepend=0) > 0


def check(segments, batch: int, length: int) -> None:
    """Raise unless `segments` is None or an integer array of shape (batch, length)."""
    if segments is None:
        return
    if segments.shape != (batch, length) or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(
            f"segments has shape {segments.shape} and dtype {segments.dtype}; "
            f"it must be ({batch}, {length}) int32, like the inputs' (B, T)."
        )
