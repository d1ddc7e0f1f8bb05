"""Marks of tokens that do not simply go on, for TPU kernels that walk a row token by token."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import segments as packed

START, PADDING = 1, 2


def of_tokens(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """START at the first token of every document but the row's first, PADDING, 0 elsewhere."""
    start, real = packed.starts(segments), packed.is_real(segments)
    return jnp.where(start, START, jnp.where(real, 0, PADDING)).astype(jnp.int32)


def turned(lanes, scratch: list):
    """A chunk's marks (1, C) as rows, in the last ref of `scratch`, which is taken off."""
    if lanes is None:
        return None
    rows = scratch.pop()
    rows[...] = lanes[...].T
    return rows
