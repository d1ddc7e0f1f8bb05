"""The diagonal linear recurrence as the papers write it: one step a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed


def linear_scan(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The recurrence of `kernels.linear_scan`, one `lax.scan` over time."""
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
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
