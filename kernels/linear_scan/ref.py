"""The diagonal linear recurrences as the papers write them: one step a token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
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

    def step(h_BD, token):
        x_BD, g_BD = token
        after_BD = jnp.exp(g_BD) * h_BD + x_BD
        return after_BD, after_BD

    initial = reference.first_state(initial_state, (x.shape[0], x.shape[2]), sum_type(x))
    h_BTD, final_state = reference.over_time(step, initial, (x, log_decay), segments)
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
    wide = sum_type(x_real)
    batch, _, width = x_real.shape

    def step(h_B2D, token):
        x_real_BD, x_imag_BD, cos_BD, sin_BD = token
        real, imag = h_B2D[:, 0], h_B2D[:, 1]
        after_B2D = jnp.stack(
            [
                cos_BD * real - sin_BD * imag + x_real_BD,
                cos_BD * imag + sin_BD * real + x_imag_BD,
            ],
            axis=1,
        )
        return after_B2D, after_B2D

    def rows(array):
        """Zero at padding before the exponential, so that no slope there is infinite."""
        rows = jnp.broadcast_to(array, x_real.shape).astype(wide)
        return rows if segments is None else jnp.where(packed.is_real(segments)[..., None], rows, 0)

    decay_BTD, phase_BTD = jnp.exp(rows(log_decay)), rows(phase)
    cos_BTD, sin_BTD = decay_BTD * jnp.cos(phase_BTD), decay_BTD * jnp.sin(phase_BTD)
    initial = reference.first_state(initial_state, (batch, 2, width), wide)
    inputs = (x_real, x_imag, cos_BTD, sin_BTD)
    h_BT2D, final_state = reference.over_time(step, initial, inputs, segments)
    h_BT2D = h_BT2D.astype(x_real.dtype)
    return (h_BT2D[:, :, 0], h_BT2D[:, :, 1]), final_state
