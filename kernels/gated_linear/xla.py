"""Gated linear attention by chunks: matmuls inside a chunk, one state between chunks."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import chunks
from kernels import segments as packed
from kernels.gated_linear.scalar_gate import scalar_chunk
from kernels.gated_linear.vector_gate import vector_chunk
from kernels.products import HIGHEST, sum_type


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
    """The operation of `kernels.gated_linear`, chunk by chunk; one token goes straight through."""
    accumulator = sum_type(v)
    batch, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    scale = key_dim**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), accumulator)
    s_BHKV = initial_state.astype(accumulator)
    if log_decay.ndim == 1:
        wide = log_decay.astype(accumulator)  # its gradient is summed over the whole batch
        log_decay = jnp.broadcast_to(wide, (batch, length, heads))
    lag = 0 if bonus is None else 1
    if length == 1:
        o_BTHV, s_BHKV = _one_token(q, k, v, log_decay, segments, s_BHKV, scale, lag)
    else:
        inputs = (q, k, v, log_decay)
        o_BTHV, s_BHKV = _by_chunks(inputs, segments, s_BHKV, scale, lag)
    if bonus is not None:
        own_BTHV = own_token(q, k, v, bonus, segments, scale)
        o_BTHV = o_BTHV.astype(accumulator) + own_BTHV
    return o_BTHV.astype(v.dtype), s_BHKV


def own_token(q, k, v, bonus, segments, scale):
    """What a token reads of its own write, scale q_t^T diag(u) k_t v_t^T; zero at padding."""
    accumulator = sum_type(v)
    batch, length, groups, key_dim = q.shape
    qk_BTGK = scale * q.astype(accumulator) * k.astype(accumulator)
    u_GRK = bonus.astype(accumulator).reshape(groups, -1, key_dim)
    weight_BTGR = jnp.einsum("btgk,grk->btgr", qk_BTGK, u_GRK, precision=HIGHEST)
    weight_BTH1 = weight_BTGR.reshape(batch, length, -1, 1)
    if segments is not None:
        weight_BTH1 = jnp.where(packed.is_real(segments)[..., None, None], weight_BTH1, 0)
    return weight_BTH1 * v.astype(accumulator)


def _by_chunks(inputs, segments, s_BHKV, scale, lag):
    q, _, v, log_decay = inputs
    _, length, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    chunk = chunks.length_for(length, _longest(length, heads // groups * key_dim * value_dim))
    inputs = chunks.pad(inputs, chunk)
    within = chunks.boundaries(chunks.pad(segments, chunk), chunk)
    if log_decay.ndim == 3:
        body = functools.partial(scalar_chunk, scale, lag)
        s_BHKV, out = chunks.scan_by_groups(body, chunk, groups, s_BHKV, inputs, within)
    else:
        body = functools.partial(vector_chunk, scale, lag)
        s_BHKV, out = chunks.scan(body, chunk, s_BHKV, inputs, within)
    return out[:, :length], s_BHKV


def _longest(length: int, group_state: int) -> int:
    """Measured on CPUs: 32, unless reading and writing states would weigh more than the pairs."""
    return 64 if group_state > (1 << 13 if length > 1024 else 1 << 16) else 32


def _one_token(q, k, v, log_decay, segments, s_BHKV, scale, lag):
    """One update of the state and one read: no chunk, no loop."""
    accumulator = s_BHKV.dtype
    repeats = v.shape[2] // q.shape[2]
    q_BHK = scale * jnp.repeat(q[:, 0], repeats, axis=1).astype(accumulator)
    k_BHK = jnp.repeat(k[:, 0], repeats, axis=1).astype(accumulator)
    v_BHV = v[:, 0].astype(accumulator)
    decay = jnp.exp(log_decay[:, 0].astype(accumulator))
    decay = decay[..., None] if decay.ndim == 3 else decay[..., None, None]
    after_BHKV = decay * s_BHKV + k_BHK[..., None] * v_BHV[..., None, :]
    o_BHV = jnp.einsum("bhk,bhkv->bhv", q_BHK, s_BHKV if lag else after_BHKV)
    return chunks.one_token(o_BHV, after_BHKV, segments, s_BHKV, v.dtype)
