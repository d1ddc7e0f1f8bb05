"""The selective scan as the paper writes it: one step a token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
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
    wide = sum_type(x)
    batch, _, width = x.shape
    if D is None:
        D = jnp.zeros(width, wide)
    A_DN, skip_D = A.astype(wide), D.astype(wide)

    def step(h_BDN, token):
        x_BD, dt_BD, b_BN, c_BN = token
        decay_BDN = jnp.exp(dt_BD[..., None] * A_DN)
        after_BDN = decay_BDN * h_BDN + (dt_BD * x_BD)[..., None] * b_BN[:, None]
        return after_BDN, jnp.einsum("bdn,bn->bd", after_BDN, c_BN) + skip_D * x_BD

    initial = reference.first_state(initial_state, (batch, width, A.shape[1]), wide)
    y_BTD, final_state = reference.over_time(step, initial, (x, dt, Bm, Cm), segments)
    return y_BTD.astype(x.dtype), final_state
