"""Softmax attention: the public operations, their rules and their checks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
from kernels import segments as packed


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
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """o_t = sum_s softmax_s(score_ts) v_s over the keys s that t sees; score_ts = scale q_t . k_s.

    Attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245): H is a multiple of
    G, and query head h reads key head h // (H / G). A query sees the keys of its own document; if
    causal, none after itself; with window > 0, only the last `window` positions of the row, itself
    included. Padding sees nothing and is seen by nothing: its output and gradients are exactly
    zero.

    softcap > 0 makes of a score softcap tanh(score / softcap) (Gemma 2, arXiv:2408.00118, section
    2). `log_forget` <= 0, finite, then adds to score_ts the sum of log_forget_i over s < i <= t
    (forgetting attention, arXiv:2503.02130, eq. 10), accurate however long and strong the gates
    are; it needs causal. `sinks`, one logit a head, joins the softmax as a key that every query
    sees and whose value is zero (gpt-oss, arXiv:2508.10925; the effect: arXiv:2309.17453).

    scale=None is K**-0.5. Scores and softmax are float32 (float64 for float64 inputs), the output
    has v's dtype. Differentiable (reverse mode) in q, k, v, sinks and log_forget; between the
    passes only the inputs, the output in float32 and a few numbers a query are kept. Raises
    ValueError on shapes that do not fit, a negative window or softcap, a window or log_forget
    without causal and a scale that is not positive.
    """
    check_heads(q, k, v)
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"k has (batch, time) {k.shape[:2]}; it must be q's, {q.shape[:2]} "
            f"(cached_attention takes keys of another length)."
        )
    packed.check(segments, q.shape[0], q.shape[1])
    check_window(window, causal)
    if log_forget is not None and not causal:
        raise ValueError(
            "log_forget is given with causal=False; forgetting needs causal=True "
            "(or use log_forget=None)."
        )
    check_head_numbers("log_forget", log_forget, q.shape[:3])
    check_head_numbers("sinks", sinks, q.shape[2:3])
    softcap = check_softcap(softcap)
    scale = check_scale(scale, q)
    run = dispatch.choose("attention", "attention", impl)
    return run(
        q,
        k,
        v,
        segments=segments,
        causal=causal,
        window=window,
        sinks=sinks,
        softcap=softcap,
        log_forget=log_forget,
        scale=scale,
    )


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
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """`attention` of tokens at `positions` to the slots of a cache, in any order.

    A slot is visible when its position is from 0 (-1 marks an empty slot) up to the query's, less
    than `window` before it if window > 0, and of the query's segment where segments are given
    (segment 0 sees nothing). Here equal numbers mean one document: a number must not come back for
    another document of the same row. A query that sees nothing gets exactly zero, with zero
    gradients.

    sinks and softcap are those of `attention`; after the cap, score_ts += bias_q_t + bias_k_s. With
    c the running sum of log_forget from any one token of the row, bias_q = c and bias_k = -c are
    its forgetting; a token nearby keeps their digits: counted from the newest token, the bias of a
    slot is the sum of all gates after it, to which every new token adds its own, and bias_q is 0.

    scale=None is K**-0.5. Scores and softmax are float32 (float64 for float64 inputs), the output
    has v's dtype. Differentiable in q, k, v, sinks and the biases. Raises ValueError on shapes that
    do not fit, on one of segments and kv_segments without the other, on a negative window or
    softcap and on a scale that is not positive.
    """
    check_heads(q, k, v)
    check_cache(q, k, positions, kv_positions, segments, kv_segments)
    check_window(window)
    check_head_numbers("bias_q", bias_q, q.shape[:3])
    check_head_numbers("bias_k", bias_k, (*k.shape[:2], q.shape[2]))
    check_head_numbers("sinks", sinks, q.shape[2:3])
    softcap = check_softcap(softcap)
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
        sinks=sinks,
        softcap=softcap,
        bias_q=bias_q,
        bias_k=bias_k,
        scale=scale,
    )


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Raise unless q is (B, T, H, K), k (., S, G, K), v (., S, G, V), floating, and G divides H."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        checks.whole(name, array, "(batch, time, heads, dim)")
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


def check_cache(
    q: Array,
    k: Array,
    positions: Array,
    kv_positions: Array,
    segments: Array | None,
    kv_segments: Array | None,
) -> None:
    """Raise unless a cache has q's rows, and integers (B, T) or (B, S) for every token and slot.

    Segments may be left out, but not one of the two alone.
    """
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch size {k.shape[0]}; it must be q's, {q.shape[0]}.")
    for name, array, legal in (
        ("positions", positions, q.shape[:2]),
        ("kv_positions", kv_positions, k.shape[:2]),
        ("segments", segments, q.shape[:2]),
        ("kv_segments", kv_segments, k.shape[:2]),
    ):
        if array is None:
            continue
        if array.shape != legal or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {array.shape} and dtype {array.dtype}; it must be {legal} int32."
            )
    if (segments is None) != (kv_segments is None):
        given, missing = ("kv_segments", "segments")[:: 1 if segments is None else -1]
        raise ValueError(f"{given} is given without {missing}; give both or neither.")


def check_window(window: int, causal: bool = True) -> None:
    """Raise unless window is 0 (off), or positive and causal."""
    if window < 0:
        raise ValueError(f"window is {window}; it must be 0 (off) or a positive number of tokens.")
    if window and not causal:
        raise ValueError(
            f"window is {window} with causal=False; a window needs causal=True (or use window=0)."
        )


def check_head_numbers(name: str, array: Array | None, legal: tuple[int, ...]) -> None:
    """Raise unless `array` is None or floating and of the shape `legal`, heads last."""
    if array is None:
        return
    if array.shape != legal or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; it must be {legal} floating, "
            f"one number a head of q."
        )


def check_softcap(softcap: float) -> float:
    """The cap as a number; raise unless it is 0 (off) or positive."""
    if not softcap >= 0:
        raise ValueError(f"softcap is {softcap}; it must be 0 (off) or positive, as 50.0.")
    return float(softcap)


def check_scale(scale: float | None, q: Array) -> float:
    """The scale as a number, K**-0.5 if None; raise unless it is positive."""
    if scale is None:
        return q.shape[3] ** -0.5
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive, as {q.shape[3] ** -0.5:.4g}.")
    return float(scale)
