"""The (gated) delta rule and `dplr` by chunks: the WY form, one state between chunks.

In a chunk the written rows u_i = beta_i (v_i - what the state recalls for k_i) depend on each other
through a unit lower triangular matrix; its inverse turns all of them into matmuls
(arXiv:2406.06484, section 3.2).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import chunks
from kernels.delta_rule.low_rank import low_rank_chunk
from kernels.delta_rule.scalar_gate import scalar_chunk
from kernels.delta_rule.vector_gate import vector_chunk
from kernels.products import sum_type

LONGEST = 32  # the chunk; measured on CPUs, where 16 is as fast and 64 slower


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
    """The operation of `kernels.delta_rule`, chunk by chunk; one token goes straight through."""
    accumulator = sum_type(v)
    batch, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    scale = key_dim**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), accumulator)
    s_BHKV = initial_state.astype(accumulator)
    if length == 1:
        return _one_token(q, k, v, beta, log_decay, segments, s_BHKV, scale)

    chunk = chunks.length_for(length, LONGEST)
    inputs = chunks.pad((q, k, v, beta, log_decay), chunk)
    within = chunks.boundaries(chunks.pad(segments, chunk), chunk)
    if log_decay is not None and log_decay.ndim == 4:
        body = functools.partial(vector_chunk, scale)
        s_BHKV, out = chunks.scan(body, chunk, s_BHKV, inputs, within)
    else:
        body = functools.partial(scalar_chunk, scale)
        s_BHKV, out = chunks.scan_by_groups(body, chunk, groups, s_BHKV, inputs, within)
    return out[:, :length], s_BHKV


def _one_token(q, k, v, beta, log_decay, segments, s_BHKV, scale):
    """One update of the state and one read: no chunk, no loop."""
    accumulator = s_BHKV.dtype
    repeats = v.shape[2] // q.shape[2]
    q_BHK = scale * jnp.repeat(q[:, 0], repeats, axis=1).astype(accumulator)
    k_BHK = jnp.repeat(k[:, 0], repeats, axis=1).astype(accumulator)
    v_BHV = v[:, 0].astype(accumulator)
    beta_BH1 = beta[:, 0, :, None].astype(accumulator)
    decayed_BHKV = s_BHKV
    if log_decay is not None:
        decay = jnp.exp(log_decay[:, 0].astype(accumulator))
        decayed_BHKV = s_BHKV * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    recalled_BHV = jnp.einsum("bhk,bhkv->bhv", k_BHK, decayed_BHKV)
    u_BHV = beta_BH1 * (v_BHV - recalled_BHV)
    after_BHKV = decayed_BHKV + k_BHK[..., None] * u_BHV[..., None, :]
    o_BHV = jnp.einsum("bhk,bhkv->bhv", q_BHK, after_BHKV)
    return chunks.one_token(o_BHV, after_BHKV, segments, s_BHKV, v.dtype)


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
    """The operation of `kernels.delta_rule.dplr`, chunk by chunk; one token goes straight."""
    accumulator = sum_type(v)
    batch, length, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[3]), accumulator)
    s_BHKV = initial_state.astype(accumulator)
    if length == 1:
        return _one_token_dplr(q, k, v, a, b, log_decay, segments, s_BHKV, scale)
    chunk = chunks.length_for(length, LONGEST)
    inputs = chunks.pad((q, k, v, a, b, log_decay), chunk)
    within = chunks.boundaries(chunks.pad(segments, chunk), chunk)
    body = functools.partial(low_rank_chunk, scale)
    s_BHKV, out = chunks.scan(body, chunk, s_BHKV, inputs, within)
    return out[:, :length], s_BHKV


def _one_token_dplr(q, k, v, a, b, log_decay, segments, s_BHKV, scale):
    """One update of the state and one read: no chunk, no loop."""
    given = (q, k, v, a, b, log_decay)
    q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, g_BHK = (x[:, 0].astype(s_BHKV.dtype) for x in given)
    r_BHV = jnp.einsum("bhk,bhkv->bhv", a_BHK, s_BHKV)
    after_BHKV = jnp.exp(g_BHK)[..., None] * s_BHKV
    after_BHKV += b_BHK[..., None] * r_BHV[..., None, :] + k_BHK[..., None] * v_BHV[..., None, :]
    o_BHV = scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, after_BHKV)
    return chunks.one_token(o_BHV, after_BHKV, segments, s_BHKV, v.dtype)
