"""The diagonal linear recurrences as the papers write them: one step a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels.products import sum_type


def linear_scan(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The recurrence of `kernels.linear_scan`, one `lax.scan` over time."""
    accumulator = sum_type(x)
    batch, length, width = x.shape
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, width), accumulator)

    real_BT1 = packed.is_real(segments)[..., None]

    def step(state_BD, inputs):
        x_BD, g_BD, start = inputs
        before_BD = jnp.where(start[:, None], 0, state_BD)
        after_BD = jnp.exp(g_BD) * before_BD + x_BD
        return after_BD, after_BD

    inputs = (
        jnp.moveaxis(jnp.where(real_BT1, x, 0).astype(accumulator), 1, 0),
        jnp.moveaxis(jnp.where(real_BT1, log_decay, 0).astype(accumulator), 1, 0),
        packed.starts(segments).T,
    )
    final_state, h_TBD = jax.lax.scan(step, initial_state.astype(accumulator), inputs)
    h_BTD = jnp.where(real_BT1, jnp.moveaxis(h_TBD, 0, 1), 0)
    return h_BTD.astype(x.dtype), final_state


def complex_linear_scan(
    x_real: Float[Array, "B T D"],
    x_imag: Float[Array, "B T D"],
    log_decay: Float[Array, "..."],
    phase: Float[Array, "..."],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B 2 D"] | None = None,
) -> tuple[tuple[Float[Array, "B T D"], Float[Array, "B T D"]], Float[Array, "B 2 D"]]:
    """The recurrence of `kernels.complex_linear_scan`, one `lax.scan` over time."""
    accumulator = sum_type(x_real)
    batch, length, width = x_real.shape
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, 2, width), accumulator)

    real_BT1 = packed.is_real(segments)[..., None]

    def rows(array):
        masked = jnp.where(real_BT1, jnp.broadcast_to(array, x_real.shape).astype(accumulator), 0)
        return jnp.moveaxis(masked, 1, 0)

    def step(state_B2D, inputs):
        x_real_BD, x_imag_BD, cos_BD, sin_BD, start = inputs
        before_B2D = jnp.where(start[:, None, None], 0, state_B2D)
        real, imag = before_B2D[:, 0], before_B2D[:, 1]
        after_B2D = jnp.stack(
            [
                cos_BD * real - sin_BD * imag + x_real_BD,
                cos_BD * imag + sin_BD * real + x_imag_BD,
            ],
            axis=1,
        )
        return after_B2D, after_B2D

    decay_TBD, phase_TBD = jnp.exp(rows(log_decay)), rows(phase)
    cos_TBD, sin_TBD = decay_TBD * jnp.cos(phase_TBD), decay_TBD * jnp.sin(phase_TBD)
    inputs = (rows(x_real), rows(x_imag), cos_TBD, sin_TBD, packed.starts(segments).T)
    final_state, h_TB2D = jax.lax.scan(step, initial_state.astype(accumulator), inputs)
    h_BTD2 = jnp.where(real_BT1[..., None], jnp.moveaxis(h_TB2D, (0, 2), (1, 3)), 0)
    h_BTD2 = h_BTD2.astype(x_real.dtype)
    return (h_BTD2[..., 0], h_BTD2[..., 1]), final_state
