"""The long convolution by blocks: near inputs tap by tap, far ones by transforms.

Cut a row into a few equal blocks: what one block adds to a later one is a product with a Toeplitz
matrix, done by Fourier transforms of the blocks. Each block is cut in turn, until the pieces have
BASE tokens; inputs fewer than BASE tokens back are added tap by tap. Only one document can leave a
block and reach a later one, so a mask on either side keeps all others out, exactly; and no output
ever shares a transform with a later input.

Cut in two, as the cheap transforms of CPUs and GPUs want it, a row takes log2(T / BASE) transforms
of T points each way, half of that many times the cost of one transform of the whole padded row,
which would leak. Cut in 16, as suits products with the matrix of the transform on a TPU, there are
fewer and shorter transforms, and up to 15 elementwise products of spectra a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import setting, vary
from kernels.long_conv import fourier
from kernels.products import sum_type
from kernels.short_conv import xla as short

BASE = 16
BLOCKS = {"fft": 2, "matmul": 16}


def long_conv(
    x: Float[Array, "B T D"],
    filters: Float[Array, "L D"],
    skip: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B L-1 D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B L-1 D"]]:
    """The sum of `kernels.long_conv`; the backward pass keeps its inputs alone.

    A row behind a state costs what a row of L - 1 + T tokens costs.
    """
    tail_BVD = None if initial_state is None else initial_state.astype(x.dtype)
    given = (x, filters, skip, tail_BVD, segments)
    x, filters, skip, tail_BVD, segments = vary.together(given)
    batch, length, channels = x.shape
    before = filters.shape[0] - 1
    if tail_BVD is None:
        tail_BVD = jnp.zeros((batch, before, channels), x.dtype)
    whole_BUD, numbers = _behind(tail_BVD, x, segments)
    if length == 1:
        y_BTD = _one_token(x, filters, skip, tail_BVD, segments)
    elif initial_state is None:
        y_BTD = _convolve(_form(), x, filters, skip, segments)
    else:
        y_BTD = _convolve(_form(), whole_BUD, filters, skip, numbers)[:, before:]
        if segments is not None:
            y_BTD = jnp.where(packed.is_real(segments)[..., None], y_BTD, 0)
    return y_BTD, _last(whole_BUD, numbers, before)


def _form() -> str:
    return "matmul" if setting.target() in setting.GENERATIONS.values() else "fft"


def _behind(tail_BVD, x_BTD, segments):
    """Rows with the tail put before their first token, behind any padding; their segments."""
    before = tail_BVD.shape[1]
    whole_BUD = jnp.concatenate([tail_BVD, x_BTD], axis=1)
    if segments is None or before == 0:
        return whole_BUD, segments
    real = packed.is_real(segments)
    begin = jnp.argmax(real, axis=1, keepdims=True)
    number = jnp.take_along_axis(segments, begin, axis=1)
    at = jnp.arange(whole_BUD.shape[1], dtype=jnp.int32) - begin
    moved_BUD = jnp.take_along_axis(tail_BVD, jnp.clip(at, 0, before - 1)[..., None], axis=1)
    whole_BUD = jnp.where((at < before)[..., None], moved_BUD, whole_BUD)
    # The tail of a row of padding alone is a document as well, and stays.
    tails = jnp.where(at < 0, 0, jnp.maximum(number, 1))
    numbers = jnp.where(at < before, tails, jnp.pad(segments, ((0, 0), (before, 0))))
    return whole_BUD, numbers


def _last(whole_BUD, numbers, before):
    """The last L-1 inputs of the last document; where it is shorter, zeros stand before it."""
    if numbers is None or before == 0:
        return whole_BUD[:, whole_BUD.shape[1] - before :]
    real, document = packed.is_real(numbers), packed.ordinals(numbers)
    mine = real & (document == document[:, -1:])
    end = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1, keepdims=True)
    at = end + jnp.arange(1 - before, 1, dtype=end.dtype)
    return jnp.take_along_axis(jnp.where(mine[..., None], whole_BUD, 0), at[..., None], axis=1)


def _one_token(x_BTD, filters, skip, tail_BVD, segments):
    """The filters' product with the tail: no transform."""
    accumulator = sum_type(x_BTD)
    taps_LD, now_BD = filters.astype(accumulator), x_BTD[:, 0].astype(accumulator)
    y_BD = taps_LD[0] * now_BD
    y_BD = y_BD + jnp.sum(taps_LD[:0:-1] * tail_BVD.astype(accumulator), axis=1)
    if skip is not None:
        y_BD = y_BD + skip.astype(accumulator) * now_BD
    if segments is not None:
        y_BD = jnp.where(packed.is_real(segments), y_BD, 0)
    return y_BD[:, None].astype(x_BTD.dtype)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.checkpoint, static_argnums=0)
