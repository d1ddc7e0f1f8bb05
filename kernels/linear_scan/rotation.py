"""Complex factors exp(log_decay + i phase) without complex numbers, exact enough for long rows.

A constant factor that is rounded to float32 is wrong by the same angle at every step, and after T
steps the state has turned T times that angle too far. `two_parts` therefore gives it as
`coarse + fine`: coarse has eleven bits, fine holds what is missing to about 30 bits, and neither
product is small enough to be lost when it is added. What remains are rounding errors without a
sign of their own, which grow with the square root of T. Factors that change from step to step have
such errors anyway, and `one_part` is enough.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TURN = 2 * np.pi
ANGLES = 512
GRAIN = 1024.0  # coarse parts are multiples of its inverse
# Below this decay fewer than two steps are remembered, and one part is as good as two.
SHORT = -0.5


def _steps(step: float, first: int, second: int) -> tuple[float, float, float]:
    """`step` as a sum of three numbers, the first so short that many multiples of it are exact."""
    head = np.round(step * 2**first) / 2**first
    middle = np.round((step - head) * 2**second) / 2**second
    return float(head), float(middle), float(step - head - middle)


WHOLE, QUARTER = _steps(TURN, 7, 19), _steps(TURN / 4, 7, 19)
STEP = _steps(TURN / ANGLES, 15, 27)
FAR = 256.0  # beyond it multiples of STEP's first part are no longer exact
# Columns: coarse cosine, coarse sine, fine cosine, fine sine.
_EXACT = np.stack([f(np.arange(ANGLES) * TURN / ANGLES) for f in (np.cos, np.sin)], axis=1)
_COARSE = np.round(_EXACT * GRAIN) / GRAIN
TABLE = np.concatenate([_COARSE, _EXACT - _COARSE], axis=1)


class Factor(NamedTuple):
    """A complex factor; `fine` parts are added to it unless they are None."""

    real: Float[Array, "..."]
    imag: Float[Array, "..."]
    fine_real: Float[Array, "..."] | None = None
    fine_imag: Float[Array, "..."] | None = None


@jax.custom_vjp
def one_part(log_decay: Float[Array, "..."], phase: Float[Array, "..."]) -> Factor:
    """exp(log_decay + i phase), each part rounded once."""
    decay = jnp.exp(log_decay)
    cos, sin = cos_and_sin(phase)
    return Factor(decay * cos, decay * sin)


@jax.custom_vjp
def two_parts(log_decay: Float[Array, " D"], phase: Float[Array, " D"]) -> Factor:
    """exp(log_decay + i phase) from float32 arrays; its slope is that of the coarse parts."""
    phase = jnp.where(jnp.abs(phase) > FAR, _reduce(phase, WHOLE)[1], phase)
    nearest, rest = _reduce(phase, STEP)
    row = jnp.asarray(TABLE, jnp.float32)[jnp.mod(nearest, ANGLES).astype(jnp.int32)]
    cos, sin, fine_cos, fine_sin = (row[:, n] for n in range(4))
    # |rest| <= pi / ANGLES: two terms of either series are exact to 1e-13.
    square = rest * rest
    sin_rest = rest * (1 - square / 6)
    cos_less_one = square * (square / 24 - 0.5)
    all_cos, all_sin = cos + fine_cos, sin + fine_sin
    fine_cos += all_cos * cos_less_one - all_sin * sin_rest
    fine_sin += all_sin * cos_less_one + all_cos * sin_rest
    less_one = jnp.expm1(log_decay)
    short = one_part(log_decay, phase)
    is_short = log_decay < SHORT
    return Factor(
        jnp.where(is_short, 0, cos),
        jnp.where(is_short, 0, sin),
        jnp.where(is_short, short.real, fine_cos + less_one * (cos + fine_cos)),
        jnp.where(is_short, short.imag, fine_sin + less_one * (sin + fine_sin)),
    )


def _one_forward(log_decay, phase):
    factor = one_part(log_decay, phase)
    return factor, factor


def _two_forward(log_decay, phase):
    factor = two_parts(log_decay, phase)
    return factor, Factor(factor.real + factor.fine_real, factor.imag + factor.fine_imag)


def _backward(factor, slope):
    """The factor f has d f / d log_decay = f and d f / d phase = i f."""
    return (
        slope.real * factor.real + slope.imag * factor.imag,
        slope.imag * factor.real - slope.real * factor.imag,
    )


one_part.defvjp(_one_forward, _backward)
two_parts.defvjp(_two_forward, _backward)


def cos_and_sin(phase: Float[Array, "..."]) -> tuple[Array, Array]:
    """Both to one unit in the last place for float32 phases up to 1e3, without a slow path."""
    if phase.dtype == jnp.float64:
        return jnp.cos(phase), jnp.sin(phase)
    nearest, rest = _reduce(phase, QUARTER)
    square = rest * rest
    series = square * (1 / 362880) - 1 / 5040
    sin = rest + rest * square * (square * (square * series + 1 / 120) - 1 / 6)
    series = square * (1 / 40320) - 1 / 720
    cos = 1 + square * (square * (square * series + 1 / 24) - 0.5)
    quarter = nearest.astype(jnp.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    cos_is_negative = (quarter == 1) | (quarter == 2)
    return jnp.where(cos_is_negative, -cos, cos), jnp.where(quarter >= 2, -sin, sin)


def _reduce(phase, parts):
    """phase = n * sum(parts) + rest, n an integer and rest at most half a step."""
    nearest = jnp.round(phase * (1 / sum(parts)))
    rest = phase
    for part in parts:
        rest = rest - nearest * part
    return nearest, rest


def times(factor: Factor, z: tuple[Array, Array], add: tuple[Array, Array]) -> tuple[Array, Array]:
    """factor * z + add, complex numbers as pairs (real, imaginary)."""
    real, imag = z
    if factor.fine_real is not None and factor.fine_imag is not None:
        # Added to the smaller sum first: coarse products alone are as large as the state.
        add = (
            factor.fine_real * real - factor.fine_imag * imag + add[0],
            factor.fine_real * imag + factor.fine_imag * real + add[1],
        )
    return (
        factor.real * real - factor.imag * imag + add[0],
        factor.real * imag + factor.imag * real + add[1],
    )


def conjugate(factor: Factor) -> Factor:
    """The factor that turns the other way, for the reverse loop."""
    fine_imag = None if factor.fine_imag is None else -factor.fine_imag
    return Factor(factor.real, -factor.imag, factor.fine_real, fine_imag)
