"""The (gated) delta rule and `dplr` as the papers write them: one step a token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
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
    wide = sum_type(v)
    batch, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    scale = float(key_dim**-0.5 if scale is None else scale)
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), wide)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(s_BHKV, token):
        q_BHK, k_BHK, v_BHV, beta_BH, g_BHK = token
        decayed_BHKV = jnp.exp(g_BHK)[..., None] * s_BHKV
        recalled_BHV = jnp.einsum("bhk,bhkv->bhv", k_BHK, decayed_BHKV)
        written_BHV = beta_BH[..., None] * (v_BHV - recalled_BHV)
        after_BHKV = decayed_BHKV + jnp.einsum("bhk,bhv->bhkv", k_BHK, written_BHV)
        return after_BHKV, scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, after_BHKV)

    q, k = (jnp.repeat(x, heads // groups, axis=2) for x in (q, k))
    initial = reference.first_state(initial_state, (batch, heads, key_dim, value_dim), wide)
    inputs = (q, k, v, beta, log_decay)
    o_BTHV, final_state = reference.over_time(step, initial, inputs, segments)
    return o_BTHV.astype(v.dtype), final_state


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
    batch, _, heads, key_dim = q.shape
    scale = float(key_dim**-0.5 if scale is None else scale)

    def step(s_BHKV, token):
        q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, g_BHK = token
        recalled_BHV = jnp.einsum("bhk,bhkv->bhv", a_BHK, s_BHKV)
        after_BHKV = jnp.exp(g_BHK)[..., None] * s_BHKV
        after_BHKV += jnp.einsum("bhk,bhv->bhkv", b_BHK, recalled_BHV)
        after_BHKV += jnp.einsum("bhk,bhv->bhkv", k_BHK, v_BHV)
        return after_BHKV, scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, after_BHKV)

    shape = (batch, heads, key_dim, v.shape[3])
    initial = reference.first_state(initial_state, shape, sum_type(v))
    inputs = (q, k, v, a, b, log_decay)
    o_BTHV, final_state = reference.over_time(step, initial, inputs, segments)
    return o_BTHV.astype(v.dtype), final_state
