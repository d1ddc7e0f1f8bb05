"""Softmax attention over chosen blocks of keys: the public operations and their checks."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels import segments as packed
from kernels.attention.api import check_cache, check_heads, check_scale, check_window


def block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    indices: Int[Array | np.ndarray, "B H N M"],
    *,
    block: int,
    query_block: int = 0,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys s of the blocks chosen for t.

    Block i holds the keys i * block to (i + 1) * block - 1 of the row; the queries
    n * query_block to (n + 1) * query_block - 1 share the list indices[b, h, n] of M blocks, and
    query_block=0 is block. A list is a set: the order of its entries says nothing, a block named
    twice counts once, and every entry outside 0 to ceil(T / block) - 1, as -1, names no block.
    Lists are shared where the axis is 1 (rows: axis 0; all heads: axis 1); axis 1 may also be G,
    the heads of a group then sharing a list, or H. A list in a NumPy array is known when the
    program is traced: only the blocks that it names are computed, where an array of the program
    costs its M entries whatever they hold.

    Within the chosen blocks a query sees the keys of its own document; if causal, none after
    itself; with window > 0, only the last `window` positions of the row, itself included. Padding
    sees nothing. A query that sees nothing gives exactly zero, with zero gradients.

    Serves fixed patterns (arXiv:1904.10509, arXiv:2004.05150, arXiv:2007.14062; see `patterns`) and
    computed choices (arXiv:2502.11089, section 3.3.2; arXiv:2502.13189): no gradient flows through
    the choice. scale=None is K**-0.5. Scores and softmax are float32 (float64 for float64 inputs),
    the output has v's dtype. Differentiable (reverse mode) in q, k and v. Raises ValueError on
    shapes that do not fit, on blocks below 1, on NumPy lists that name a block which is not there,
    on a negative window, a window without causal and a scale that is not positive.
    """
    check_heads(q, k, v)
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"k has (batch, time) {k.shape[:2]}; it must be q's, {q.shape[:2]} "
            f"(cached_block_sparse_attention takes keys of another length)."
        )
    packed.check(segments, q.shape[0], q.shape[1])
    if query_block < 0:
        raise ValueError(f"query_block is {query_block}; it must be 0 (as block) or at least 1.")
    indices = _check_lists(q, k, indices, block, query_block or block)
    check_window(window, causal)
    run = dispatch.choose("block_sparse_attention", "block_sparse_attention", impl)
    return run(
        q,
        k,
        v,
        indices,
        block=block,
        query_block=query_block or block,
        segments=segments,
        causal=causal,
        window=window,
        scale=check_scale(scale, q),
    )


def cached_block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Int[Array | np.ndarray, "B H N M"],
    *,
    block: int,
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    query_block: int = 1,
    segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int = 0,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """`block_sparse_attention` of tokens at `positions` to chosen blocks of a cache's slots.

    Block i holds the slots i * block to (i + 1) * block - 1; list n serves the given queries
    n * query_block and on. A slot is visible when its position is from 0 (-1 marks an empty slot)
    up to the query's, less than `window` before it if window > 0, and of the query's segment where
    segments are given (segment 0 sees nothing). Here equal numbers mean one document: a number
    must not come back for another document of the same row. The rest, and the errors, are as in
    `block_sparse_attention`; one of segments and kv_segments without the other raises ValueError.
    """
    check_heads(q, k, v)
    check_cache(q, k, positions, kv_positions, segments, kv_segments)
    if query_block < 1:
        raise ValueError(f"query_block is {query_block}; it must be at least 1.")
    indices = _check_lists(q, k, indices, block, query_block)
    check_window(window)
    run = dispatch.choose("block_sparse_attention", "cached_block_sparse_attention", impl)
    return run(
        q,
        k,
        v,
        indices,
        block=block,
        positions=positions,
        kv_positions=kv_positions,
        query_block=query_block,
        segments=segments,
        kv_segments=kv_segments,
        window=window,
        scale=check_scale(scale, q),
    )


def _check_lists(q: Array, k: Array, indices, block: int, query_block: int):
    """The lists as int32; raise unless they and the blocks fit q and k."""
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1 key.")
    if indices.ndim != 4:
        raise ValueError(
            f"indices has shape {indices.shape}, rank {indices.ndim}; it must have rank 4: "
            f"(batch or 1, heads or 1, query blocks, entries)."
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices has dtype {indices.dtype}; it must be an integer, as int32.")
    count = math.ceil(q.shape[1] / query_block)
    legal = {
        0: ("rows", (1, q.shape[0])),
        1: ("heads", tuple(sorted({1, k.shape[2], q.shape[2]}))),
        2: ("query blocks", (count,)),
    }
    for axis, (what, sizes) in legal.items():
        if indices.shape[axis] not in sizes:
            listed = " or ".join(str(size) for size in dict.fromkeys(sizes))
            raise ValueError(
                f"indices has {indices.shape[axis]} {what} (axis {axis}); it must be {listed}."
            )
    if indices.shape[3] == 0:
        raise ValueError("indices has lists of 0 entries; they must have at least 1 (-1: none).")
    blocks = math.ceil(k.shape[1] / block)
    if isinstance(indices, np.ndarray) and not (-1 <= indices.min() <= indices.max() < blocks):
        wrong = indices[(indices < -1) | (indices >= blocks)][0]
        raise ValueError(
            f"indices names block {wrong}; blocks are 0 to {blocks - 1}, and -1 is none."
        )
    return indices.astype(np.int32)
