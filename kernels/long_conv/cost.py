"""FLOPs that a long convolution needs; the reference sums every tap of every token."""

import math

from jaxtyping import Array, Float


def long_conv(
    x: Float[Array, "B T D"],
    filters: Float[Array, "L D"],
    skip: object = None,
    *,
    segments: object = None,
    initial_state: object = None,
) -> float:
    """The cheaper of the sum itself, 2 per tap and token, and of three transforms.

    One transform is of the filters, two are of every row, each of S = T + min(L, T) points (S =
    T + L - 1 behind a state) and real: 2.5 S log2 S; between them stand S / 2 complex products. A
    row counts as one document.
    """
    batch, length, channels = x.shape
    taps = filters.shape[0]
    reach = min(taps, length)
    if initial_state is None:
        pairs = reach * (reach + 1) // 2 + (length - reach) * reach
        points = length + reach
    else:
        pairs, points = length * taps, length + taps - 1
    transform = 2.5 * points * math.log2(max(points, 2))
    by_transform = channels * (transform + batch * (2 * transform + 3 * points))
    skipped = 0 if skip is None else 2 * batch * length * channels
    return float(min(2 * batch * channels * pairs, by_transform) + skipped)
