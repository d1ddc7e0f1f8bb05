"""The (gated) delta rule and `dplr` as the papers write them: one step a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels.products import sum_type


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "..."] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence of `kernels.delta_rule`, one `lax.scan` over time."""
    accumulator = sum_type(v)
    batch, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    scale = float(key_dim**-0.5 if scale is None else scale)
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), accumulator)
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), accumulator)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(s_BHKV, inputs):
        q_BHK, k_BHK, v_BHV, beta_BH, g_BHK, real, start = inputs
        before_BHKV = jnp.where(start[:, None, None, None], 0, s_BHKV)
        decayed_BHKV = jnp.exp(g_BHK)[..., None] * before_BHKV
        recalled_BHV = jnp.einsum("bhk,bhkv->bhv", k_BHK, decayed_BHKV)
        written_BHV = beta_BH[..., None] * (v_BHV - recalled_BHV)
        after_BHKV = decayed_BHKV + jnp.einsum("bhk,bhv->bhkv", k_BHK, written_BHV)
        o_BHV = scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, after_BHKV)
        real = real[:, None, None]
        return jnp.where(real[..., None], after_BHKV, s_BHKV), jnp.where(real, o_BHV, 0)

    def per_step(x_BTxx, repeats=1):
        return jnp.moveaxis(jnp.repeat(x_BTxx, repeats, axis=2).astype(accumulator), 1, 0)

    inputs = (
        per_step(q, heads // groups),
        per_step(k, heads // groups),
        per_step(v),
        per_step(beta),
        per_step(log_decay),
        packed.is_real(segments).T,
        packed.starts(segments).T,
    )
    final_state, o_TBHV = jax.lax.scan(step, initial_state.astype(accumulator), inputs)
    return jnp.moveaxis(o_TBHV, 0, 1).astype(v.dtype), final_state


def dplr(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence of `kernels.delta_rule.dplr`, one `lax.scan` over time."""
    accumulator = sum_type(v)
    batch, length, heads, key_dim = q.shape
    scale = float(key_dim**-0.5 if scale is None else scale)
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[3]), accumulator)

    def step(s_BHKV, inputs):
        q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, g_BHK, real, start = inputs
        before_BHKV = jnp.where(start[:, None, None, None], 0, s_BHKV)
        recalled_BHV = jnp.einsum("bhk,bhkv->bhv", a_BHK, before_BHKV)
        after_BHKV = jnp.exp(g_BHK)[..., None] * before_BHKV
        after_BHKV += jnp.einsum("bhk,bhv->bhkv", b_BHK, recalled_BHV)
        after_BHKV += jnp.einsum("bhk,bhv->bhkv", k_BHK, v_BHV)
        o_BHV = scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, after_BHKV)
        real = real[:, None, None]
        return jnp.where(real[..., None], after_BHKV, s_BHKV), jnp.where(real, o_BHV, 0)

    given = (q, k, v, a, b, log_decay)
    inputs = tuple(jnp.moveaxis(x_BTHX.astype(accumulator), 1, 0) for x_BTHX in given)
    inputs += (packed.is_real(segments).T, packed.starts(segments).T)
    final_state, o_TBHV = jax.lax.scan(step, initial_state.astype(accumulator), inputs)
    return jnp.moveaxis(o_TBHV, 0, 1).astype(v.dtype), final_state
