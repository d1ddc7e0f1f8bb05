"""Gated linear attention as the papers write it: one step a token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
from kernels.products import sum_type


def gated_linear(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "..."],
    *,
    bonus: Float[Array, "H K"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence of `kernels.gated_linear`, one `lax.scan` over time."""
    wide = sum_type(v)
    batch, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    scale = float(key_dim**-0.5 if scale is None else scale)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay.astype(wide), (batch, length, heads))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    bonus = None if bonus is None else bonus.astype(wide)

    def step(s_BHKV, token):
        q_BHK, k_BHK, v_BHV, g_BHK = token
        written_BHKV = jnp.einsum("bhk,bhv->bhkv", k_BHK, v_BHV)
        after_BHKV = jnp.exp(g_BHK)[..., None] * s_BHKV + written_BHKV
        read_BHKV = after_BHKV
        if bonus is not None:
            read_BHKV = s_BHKV + bonus[:, :, None] * written_BHKV
        return after_BHKV, scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, read_BHKV)

    q, k = (jnp.repeat(x, heads // groups, axis=2) for x in (q, k))
    initial = reference.first_state(initial_state, (batch, heads, key_dim, value_dim), wide)
    o_BTHV, final_state = reference.over_time(step, initial, (q, k, v, log_decay), segments)
    return o_BTHV.astype(v.dtype), final_state
