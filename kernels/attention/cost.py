"""FLOPs that attention needs; the reference computes every pair and masks, so it does not tell."""

from jaxtyping import Array, Float


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: object = None,
    causal: bool = True,
    window: int = 0,
    sinks: object = None,
    softcap: float = 0.0,
    log_forget: object = None,
    scale: float | None = None,
) -> int:
    """2 B H P (K + V) for P visible pairs: T^2, T (T + 1) / 2 if causal, less with a window.

    A row counts as one document: where others begin is in the values of `segments`, not in a shape.
    Sinks, the soft cap and forgetting are no matrix products and count nothing.
    """
    batch, length, heads, key_dim = q.shape
    pairs = length**2
    if causal:
        seen = min(window or length, length)
        pairs = seen * (seen + 1) // 2 + (length - seen) * seen
    return 2 * batch * heads * pairs * (key_dim + v.shape[3])
