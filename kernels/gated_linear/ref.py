"""Gated linear attention as the papers write it: one step a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
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
    accumulator = sum_type(v)
    batch, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    scale = float(key_dim**-0.5 if scale is None else scale)
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), accumulator)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay.astype(accumulator), (batch, length, heads))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    bonus = None if bonus is None else bonus.astype(accumulator)

    def step(s_BHKV, inputs):
        q_BHK, k_BHK, v_BHV, g_BHK, real, start = inputs
        before_BHKV = jnp.where(start[:, None, None, None], 0, s_BHKV)
        written_BHKV = jnp.einsum("bhk,bhv->bhkv", k_BHK, v_BHV)
        after_BHKV = jnp.exp(g_BHK)[..., None] * before_BHKV + written_BHKV
        read_BHKV = after_BHKV
        if bonus is not None:
            read_BHKV = before_BHKV + bonus[:, :, None] * written_BHKV
        o_BHV = scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, read_BHKV)
        real = real[:, None, None]
        return jnp.where(real[..., None], after_BHKV, s_BHKV), jnp.where(real, o_BHV, 0)

    def per_step(x_BTxx, repeats=1):
        return jnp.moveaxis(jnp.repeat(x_BTxx, repeats, axis=2).astype(accumulator), 1, 0)

    inputs = (
        per_step(q, heads // groups),
        per_step(k, heads // groups),
        per_step(v),
        per_step(log_decay),
        packed.is_real(segments).T,
        packed.starts(segments).T,
    )
    final_state, o_TBHV = jax.lax.scan(step, initial_state.astype(accumulator), inputs)
    return jnp.moveaxis(o_TBHV, 0, 1).astype(v.dtype), final_state
