"""Block-sparse attention by its definition: the full matrix of scores, masked by the lists."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.attention.ref import seen_in_row, seen_in_slots, softmax_attention


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
    seen_BTS = seen_in_row(length, causal, window, segments)
    chosen_CLTS = _chosen(indices, length, length, query_block or block, block)
    return _of_lists(q, k, v, chosen_CLTS & seen_BTS[:, None], scale)


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
    seen_BTS = seen_in_slots(positions, kv_positions, window, segments, kv_segments)
    chosen_CLTS = _chosen(indices, q.shape[1], k.shape[1], query_block, block)
    return _of_lists(q, k, v, chosen_CLTS & seen_BTS[:, None], scale)


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


def _of_lists(q, k, v, seen_CLTS: Bool[Array, "C L T S"], scale: float | None):
    """Softmax attention where every list serves as many heads."""
    seen_BHTS = jnp.repeat(seen_CLTS, q.shape[2] // seen_CLTS.shape[1], axis=1)
    return softmax_attention(q, k, v, seen_BHTS, scale)