def _convolve(form, x_BTD, filters, skip, segments):
    accumulator = sum_type(x_BTD)
    wide_BTD, taps_LD = x_BTD.astype(accumulator), filters.astype(accumulator)
    if segments is not None:
        wide_BTD = jnp.where(packed.is_real(segments)[..., None], wide_BTD, 0)
    y_BTD, _ = short.short_conv(wide_BTD, taps_LD[:BASE][::-1], segments=segments)
    if min(x_BTD.shape[1], filters.shape[0]) > BASE:
        y_BTD = y_BTD + _far(form, wide_BTD, taps_LD, segments)
    if skip is not None:
        y_BTD = y_BTD + skip.astype(accumulator) * wide_BTD
    return y_BTD.astype(x_BTD.dtype)


def _far(form, x_BTD, taps_LD, segments):
    """What inputs BASE or more tokens back add, by blocks of ever more tokens."""
    far_LD = jnp.where((jnp.arange(taps_LD.shape[0]) < BASE)[:, None], 0, taps_LD)
    y_BTD, size = jnp.zeros_like(x_BTD), BASE
    while size < x_BTD.shape[1]:
        blocks = min(BLOCKS[form], -(-x_BTD.shape[1] // size))
        y_BTD = y_BTD + _between(form, x_BTD, far_LD, segments, size, blocks)
        size *= BLOCKS[form]
    return y_BTD


def _between(form, x_BTD, taps_LD, segments, size, blocks):
    """What blocks of `size` tokens add to the later ones of each `blocks` in a row.

    Filters shorter than a block reach only from its last `near` tokens to as many of the next.
    """
    length, taps = x_BTD.shape[1], taps_LD.shape[0]
    groups = -(-(length - size) // (size * blocks))
    near = min(size, 1 << (taps - 2).bit_length())
    x_BGRSD = _cut(x_BTD, groups, blocks, size)[:, :, :-1, size - near :]
    leaving = into_BGRS1 = None
    if segments is not None:
        document = _cut(packed.ordinals(segments), groups, blocks, size)
        real = _cut(packed.is_real(segments), groups, blocks, size)
        leaving = document[:, :, :-1, -1]
        from_BGRS = real[:, :, :-1] & (document[:, :, :-1] == leaving[..., None])
        into_BGRS = real[:, :, 1:] & (document[:, :, 1:] == leaving[..., None])
        x_BGRSD = jnp.where(from_BGRS[..., size - near :, None], x_BGRSD, 0)
        into_BGRS1 = into_BGRS[..., :near, None]
    lags = min(blocks - 1, -(-(taps - 1) // near))
    halves_KSD = _fit(taps_LD, 0, (lags + 1) * near).reshape(lags + 1, near, -1)
    windows_KSD = jnp.concatenate([halves_KSD[:-1], halves_KSD[1:]], axis=1)
    y_BGRSD: Any = fourier.toeplitz(x_BGRSD, windows_KSD, leaving, form)
    if into_BGRS1 is not None:
        y_BGRSD = jnp.where(into_BGRS1, y_BGRSD, 0)
    y_BGRSD = jnp.pad(y_BGRSD, ((0, 0), (0, 0), (1, 0), (0, size - near), (0, 0)))
    return _fit(y_BGRSD.reshape(x_BTD.shape[0], -1, x_BTD.shape[2]), 1, length)


def _cut(rows, groups, blocks, size):
    """(B, T, ...) as (B, groups, blocks, size, ...), padded or shortened."""
    fitted = _fit(rows, 1, groups * blocks * size)
    return fitted.reshape(rows.shape[0], groups, blocks, size, *rows.shape[2:])


def _fit(array, axis, length):
    """The first `length` entries of an axis, with zeros behind where there are fewer."""
    missing = max(length - array.shape[axis], 0)
    pads = [(0, missing if n == axis else 0) for n in range(array.ndim)]
    return jax.lax.slice_in_dim(jnp.pad(array, pads), 0, length, axis=axis)
