"""FLOPs that block-sparse attention needs: its lists, not the reference's full matrix, tell."""

import math
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from kernels.block_sparse_attention.lists import distinct, reach


def block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    indices: Any,
    *,
    block: int,
    query_block: int = 0,
    segments: object = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
) -> int:
    """2 B H P (K + V) for P pairs of a query and a key of the blocks that its list names.

    A chosen block counts whole. NumPy lists are counted as they are; of others only the shape is
    known, so a query block names as many blocks as its list has entries, or as many as it can see
    if these are fewer. A row counts as one document.
    """
    (batch, length, heads, key_dim), query_block = q.shape, query_block or block
    first, end = reach(length, query_block, block, causal, window)
    starts = np.arange(len(first)) * query_block
    queries = np.minimum(query_block, length - starts)
    if isinstance(indices, np.ndarray):
        blocks = math.ceil(length / block)
        named = (distinct(indices, first, end, blocks) != blocks).sum(-1).mean((0, 1))
    else:
        named = np.minimum(end - first, indices.shape[3])
    pairs = float((queries * np.minimum(named * block, length)).sum())
    return round(2 * batch * heads * pairs * (key_dim + v.shape[3]))


def cached_block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Any,
    *,
    block: int,
    positions: object,
    kv_positions: object,
    query_block: int = 1,
    segments: object = None,
    kv_segments: object = None,
    window: int = 0,
    scale: float | None = None,
) -> int:
    """2 B T H P (K + V) for the P slots of as many blocks as a list has entries."""
    slots = min(indices.shape[3] * block, k.shape[1])
    return 2 * q.shape[0] * q.shape[1] * q.shape[2] * slots * (q.shape[3] + v.shape[3])
