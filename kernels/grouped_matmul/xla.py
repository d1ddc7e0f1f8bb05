"""The grouped product a tile of rows at a time, every tile within one group.

A tile is read where its group's rows lie, and written back whole: what it holds beyond its group is
zero and the next group's first tile, which begins there, overwrites it. So no row is gathered and
none is copied apart; the rows that a group's last tile has too many are the only waste.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import vary
from kernels.products import product, sum_type

# Rows of a tile. Shorter ones spend more on a group's matrix than on the rows.
SHORTEST, LONGEST = 16, 256


class Tiles(NamedTuple):
    """Where each tile begins, the end of its group's rows, and its group; (tiles,) each."""

    start: Int[Array, " tiles"]
    stop: Int[Array, " tiles"]
    group: Int[Array, " tiles"]


def grouped_matmul(
    x: Float[Array, "M K"], weights: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """The product of `kernels.grouped_matmul` in 2 M K N FLOPs and at most one tile a group."""
    y_MN = _product(*vary.together((x, weights, group_sizes.astype(jnp.int32))))
    legal = jnp.all(group_sizes >= 0) & (jnp.sum(group_sizes) <= x.shape[0])
    return jnp.where(legal, y_MN, jnp.nan)


def tile_rows(rows: int, groups: int) -> int:
    """Rows a tile: a power of two near half an even group, so that little is padding."""
    wanted = 1 << max(rows // (2 * groups), 1).bit_length() - 1
    return min(max(wanted, SHORTEST), LONGEST, 1 << (rows - 1).bit_length())


def tiles_of(group_sizes: Int[Array, " E"], rows: int, tile: int) -> Tiles:
    """The tiles of all groups in order, as many as the worst sizes need; unused ones are empty."""
    filled = min(group_sizes.shape[0], rows)
    count = (rows + filled * (tile - 1)) // tile
    ends = jnp.cumsum(group_sizes)
    used = -(-group_sizes // tile)
    used_ends = jnp.cumsum(used)
    index = jnp.arange(count, dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= used_ends, axis=1, dtype=jnp.int32)
    beyond = group == group_sizes.shape[0]
    group = jnp.where(beyond, group_sizes.shape[0] - 1, group)
    before = (used_ends - used)[group]
    start = (ends - group_sizes)[group] + (index - before) * tile
    return Tiles(jnp.where(beyond, ends[-1], start), ends[group], group)


@jax.custom_vjp
def _product(x_MK, weights_EKN, group_sizes):
    rows, (groups, _, width) = x_MK.shape[0], weights_EKN.shape
    tile = tile_rows(rows, groups)

    def step(y_MN, at: Tiles):
        w_KN = jax.lax.dynamic_index_in_dim(weights_EKN, at.group, keepdims=False)
        y_RN = product("rk,kn->rn", _rows(padded_MK, at, tile), w_KN)
        y_RN = _within(y_RN, at).astype(y_MN.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_RN, at.start, axis=0), None

    padded_MK = _pad(x_MK, tile)
    zeros_MN = vary.like(jnp.zeros((rows + tile, width), x_MK.dtype), x_MK)
    y_MN, _ = jax.lax.scan(step, zeros_MN, tiles_of(group_sizes, rows, tile))
    return y_MN[:rows]


def _forward(x_MK, weights_EKN, group_sizes):
    return _product(x_MK, weights_EKN, group_sizes), (x_MK, weights_EKN, group_sizes)


def _backward(residuals, dy_MN):
    """dx_m = dy_m weights[e]^T;  dweights[e] = sum over its rows of x_m^T dy_m."""
    x_MK, weights_EKN, group_sizes = residuals
    rows, groups = x_MK.shape[0], weights_EKN.shape[0]
    tile = tile_rows(rows, groups)

    def step(carry, at: Tiles):
        dx_MK, dw_EKN = carry
        x_RK = _within(_rows(padded_MK, at, tile), at)
        dy_RN = _within(_rows(padded_MN, at, tile), at)
        w_KN = jax.lax.dynamic_index_in_dim(weights_EKN, at.group, keepdims=False)
        dx_RK = _within(product("rn,kn->rk", dy_RN, w_KN), at).astype(dx_MK.dtype)
        dx_MK = jax.lax.dynamic_update_slice_in_dim(dx_MK, dx_RK, at.start, axis=0)
        dw_KN = jax.lax.dynamic_index_in_dim(dw_EKN, at.group, keepdims=False)
        dw_KN = dw_KN + product("rk,rn->kn", x_RK, dy_RN)
        dw_EKN = jax.lax.dynamic_update_index_in_dim(dw_EKN, dw_KN, at.group, axis=0)
        return (dx_MK, dw_EKN), None

    padded_MK, padded_MN = _pad(x_MK, tile), _pad(dy_MN, tile)
    zeros = (
        jnp.zeros((rows + tile, x_MK.shape[1]), x_MK.dtype),
        jnp.zeros(weights_EKN.shape, sum_type(x_MK, dy_MN)),
    )
    tiles = tiles_of(group_sizes, rows, tile)
    (dx_MK, dw_EKN), _ = jax.lax.scan(step, vary.like(zeros, x_MK), tiles)
    return dx_MK[:rows], dw_EKN.astype(weights_EKN.dtype), None


_product.defvjp(_forward, _backward)


def _pad(rows, tile):
    """A tile may begin at any row, so the last ones reach beyond the end."""
    return jnp.pad(rows, ((0, tile), (0, 0)))


def _rows(rows, at, tile):
    return jax.lax.dynamic_slice_in_dim(rows, at.start, tile, axis=0)


def _within(tile_rows, at):
    row = at.start + jnp.arange(tile_rows.shape[0], dtype=jnp.int32)
    return jnp.where((row < at.stop)[:, None], tile_rows, 0)
