"""The fused cross-entropy as TPU kernels: tiles of logits that never leave VMEM.

Forward, a tile of rows meets the head a tile of the vocabulary at a time and keeps a running
maximum, a running sum of exponentials and the target's logit: as in softmax attention, with the
head as keys. What it writes is two numbers a row, the loss and the logarithm of the sum. Backward,
two kernels form the logits again: one walks the vocabulary and sums dx of a tile of rows in VMEM,
the other walks the rows and sums d_head of a tile of the vocabulary. So a training step takes 10
R D V FLOPs instead of the 6 of a form that keeps logits, and no memory that grows with R V.

Each row tile reads the whole head, each vocabulary tile all of x. Over a mesh rows are split and
the head is whole on every device.
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

LANE = 128
ROOM = 13 << 20  # bytes of VMEM for blocks and sums, of the 16 MiB that a v4 gives
DIMS = {"x": "b t w", "head": "w v", "targets": "b t"}


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The loss of `kernels.cross_entropy`, differentiated through `nll`."""
    if reason := uncovered("cross_entropy", x, head, targets, weights, softcap=softcap):
        raise ValueError(f"cross_entropy as pallas_tpu does not cover {reason}; use xla.")
    arguments = dict(x=x, head=head, targets=targets.astype(jnp.int32), softcap=softcap)
    nll = tpu.over_mesh(_local, arguments, DIMS, outputs=("b t",))
    return jnp.sum(weights.astype(nll.dtype) * nll), jax.lax.stop_gradient(nll)


def uncovered(function: str, x, head, targets, weights, *, softcap: float = 0.0) -> str:
    """Why a call cannot run here; "" if it can."""
    if jnp.float64 in (x.dtype, head.dtype) and setting.interpreter() is None:
        return "float64"
    widest = _widest(x.dtype.itemsize, head.dtype.itemsize)
    if head.shape[0] > widest:
        return f"width {head.shape[0]} (at most {widest} fits into VMEM)"
    return ""


class Tiles(NamedTuple):
    """Rows and vocabulary entries of a tile of logits."""

    rows: int
    vocabulary: int


def tiles(
    kernel: str, rows: int, width: int, vocabulary: int, x_bytes: int, head_bytes: int
) -> Tiles:
    """The tile that moves the fewest bytes a logit among those that fit; `uncovered` sees to one.

    `kernel` is forward, dx or dhead; the two sum a float32 block of rows or of the head.
    """

    def bytes_for(tile):
        row, column = width * tile.rows, width * tile.vocabulary
        held = 2 * (row * x_bytes + column * head_bytes) + 16 * tile.rows * tile.vocabulary
        if kernel == "dx":
            held += row * (4 + 2 * x_bytes)
        elif kernel == "dhead":
            held += column * (4 + 2 * head_bytes)
        return held

    longest = min(512, max(8, 1 << (rows - 1).bit_length()))
    heights = [1 << n for n in range(3, longest.bit_length())]
    breadths = [vocabulary] if vocabulary <= LANE else [LANE, 2 * LANE, 4 * LANE]
    every = [Tiles(a, b) for a in heights for b in breadths if b < vocabulary + LANE]
    fitting = [tile for tile in every if bytes_for(tile) <= ROOM]
    # A logit costs a part of a row of x and a part of a column of the head.
    traffic = lambda tile: x_bytes / tile.vocabulary + head_bytes / tile.rows
    return min(fitting, key=traffic)


def _widest(x_bytes: int, head_bytes: int) -> int:
    """The largest multiple of 128 for which every kernel has a tile of 128 rows by 128 entries."""
    row = max(4 * x_bytes + 2 * head_bytes, 2 * x_bytes + 4 * head_bytes) + 4
    return (ROOM - 16 * LANE * LANE) // (row * LANE) // LANE * LANE


