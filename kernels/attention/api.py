"""Softmax attention: the public operations, their rules and their checks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
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
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys s that t sees.

    Attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245): H is a multiple of
    G, and query head h reads key head h // (H / G). A query sees the keys of its own document; if
    causal, none after itself; with window > 0, only the last `window` positions of the row, itself
    included. Padding sees nothing and is seen by nothing: its output and gradients are exactly
    zero.

    scale=None is K**-0.5. Scores and softmax are float32 (float64 for float64 inputs), the output
    has v's dtype. Differentiable (reverse mode) in q, k and v; between the passes only the inputs,
    the output in float32 and one number a query are kept. Raises ValueError on shapes that do not
    fit, a negative window, a window without causal and a scale that is not positive.
    """
    check_heads(q, k, v)
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"k has (batch, time) {k.shape[:2]}; it must be q's, {q.shape[:2]} "
            f"(cached_attention takes keys of another length)."
        )
    packed.check(segments, q.shape[0], q.shape[1])
    check_window(window)
    if window and not causal:
        raise ValueError(
            f"window is {window} with causal=False; a window needs causal=True (or use window=0)."
        )
    scale = check_scale(scale, q)
    run = dispatch.choose("attention", "attention", impl)
    return run(q, k, v, segments=segments, causal=causal, window=window, scale=scale)


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
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """`attention` of tokens at `positions` to the slots of a cache, in any order.

    A slot is visible when its position is from 0 (-1 marks an empty slot) up to the query's, less
    than `window` before it if window > 0, and of the query's segment where segments are given
    (segment 0 sees nothing). Here equal numbers mean one document: a number must not come back for
    another document of the same row. A query that sees nothing gets exactly zero, with zero
    gradients.

    scale=None is K**-0.5. Scores and softmax are float32 (float64 for float64 inputs), the output
    has v's dtype. Differentiable in q, k and v. Raises ValueError on shapes that do not fit, on
    one of segments and kv_segments without the other, on a negative window and on a scale that is
    not positive.
    """
    check_heads(q, k, v)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch size {k.shape[0]}; it must be q's, {q.shape[0]}.")
    for name, array, legal in (
        ("positions", positions, q.shape[:2]),
        ("kv_positions", kv_positions, k.shape[:2]),
    ):
        if array.shape != legal or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {array.shape} and dtype {array.dtype}; it must be {legal} int32."
            )
    if (segments is None) != (kv_segments is None):
        given, missing = ("kv_segments", "segments")[:: 1 if segments is None else -1]
        raise ValueError(f"{given} is given without {missing}; give both or neither.")
    packed.check(segments, q.shape[0], q.shape[1])
    check_kv_segments(kv_segments, k)
    check_window(window)
    scale = check_scale(scale, q)
    run = dispatch.choose("attention", "cached_attention", impl)
    return run(
        q,
        k,
        v,
        positions=positions,
        kv_positions=kv_positions,
        segments=segments,
        kv_segments=kv_segments,
        window=window,
        scale=scale,
    )


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Raise unless q is (B, T, H, K), k (., S, G, K), v (., S, G, V), floating, and G divides H."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}, rank {array.ndim}; it must have rank 4: "
                f"(batch, time, heads, dim)."
            )
        if 0 in array.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; every size, time included, must be at least 1."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; it must be floating, as float32.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v has (batch, time, heads) {v.shape[:3]}; it must be k's, {k.shape[:3]}."
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has key dim {k.shape[3]}; it must be q's, {q.shape[3]}.")
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups:
        nearest = max(1, round(heads / groups)) * groups
        raise ValueError(
            f"q has {heads} heads and k {groups}; q's must be a multiple of k's, "
            f"the nearest being {nearest}."
        )


def check_kv_segments(kv_segments: Array | None, k: Array) -> None:
    """Raise unless `kv_segments` is None or an integer array (B, S) like k."""
    if kv_segments is None:
        return
    if kv_segments.shape != k.shape[:2] or not jnp.issubdtype(kv_segments.dtype, jnp.integer):
        raise ValueError(
            f"kv_segments has shape {kv_segments.shape} and dtype {kv_segments.dtype}; "
            f"it must be {k.shape[:2]} int32, like k's (batch, time)."
        )


def check_window(window: int) -> None:
    """Raise unless window is 0 (off) or positive."""
    if window < 0:
        raise ValueError(f"window is {window}; it must be 0 (off) or a positive number of tokens.")


def check_scale(scale: float | None, q: Array) -> float:
    """The scale as a number, K**-0.5 if None; raise unless it is positive."""
    if scale is None:
        return q.shape[3] ** -0.5
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive, as {q.shape[3] ** -0.5:.4g}.")
    return float(scale)
