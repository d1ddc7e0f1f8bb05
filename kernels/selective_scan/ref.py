"""The selective scan as the paper writes it: one step a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels.products import sum_type


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    Bm: Float[Array, "B T N"],
    Cm: Float[Array, "B T N"],
    D: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The recurrence of `kernels.selective_scan`, one `lax.scan` over time."""
    accumulator = sum_type(x)
    batch, length, width = x.shape
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, width, A.shape[1]), accumulator)
    if D is None:
        D = jnp.zeros(width, accumulator)
    A_DN, skip_D = A.astype(accumulator), D.astype(accumulator)

    real_BT1 = packed.is_real(segments)[..., None]

    def rows(array):
        return jnp.moveaxis(jnp.where(real_BT1, array, 0).astype(accumulator), 1, 0)

    def step(state_BDN, inputs):
        x_BD, dt_BD, b_BN, c_BN, start = inputs
        before_BDN = jnp.where(start[:, None, None], 0, state_BDN)
        decay_BDN = jnp.exp(dt_BD[..., None] * A_DN)
        after_BDN = decay_BDN * before_BDN + (dt_BD * x_BD)[..., None] * b_BN[:, None]
        y_BD = jnp.einsum("bdn,bn->bd", after_BDN, c_BN) + skip_D * x_BD
        return after_BDN, y_BD

    inputs = (rows(x), rows(dt), rows(Bm), rows(Cm), packed.starts(segments).T)
    final_state, y_TBD = jax.lax.scan(step, initial_state.astype(accumulator), inputs)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x.dtype), final_state
