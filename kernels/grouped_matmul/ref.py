"""The grouped product by its definition: every group's matrix times all rows, its own kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.products import sum_type


def grouped_matmul(
    x: Float[Array, "M K"], weights: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """The product of `kernels.grouped_matmul`, one `lax.scan` over groups."""
    wide = sum_type(x, weights)
    row = jnp.arange(x.shape[0])
    ends = jnp.cumsum(group_sizes)

    def step(y_MN, group):
        w_KN, size, end = group
        mine = ((row >= end - size) & (row < end))[:, None]
        x_MK = jnp.where(mine, x, 0).astype(wide)
        return y_MN + jnp.where(mine, x_MK @ w_KN.astype(wide), 0), None

    zeros_MN = jnp.zeros((x.shape[0], weights.shape[2]), wide)
    y_MN, _ = jax.lax.scan(step, zeros_MN, (weights, group_sizes, ends))
    legal = jnp.all(group_sizes >= 0) & (ends[-1] <= x.shape[0])
    return jnp.where(legal, y_MN, jnp.nan).astype(x.dtype)
