"""The complex diagonal recurrence as a loop in place, with its own reverse loop.

As in the real one memory traffic is the whole cost, so factors that are constant over time stay
(D,) rows through both loops, and their slopes are summed without a (B, T, D) array of factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import vary
from kernels.linear_scan.rotation import Factor, conjugate, one_part, times, two_parts
from kernels.products import sum_type

Pair = tuple[Array, Array]


class Passing(NamedTuple):
    """What constant factors are multiplied by, and what is added, as (B, T, 1) numbers."""

    on: Array  # 1 at real tokens that continue their document
    hold: Array  # 1 at padding, which leaves the state as it is


def complex_linear_scan(
    x_real: Float[Array, "B T D"],
    x_imag: Float[Array, "B T D"],
    log_decay: Float[Array, "..."],
    phase: Float[Array, "..."],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B 2 D"] | None = None,
) -> tuple[Pair, Float[Array, "B 2 D"]]:
    """The recurrence of `kernels.complex_linear_scan`, with boundaries folded into the factors."""
    accumulator = sum_type(x_real)
    batch, length, width = x_real.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, 2, width), accumulator)
    start = initial_state.astype(accumulator)
    x = (x_real.astype(accumulator), x_imag.astype(accumulator))
    if segments is not None:
        x = _keep(packed.is_real(segments)[..., None], x)
    factor, passing = _factors(log_decay.astype(accumulator), phase.astype(accumulator), segments)
    h, final = recur(factor, x, (start[:, 0], start[:, 1]), passing)
    if segments is not None:
        h = _keep(packed.is_real(segments)[..., None], h)
    h = (h[0].astype(x_real.dtype), h[1].astype(x_real.dtype))
    return h, jnp.stack(final, axis=1)


def _keep(mask: Array, pair: Pair) -> Pair:
    return jnp.where(mask, pair[0], 0), jnp.where(mask, pair[1], 0)


def _factors(g, phase, segments) -> tuple[Factor, Passing | None]:
    """Factors a step with boundaries in them, or constant ones and what boundaries do to them."""
    constant = g.ndim == 1
    whole = two_parts if constant and g.dtype != jnp.float64 else one_part
    if segments is None:
        return whole(g, phase), None
    real_BT1 = packed.is_real(segments)[..., None]
    start_BT1 = packed.starts(segments)[..., None]
    if constant:
        on_BT1 = real_BT1 & ~start_BT1
        return whole(g, phase), Passing(on_BT1.astype(g.dtype), (~real_BT1).astype(g.dtype))
    # Masked before the exponential, so that whatever padding holds reaches no derivative.
    factor = one_part(*_keep(real_BT1, (g, phase)))
    return Factor(*_keep(~start_BT1, (factor.real, factor.imag))), None


def recur(factor: Factor, x: Pair, initial: Pair, passing: Passing | None) -> tuple[Pair, Pair]:
    """h_t = factor_t h_{t-1} + x_t; a single token, as in decoding, needs no loop."""
    if x[0].shape[1] == 1:
        h = times(_row(factor, passing, 0), initial, (x[0][:, 0], x[1][:, 0]))
        return (h[0][:, None], h[1][:, None]), h
    return _recur(*vary.together((factor, x, initial, passing)))


@jax.custom_vjp
def _recur(factor, x, initial, passing):
    return _forward(factor, x, initial, passing)[0]


def _forward(factor, x, initial, passing):
    def step(t, carry):
        h, written = carry
        h = times(_row(factor, passing, t), h, _at(x, t))
        return h, _put(written, h, t)

    zeros = (jnp.zeros_like(x[0]), jnp.zeros_like(x[1]))
    final, h = jax.lax.fori_loop(0, x[0].shape[1], step, (initial, zeros))
    return (h, final), (factor, h, initial, passing)


def _backward(residuals, cotangents):
    """l_t = dh_t + conj(factor_{t+1}) l_{t+1}; the slope of factor_t is l_t conj(h_{t-1})."""
    factor, h, initial, passing = residuals
    dh, dfinal = cotangents
    length = h[0].shape[1]
    back = conjugate(factor)

    def step(i, carry):
        arriving, written = carry
        t = length - 1 - i
        row = _at(dh, t)
        slope = (row[0] + arriving[0], row[1] + arriving[1])
        still = (jnp.zeros_like(slope[0]), jnp.zeros_like(slope[1]))
        return times(_row(back, passing, t), slope, still), _put(written, slope, t)

    zeros = (jnp.zeros_like(h[0]), jnp.zeros_like(h[1]))
    dinitial, slope = jax.lax.fori_loop(0, length, step, (dfinal, zeros))
    before = [
        jnp.concatenate([first[:, None], part[:, :-1]], axis=1)
        for first, part in zip(initial, h, strict=True)
    ]
    real = slope[0] * before[0] + slope[1] * before[1]
    imag = slope[1] * before[0] - slope[0] * before[1]
    if factor.real.ndim == 1:
        if passing is not None:
            real, imag = passing.on * real, passing.on * imag
        real, imag = real.sum((0, 1)), imag.sum((0, 1))
    # Fine parts get no slope: the whole factor's is given to the coarse ones.
    fine = None if factor.fine_real is None else jnp.zeros_like(factor.fine_real)
    return Factor(real, imag, fine, fine), slope, dinitial, None


_recur.defvjp(_forward, _backward)


def _row(factor: Factor, passing: Passing | None, t) -> Factor:
    """The factor of token t."""
    if factor.real.ndim == 3:
        return Factor(*_at((factor.real, factor.imag), t))
    if passing is None:
        return factor
    on, hold = _at(passing, t)
    row = jax.tree.map(lambda part: on * part, factor)
    return row._replace(real=row.real + hold)


def _at(pair, t) -> Pair:
    first, second = (jax.lax.dynamic_slice_in_dim(part, t, 1, axis=1)[:, 0] for part in pair)
    return first, second


def _put(arrays, values, t):
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(array, value[:, None], t, axis=1)
        for array, value in zip(arrays, values, strict=True)
    )
