"""The inverse of a unit lower triangular matrix: the delta rule's one serial step in a chunk."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.products import HIGHEST

BASE = 8  # measured: smaller matmuls cost as much as these


def unit_lower_inverse(below_BHCS: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """(I + L)^-1 of strictly lower L whose size C is a power of two.

    Blocks of 8 by L's finite geometric series, I - L + L^2 - ... = (I - L)(I + L^2)(I + L^4);
    larger ones by halves, [[A, 0], [X, B]]^-1 = [[A^-1, 0], [-B^-1 X A^-1, B^-1]]. The series alone
    would cost more and, for large entries, lose digits to cancellation.
    """
    product = functools.partial(jnp.matmul, precision=HIGHEST)
    blocks, lower_left = below_BHCS[..., None, :, :], []
    while blocks.shape[-1] > BASE:
        half = blocks.shape[-1] // 2
        lower_left.append(blocks[..., half:, :half])
        blocks = jnp.stack([blocks[..., :half, :half], blocks[..., half:, half:]], axis=-3)
        blocks = blocks.reshape(*below_BHCS.shape[:-2], -1, half, half)

    inverse = jnp.eye(blocks.shape[-1], dtype=blocks.dtype) - blocks
    power, reached = blocks, 2
    while reached < blocks.shape[-1]:
        power = product(power, power)
        inverse = inverse + product(inverse, power)
        reached *= 2

    for corner in reversed(lower_left):
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -product(second, product(corner, first))
        above = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]