def _local(*, x, head, targets, softcap):
    batch, length, width = x.shape
    rows = batch * length
    longest = min(512, max(8, 1 << (rows - 1).bit_length()))
    missing = -rows % longest
    x_RD = jnp.pad(x.reshape(rows, width), ((0, missing), (0, 0)))
    targets_R1 = jnp.pad(targets.reshape(rows, 1), ((0, missing), (0, 0)))
    nll_R1 = _rows(softcap, x_RD, head, targets_R1)
    return nll_R1[:rows].reshape(batch, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(softcap, x_RD, head, targets_R1):
    return _forward(softcap, x_RD, head, targets_R1)[0]


def _forward(softcap, x_RD, head, targets_R1):
    rows, width, vocabulary = *x_RD.shape, head.shape[1]
    tile = tiles("forward", rows, width, vocabulary, x_RD.dtype.itemsize, head.dtype.itemsize)
    wide = sum_type(x_RD, head)
    number = pl.BlockSpec((tile.rows, 1), lambda r, v: (r, 0))
    nll_R1, lse_R1 = tpu.call(
        functools.partial(_forward_body, softcap, vocabulary),
        *(x_RD, head, targets_R1),
        grid=(rows // tile.rows, pl.cdiv(vocabulary, tile.vocabulary)),
        ins=[
            pl.BlockSpec((tile.rows, width), lambda r, v: (r, 0)),
            pl.BlockSpec((width, tile.vocabulary), lambda r, v: (0, v)),
            number,
        ],
        outs=[number, number],
        out_types=[jax.ShapeDtypeStruct((rows, 1), wide)] * 2,
        scratch=[pltpu.VMEM((tile.rows, 1), wide)] * 3,
        semantics="pa",
        name="cross_entropy_forward",
    )
    return nll_R1, (x_RD, head, targets_R1, lse_R1)


def _forward_body(softcap, vocabulary, x_RD, head, targets_R1, nll_R1, lse_R1, top, total, chosen):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        chosen[...] = jnp.zeros_like(chosen)

    logits_RV, _, column = _logits(softcap, vocabulary, step, x_RD[...], head[...])
    here = column == targets_R1[...]
    chosen[...] += jnp.sum(jnp.where(here, logits_RV, 0), axis=1, keepdims=True)
    higher_R1 = jnp.maximum(top[...], jnp.max(logits_RV, axis=1, keepdims=True))
    power_RV = jnp.exp(logits_RV - higher_R1)
    total[...] = total[...] * jnp.exp(top[...] - higher_R1)
    total[...] += jnp.sum(power_RV, axis=1, keepdims=True)
    top[...] = higher_R1

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        known = (targets_R1[...] >= 0) & (targets_R1[...] < vocabulary)
        log_total_R1 = jnp.log(total[...])
        lse_R1[...] = top[...] + log_total_R1
        nll_R1[...] = jnp.where(known, log_total_R1 + (top[...] - chosen[...]), jnp.nan)


def _backward(softcap, saved, slopes_R1):
    x_RD, head, targets_R1, lse_R1 = saved
    given = (softcap, x_RD, head, targets_R1, lse_R1, slopes_R1)
    return _rows_gradient(*given), _head_gradient(*given), None


_rows.defvjp(_forward, _backward)


def _rows_gradient(softcap, x_RD, head, targets_R1, lse_R1, slopes_R1):
    rows, width, vocabulary = *x_RD.shape, head.shape[1]
    tile = tiles("dx", rows, width, vocabulary, x_RD.dtype.itemsize, head.dtype.itemsize)
    row = pl.BlockSpec((tile.rows, width), lambda r, v: (r, 0))
    number = pl.BlockSpec((tile.rows, 1), lambda r, v: (r, 0))
    (dx_RD,) = tpu.call(
        functools.partial(_rows_gradient_body, softcap, vocabulary),
        *(x_RD, head, targets_R1, lse_R1, slopes_R1),
        grid=(rows // tile.rows, pl.cdiv(vocabulary, tile.vocabulary)),
        ins=[
            row,
            pl.BlockSpec((width, tile.vocabulary), lambda r, v: (0, v)),
            *(number, number, number),
        ],
        outs=[row],
        out_types=[jax.ShapeDtypeStruct(x_RD.shape, x_RD.dtype)],
        scratch=[pltpu.VMEM((tile.rows, width), lse_R1.dtype)],
        semantics="pa",
        name="cross_entropy_dx",
    )
    return dx_RD


def _rows_gradient_body(
    softcap, vocabulary, x_RD, head, targets_R1, lse_R1, slopes_R1, dx_RD, sum_RD
):
    step = pl.program_id(1)
    slope_RV, head_DV = _slopes(
        softcap, vocabulary, step, x_RD[...], head[...], targets_R1, lse_R1, slopes_R1
    )

    @pl.when(step == 0)
    def _():
        sum_RD[...] = jnp.zeros_like(sum_RD)

    sum_RD[...] += exact_product("rv,dv->rd", slope_RV.astype(head.dtype), head_DV)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dx_RD[...] = sum_RD[...].astype(dx_RD.dtype)


def _head_gradient(softcap, x_RD, head, targets_R1, lse_R1, slopes_R1):
    rows, width, vocabulary = *x_RD.shape, head.shape[1]
    tile = tiles("dhead", rows, width, vocabulary, x_RD.dtype.itemsize, head.dtype.itemsize)
    column = pl.BlockSpec((width, tile.vocabulary), lambda v, r: (0, v))
    number = pl.BlockSpec((tile.rows, 1), lambda v, r: (r, 0))
    (dhead,) = tpu.call(
        functools.partial(_head_gradient_body, softcap, vocabulary),
        *(x_RD, head, targets_R1, lse_R1, slopes_R1),
        grid=(pl.cdiv(vocabulary, tile.vocabulary), rows // tile.rows),
        ins=[
            pl.BlockSpec((tile.rows, width), lambda v, r: (r, 0)),
            column,
            *(number, number, number),
        ],
        outs=[column],
        out_types=[jax.ShapeDtypeStruct(head.shape, head.dtype)],
        scratch=[pltpu.VMEM((width, tile.vocabulary), lse_R1.dtype)],
        semantics="pa",
        name="cross_entropy_dhead",
    )
    return dhead


def _head_gradient_body(
    softcap, vocabulary, x_RD, head, targets_R1, lse_R1, slopes_R1, dhead, sum_DV
):
    step = pl.program_id(1)
    slope_RV, _ = _slopes(
        softcap, vocabulary, pl.program_id(0), x_RD[...], head[...], targets_R1, lse_R1, slopes_R1
    )

    @pl.when(step == 0)
    def _():
        sum_DV[...] = jnp.zeros_like(sum_DV)

    sum_DV[...] += exact_product("rd,rv->dv", x_RD[...], slope_RV.astype(x_RD.dtype))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dhead[...] = sum_DV[...].astype(dhead.dtype)


def _slopes(softcap, vocabulary, at, x_RD, head_DV, targets_R1, lse_R1, slopes_R1):
    """d loss / d logits before the cap, slope * (softmax - one at the target) * cap'; and head."""
    logits_RV, head_DV, column = _logits(softcap, vocabulary, at, x_RD, head_DV)
    here = (column == targets_R1[...]).astype(logits_RV.dtype)
    slope_RV = slopes_R1[...] * (jnp.exp(logits_RV - lse_R1[...]) - here)
    if softcap:
        inside = jnp.where(column < vocabulary, logits_RV / softcap, 0)
        slope_RV *= 1 - inside * inside
    return slope_RV, head_DV


def _logits(softcap, vocabulary, at, x_RD, head_DV):
    """A tile of logits, -inf beyond the vocabulary; the head with zeros there; column numbers."""
    tile = head_DV.shape[1]
    ragged = vocabulary % tile
    if ragged:
        entry = at * tile + jax.lax.broadcasted_iota(jnp.int32, head_DV.shape, 1)
        head_DV = jnp.where(entry < vocabulary, head_DV, 0)
    logits_RV = exact_product("rd,dv->rv", x_RD, head_DV)
    if softcap:
        logits_RV = softcap * jnp.tanh(logits_RV / softcap)
    column = at * tile + jax.lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1)
    if ragged:
        logits_RV = jnp.where(column < vocabulary, logits_RV, -jnp.inf)
    return logits_RV, head_DV, column
