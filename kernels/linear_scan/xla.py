"""The diagonal linear recurrence as a loop in place, with its own reverse loop.

Per token there is one multiply-add a channel, so memory traffic is the whole cost. A loop that
slices (B, T, D) where it lies needs no transpose to time-major order, which `lax.scan` does; the
reverse loop keeps decays and states and never the per-step residuals of an automatic derivative.
A tree of combinations (`lax.associative_scan`) moves several times the bytes and loses on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import vary
from kernels.linear_scan.complex_xla import complex_linear_scan
from kernels.products import sum_type

__all__ = ["complex_linear_scan", "linear_scan"]


def linear_scan(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The recurrence of `kernels.linear_scan`, with boundaries folded into the decays."""
    accumulator = sum_type(x)
    input_BTD = x.astype(accumulator)
    g_BTD = log_decay.astype(accumulator)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), accumulator)
    if segments is None:
        h_BTD, final_state = recur(jnp.exp(g_BTD), input_BTD, initial_state.astype(accumulator))
        return h_BTD.astype(x.dtype), final_state
    real_BT1 = packed.is_real(segments)[..., None]
    start_BT1 = packed.starts(segments)[..., None]
    # Masked before the exponential, so that whatever padding holds reaches no derivative.
    decay_BTD = jnp.where(start_BT1, 0, jnp.exp(jnp.where(real_BT1, g_BTD, 0)))
    input_BTD = jnp.where(real_BT1, input_BTD, 0)
    h_BTD, final_state = recur(decay_BTD, input_BTD, initial_state.astype(accumulator))
    return jnp.where(real_BT1, h_BTD, 0).astype(x.dtype), final_state


def recur(
    decay: Float[Array, "B T D"], x: Float[Array, "B T D"], initial: Float[Array, "B D"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """h_t = decay_t h_{t-1} + x_t; a single token, as in decoding, needs no loop."""
    if x.shape[1] == 1:
        h_BD = decay[:, 0] * initial + x[:, 0]
        return h_BD[:, None], h_BD
    return _recur(*vary.together((decay, x, initial)))


@jax.custom_vjp
def _recur(decay_BTD, x_BTD, initial_BD):
    return _forward(decay_BTD, x_BTD, initial_BD)[0]


def _forward(decay_BTD, x_BTD, initial_BD):
    def step(t, carry):
        h_BD, h_BTD = carry
        h_BD = _at(decay_BTD, t) * h_BD + _at(x_BTD, t)
        return h_BD, _put(h_BTD, h_BD, t)

    final_BD, h_BTD = jax.lax.fori_loop(
        0, x_BTD.shape[1], step, (initial_BD, jnp.zeros_like(x_BTD))
    )
    return (h_BTD, final_BD), (decay_BTD, h_BTD, initial_BD)


def _backward(residuals, cotangents):
    """With l_t the slope of h_t: l_t = dh_t + decay_{t+1} l_{t+1}; ddecay_t = l_t h_{t-1}."""
    decay_BTD, h_BTD, initial_BD = residuals
    dh_BTD, dfinal_BD = cotangents
    length = h_BTD.shape[1]

    def step(i, carry):
        arriving_BD, slope_BTD = carry
        t = length - 1 - i
        slope_BD = _at(dh_BTD, t) + arriving_BD
        return _at(decay_BTD, t) * slope_BD, _put(slope_BTD, slope_BD, t)

    dinitial_BD, slope_BTD = jax.lax.fori_loop(0, length, step, (dfinal_BD, jnp.zeros_like(h_BTD)))
    before_BTD = jnp.concatenate([initial_BD[:, None], h_BTD[:, :-1]], axis=1)
    return slope_BTD * before_BTD, slope_BTD, dinitial_BD


_recur.defvjp(_forward, _backward)


def _at(array_BTD, t):
    return jax.lax.dynamic_slice_in_dim(array_BTD, t, 1, axis=1)[:, 0]


def _put(array_BTD, value_BD, t):
    return jax.lax.dynamic_update_slice_in_dim(array_BTD, value_BD[:, None], t, axis=1)
