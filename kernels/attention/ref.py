"""Attention by its definition: the full matrix of scores, masked, differentiated by JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import segments as packed
from kernels.products import sum_type


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: Float[Array, " H"] | None = None,
    softcap: float = 0.0,
    log_forget: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the keys of the query's document."""
    time = jnp.arange(q.shape[1])
    seen_BTS = seen_in_row(q.shape[1], causal, window, segments)
    bias_BHTS = None
    if log_forget is not None:
        gate_BTH = log_forget.astype(sum_type(q, k, v))
        if segments is not None:
            gate_BTH = jnp.where(packed.is_real(segments)[..., None], gate_BTH, 0)
        gate_BHT1 = gate_BTH.swapaxes(1, 2)[..., None]
        bias_BHTS = jnp.cumsum(jnp.where(time[:, None] > time, gate_BHT1, 0), axis=2)
    return softmax_attention(q, k, v, seen_BTS[:, None], scale, softcap, sinks, bias_BHTS)


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
    sinks: Float[Array, " H"] | None = None,
    softcap: float = 0.0,
    bias_q: Float[Array, "B T H"] | None = None,
    bias_k: Float[Array, "B S H"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the filled slots up to the query's position."""
    seen_BTS = seen_in_slots(positions, kv_positions, window, segments, kv_segments)
    bias_BHTS = jnp.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), sum_type(q, k, v))
    if bias_q is not None:
        bias_BHTS += bias_q.swapaxes(1, 2)[..., None]
    if bias_k is not None:
        bias_BHTS += bias_k.swapaxes(1, 2)[:, :, None]
    return softmax_attention(q, k, v, seen_BTS[:, None], scale, softcap, sinks, bias_BHTS)


def seen_in_row(
    length: int, causal: bool, window: int, segments: Int[Array, "B T"] | None
) -> Bool[Array, "#B T S"]:
    """Which keys of its row a query may see."""
    time = jnp.arange(length)
    distance_TS = time[:, None] - time
    seen_BTS = jnp.ones((1, length, length), bool)
    if causal:
        seen_BTS &= distance_TS >= 0
    if window:
        seen_BTS &= distance_TS < window
    if segments is not None:
        document, real = packed.ordinals(segments), packed.is_real(segments)
        seen_BTS &= document[:, :, None] == document[:, None, :]
        seen_BTS &= real[:, :, None] & real[:, None, :]
    return seen_BTS


def seen_in_slots(
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    window: int,
    segments: Int[Array, "B T"] | None,
    kv_segments: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"]:
    """Which slots of a cache a query may see: filled ones up to its own position."""
    distance_BTS = positions[:, :, None] - kv_positions[:, None, :]
    seen_BTS = (kv_positions[:, None, :] >= 0) & (distance_BTS >= 0)
    if window:
        seen_BTS &= distance_BTS < window
    if segments is not None and kv_segments is not None:
        seen_BTS &= segments[:, :, None] == kv_segments[:, None, :]
        seen_BTS &= segments[:, :, None] != 0
    return seen_BTS


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    seen: Bool[Array, "#B #H T S"],
    scale: float | None,
    softcap: float = 0.0,
    sinks: Float[Array, " H"] | None = None,
    bias_BHTS: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H V"]:
    """The formula with the key heads repeated; a row that sees nothing is zero."""
    wide = sum_type(q, k, v)
    repeats = q.shape[2] // k.shape[2]
    k_BSHK = jnp.repeat(k.astype(wide), repeats, axis=2)
    v_BSHV = jnp.repeat(v.astype(wide), repeats, axis=2)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    s_BHTS = scale * jnp.einsum("bthk,bshk->bhts", q.astype(wide), k_BSHK)
    if softcap:
        s_BHTS = softcap * jnp.tanh(s_BHTS / softcap)
    if bias_BHTS is not None:
        s_BHTS += bias_BHTS
    seen_BHTS = jnp.broadcast_to(seen, s_BHTS.shape)
    if sinks is not None:  # one more key, seen by every query, whose value is zero
        sink_BHT1 = jnp.broadcast_to(sinks[:, None, None], (*s_BHTS.shape[:3], 1))
        s_BHTS = jnp.concatenate([s_BHTS, sink_BHT1], axis=-1)
        seen_BHTS = jnp.pad(seen_BHTS, ((0, 0),) * 3 + ((0, 1),), constant_values=True)
        v_BSHV = jnp.pad(v_BSHV, ((0, 0), (0, 1), (0, 0), (0, 0)))
    # A finite stand-in for -inf: rows without a visible key must not make NaN gradients.
    s_BHTS = jnp.where(seen_BHTS, s_BHTS, jnp.finfo(wide).min)
    p_BHTS = jnp.where(seen_BHTS, jnp.exp(s_BHTS - s_BHTS.max(-1, keepdims=True)), 0)
    sum_BHT1 = p_BHTS.sum(-1, keepdims=True)
    p_BHTS /= jnp.where(sum_BHT1 > 0, sum_BHT1, 1)
    return jnp.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV).astype(v.dtype)
