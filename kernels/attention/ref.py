"""Attention by its definition: the full matrix of scores, masked, differentiated by JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import segments as packed


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the keys of the query's document."""
    batch, length = q.shape[:2]
    time = jnp.arange(length)
    distance_BTS = jnp.broadcast_to(time[:, None] - time, (batch, length, length))
    visible_BTS = jnp.ones_like(distance_BTS, bool)
    if causal:
        visible_BTS &= distance_BTS >= 0
    if window:
        visible_BTS &= distance_BTS < window
    if segments is not None:
        document, real = packed.ordinals(segments), packed.is_real(segments)
        visible_BTS &= document[:, :, None] == document[:, None, :]
        visible_BTS &= real[:, :, None] & real[:, None, :]
    return _softmax_attention(q, k, v, visible_BTS, scale)


def cached_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the filled slots up to the query's position."""
    distance_BTS = positions[:, :, None] - kv_positions[:, None, :]
    visible_BTS = (kv_positions[:, None, :] >= 0) & (distance_BTS >= 0)
    if window:
        visible_BTS &= distance_BTS < window
    if segments is not None and kv_segments is not None:
        visible_BTS &= segments[:, :, None] == kv_segments[:, None, :]
        visible_BTS &= segments[:, :, None] != 0
    return _softmax_attention(q, k, v, visible_BTS, scale)


def _softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible_BTS: Bool[Array, "B T S"],
    scale: float | None,
) -> Float[Array, "B T H V"]:
    """The formula with the key heads repeated; a row that sees nothing is zero."""
    wide = jnp.result_type(q, k, v, jnp.float32)
    repeats = q.shape[2] // k.shape[2]
    k_BSHK = jnp.repeat(k.astype(wide), repeats, axis=2)
    v_BSHV = jnp.repeat(v.astype(wide), repeats, axis=2)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    s_BHTS = scale * jnp.einsum("bthk,bshk->bhts", q.astype(wide), k_BSHK)
    visible_B1TS = visible_BTS[:, None]
    # A finite stand-in for -inf: rows without a visible key must not make NaN gradients.
    s_BHTS = jnp.where(visible_B1TS, s_BHTS, jnp.finfo(wide).min)
    p_BHTS = jnp.where(visible_B1TS, jnp.exp(s_BHTS - s_BHTS.max(-1, keepdims=True)), 0)
    sum_BHT1 = p_BHTS.sum(-1, keepdims=True)
    p_BHTS /= jnp.where(sum_BHT1 > 0, sum_BHT1, 1)
    return jnp.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV).astype(v.dtype)
