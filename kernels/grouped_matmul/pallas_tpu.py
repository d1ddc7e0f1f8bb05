"""The grouped product as TPU kernels: a walk over (group, tile of rows) in order of rows.

A tile that two groups share is visited once for each; its block of the result stays in VMEM
meanwhile, and each visit fills in its own rows. So the work is that of the rows and at most one
tile a group, whatever the sizes: which group and tile a step visits are lists made from the sizes,
read as scalars before the step's blocks are fetched. Unless it is very long, the sum of a product
is not cut: a group's matrix, or a slice of its columns, comes once for all of the group's tiles.
Odd sizes above 128 are padded to whole lanes.

The rows beyond all groups are one more group, whose rows are filled with zeros. The gradient of the
weights sums a group's tiles in VMEM; empty groups are visited once, to write their zeros.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import setting, tpu
from kernels.products import exact_product, sum_type

LANE, DEPTH = 128, 4096  # lanes; the longest sum that is not cut
MATRIX = 6 << 20  # bytes of a slice of a group's matrix, of which two must fit into a v4
DIMS = {"x": "m k", "weights": "e k d", "group_sizes": "e"}


def grouped_matmul(
    x: Float[Array, "M K"], weights: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """The product of `kernels.grouped_matmul`; over a mesh, outputs are split and rows whole."""
    if reason := uncovered("grouped_matmul", x, weights, group_sizes):
        raise ValueError(f"grouped_matmul as pallas_tpu does not cover {reason}; or use xla.")
    arguments = dict(x=x, weights=weights, group_sizes=group_sizes.astype(jnp.int32))
    return tpu.over_mesh(_local, arguments, DIMS, outputs=("m d",))


def uncovered(function: str, x, weights, group_sizes) -> str:
    """Why a call cannot run here; "" if it can."""
    if x.dtype == jnp.float64 and setting.interpreter() is None:
        return "float64; the nearest dtype is float32"
    return ""


def tile_rows(rows: int, groups: int) -> int:
    """128 rows, 256 where groups are large; fewer rows in all make one shorter tile."""
    longest = 256 if rows >= 1024 * groups else 128
    return min(longest, max(8, 1 << (rows - 1).bit_length()))


def slice_of(size: int, depth: int, itemsize: int) -> int:
    """The most columns of a (depth, size) matrix that divide it, by lanes, and fit MATRIX."""
    if size * depth * itemsize <= MATRIX or size % LANE:
        return size
    fitting = max(MATRIX // (depth * itemsize * LANE), 1)
    return LANE * max(n for n in range(1, fitting + 1) if size // LANE % n == 0)


class Visits(NamedTuple):
    """The walk: the group and the tile of each step, and the first and last row of each group."""

    group: Int[Array, " steps"]
    tile: Int[Array, " steps"]
    start: Int[Array, " E+1"]
    stop: Int[Array, " E+1"]


def visits_of(group_sizes: Int[Array, " E"], rows: int, tile: int) -> Visits:
    """All steps of a walk over `rows` rows, a whole number of tiles; unused steps repeat the last.

    Neighbouring groups share at most one tile, so E + rows / tile steps are enough.
    """
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    stop = jnp.cumsum(sizes)
    start = stop - sizes
    last_tile = rows // tile - 1
    first = jnp.clip(start // tile, 0, last_tile)
    final = jnp.clip(jnp.where(sizes > 0, (stop - 1) // tile, first), first, last_tile)
    ends = jnp.cumsum(final - first + 1)
    step = jnp.arange(group_sizes.shape[0] + rows // tile, dtype=jnp.int32)
    group = jnp.sum(step[:, None] >= ends, axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, group_sizes.shape[0])
    within = step - (ends - (final - first + 1))[group]
    return Visits(group, jnp.minimum(first[group] + within, final[group]), start, stop)


def _local(*, x, weights, group_sizes):
    tile = tile_rows(x.shape[0], weights.shape[0])
    lanes = [-size % LANE if size > LANE else 0 for size in weights.shape[1:]]
    padded = jnp.pad(x, ((0, -x.shape[0] % tile), (0, lanes[0])))
    matrices = jnp.pad(weights, ((0, 0), (0, lanes[0]), (0, lanes[1])))
    visits = visits_of(group_sizes, padded.shape[0], tile)
    y = _product(tile, padded, matrices, visits)[: x.shape[0], : weights.shape[2]]
    legal = jnp.all(group_sizes >= 0) & (jnp.sum(group_sizes) <= x.shape[0])
    return jnp.where(legal, y, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(tile, x_MK, weights_EKN, visits):
    return _rows_times(tile, x_MK, weights_EKN, visits, transposed=False)


def _forward(tile, x_MK, weights_EKN, visits):
    return _product(tile, x_MK, weights_EKN, visits), (x_MK, weights_EKN, visits)


def _backward(tile, saved, dy_MN):
    x_MK, weights_EKN, visits = saved
    dx_MK = _rows_times(tile, dy_MN, weights_EKN, visits, transposed=True)
    return dx_MK, _weights_gradient(tile, x_MK, dy_MN, weights_EKN, visits), None


_product.defvjp(_forward, _backward)


def _rows_times(tile, x_MK, weights, visits, *, transposed):
    """Each row times its group's matrix, or that matrix transposed; zero beyond the groups."""
    rows, depth = x_MK.shape
    groups, size = weights.shape[0], weights.shape[1 if transposed else 2]
    part = depth if depth <= DEPTH else slice_of(depth, MATRIX // DEPTH, 1)
    cut = slice_of(size, part, weights.dtype.itemsize)
    grid = size // cut, visits.group.shape[0], depth // part
    tiles, whole = grid[0] * rows // tile, part == depth

    def at_matrix(n, p, d, group, *_):
        own = jnp.minimum(group[p], groups - 1)
        return (own, n, d) if transposed else (own, d, n)

    (out,) = tpu.call(
        functools.partial(_rows_body, "rk,nk->rn" if transposed else "rk,kn->rn"),
        *(x_MK, weights),
        lists=visits,
        grid=grid,
        ins=[
            pl.BlockSpec((tile, part), lambda n, p, d, group, at, *_: (at[p], d)),
            pl.BlockSpec((None, cut, part) if transposed else (None, part, cut), at_matrix),
        ],
        outs=[pl.BlockSpec((tile, cut), lambda n, p, d, group, at, *_: (at[p], n))],
        out_types=[jax.ShapeDtypeStruct((rows, size), x_MK.dtype)],
        scratch=[pltpu.VMEM((tile, cut), sum_type(x_MK))],
        copies=[tiles if whole else 0, grid[0] * (groups + 1) if whole else 0, tiles],
        semantics="paa",
        name="grouped_matmul_rows",
    )
    return out


def _rows_body(letters, group, at, start, stop, x_RK, w, y_RN, sum_RN):
    step, part = pl.program_id(1), pl.program_id(2)
    own, tile = group[step], at[step]

    @pl.when(part == 0)
    def _():
        sum_RN[...] = jnp.zeros_like(sum_RN)

    sum_RN[...] += exact_product(letters, x_RK[...], w[...])

    @pl.when(part == pl.num_programs(2) - 1)
    def _():
        first = (step == 0) | (at[jnp.maximum(step - 1, 0)] != tile)
        mine = _mine(start[own], stop[own], tile, y_RN.shape) & (own < start.shape[0] - 1)
        # The block holds nothing yet where no group has visited the tile.
        before = jnp.where(jnp.broadcast_to(first, y_RN.shape), 0, y_RN[...])
        y_RN[...] = jnp.where(mine, sum_RN[...].astype(y_RN.dtype), before)


def _weights_gradient(tile, x_MK, dy_MN, weights, visits):
    """For every group the sum over its rows of x dy^T."""
    groups, width, size = weights.shape
    cut_k, cut_n = (min(slice_of(n, 1024, 4), n) for n in (width, size))
    steps = visits.group.shape[0]
    rows = x_MK.shape[0]
    (out,) = tpu.call(
        _weights_body,
        *(x_MK, dy_MN),
        lists=visits,
        grid=(width // cut_k, size // cut_n, steps),
        ins=[
            pl.BlockSpec((tile, cut_k), lambda k, n, p, group, at, *_: (at[p], k)),
            pl.BlockSpec((tile, cut_n), lambda k, n, p, group, at, *_: (at[p], n)),
        ],
        outs=[pl.BlockSpec((None, cut_k, cut_n), lambda k, n, p, group, *_: (group[p], k, n))],
        out_types=[jax.ShapeDtypeStruct((groups + 1, width, size), weights.dtype)],
        scratch=[pltpu.VMEM((cut_k, cut_n), sum_type(weights))],
        copies=[rows // tile, rows // tile, groups + 1],
        semantics="ppa",
        name="grouped_matmul_weights",
    )
    return out[:groups]


def _weights_body(group, at, start, stop, x_RK, dy_RN, dw_KN, sum_KN):
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    own = group[step]

    @pl.when((step == 0) | (group[jnp.maximum(step - 1, 0)] != own))
    def _():
        sum_KN[...] = jnp.zeros_like(sum_KN)

    # A step that repeats the last one must not add its rows again.
    repeats = (step > 0) & (group[jnp.maximum(step - 1, 0)] == own)
    repeats &= at[jnp.maximum(step - 1, 0)] == at[step]
    stop_row = jnp.where(repeats, start[own], stop[own])
    x, dy = (
        jnp.where(_mine(start[own], stop_row, at[step], ref.shape), ref[...], 0)
        for ref in (x_RK, dy_RN)
    )
    sum_KN[...] += exact_product("rk,rn->kn", x, dy)

    @pl.when((step == last) | (group[jnp.minimum(step + 1, last)] != own))
    def _():
        dw_KN[...] = sum_KN[...].astype(dw_KN.dtype)


def _mine(start, stop, tile, shape) -> jax.Array:
    """Which entries of a tile's block lie in the rows from start to stop."""
    row = tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start) & (row < stop)
