"""Block-sparse attention by its definition: the full matrix of scores, masked by the lists."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels import segments as packed
from kernels.products import sum_type


def block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    indices: Int[Array | np.ndarray, "C L N M"],
    *,
    block: int,
    query_block: int = 0,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the keys of the chosen blocks that the query may see."""
    length = q.shape[1]
    time = jnp.arange(length)
    distance_TS = time[:, None] - time
    visible_BTS = jnp.ones((1, length, length), bool)
    if causal:
        visible_BTS &= distance_TS >= 0
    if window:
        visible_BTS &= distance_TS < window
    if segments is not None:
        document, real = packed.ordinals(segments), packed.is_real(segments)
        visible_BTS &= document[:, :, None] == document[:, None, :]
        visible_BTS &= real[:, :, None] & real[:, None, :]
    chosen_CLTS = _chosen(indices, length, length, query_block or block, block)
    return _softmax_attention(q, k, v, chosen_CLTS & visible_BTS[:, None], scale)


def cached_block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Int[Array | np.ndarray, "C L N M"],
    *,
    block: int,
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    query_block: int = 1,
    segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the filled slots of chosen blocks up to the query's position."""
    distance_BTS = positions[:, :, None] - kv_positions[:, None, :]
    visible_BTS = (kv_positions[:, None, :] >= 0) & (distance_BTS >= 0)
    if window:
        visible_BTS &= distance_BTS < window
    if segments is not None and kv_segments is not None:
        visible_BTS &= segments[:, :, None] == kv_segments[:, None, :]
        visible_BTS &= segments[:, :, None] != 0
    chosen_CLTS = _chosen(indices, q.shape[1], k.shape[1], query_block, block)
    return _softmax_attention(q, k, v, chosen_CLTS & visible_BTS[:, None], scale)


def _chosen(indices, length, slots, query_block, block) -> Bool[Array, "C L T S"]:
    """Whether the list of a query's block names a key's block."""
    blocks = -(-slots // block)
    indices = jnp.asarray(indices)
    places = jnp.where(indices < 0, blocks, indices)
    row, head, query = jnp.indices(places.shape[:3], sparse=True)
    named_CLNS = jnp.zeros((*places.shape[:3], blocks), bool)
    named_CLNS = named_CLNS.at[row[..., None], head[..., None], query[..., None], places].set(
        True, mode="drop"
    )
    chosen_CLTS = jnp.repeat(jnp.repeat(named_CLNS, query_block, axis=2), block, axis=3)
    return chosen_CLTS[:, :, :length, :slots]


def _softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible_CLTS: Bool[Array, "C L T S"],
    scale: float | None,
) -> Float[Array, "B T H V"]:
    """The formula with key heads and lists repeated; a row that sees nothing is zero."""
    wide = sum_type(q, k, v)
    heads = q.shape[2]
    k_BSHK = jnp.repeat(k.astype(wide), heads // k.shape[2], axis=2)
    v_BSHV = jnp.repeat(v.astype(wide), heads // v.shape[2], axis=2)
    visible_BHTS = jnp.repeat(visible_CLTS, heads // visible_CLTS.shape[1], axis=1)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    s_BHTS = scale * jnp.einsum("bthk,bshk->bhts", q.astype(wide), k_BSHK)
    # A finite stand-in for -inf: rows without a visible key must not make NaN gradients.
    s_BHTS = jnp.where(visible_BHTS, s_BHTS, jnp.finfo(wide).min)
    p_BHTS = jnp.where(visible_BHTS, jnp.exp(s_BHTS - s_BHTS.max(-1, keepdims=True)), 0)
    sum_BHT1 = p_BHTS.sum(-1, keepdims=True)
    p_BHTS /= jnp.where(sum_BHT1 > 0, sum_BHT1, 1)
    return jnp.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV).astype(v.dtype)
