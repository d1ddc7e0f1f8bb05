"""The long convolution as its equation reads: one token at a time, carrying the tail."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
from kernels.products import sum_type


def long_conv(
    x: Float[Array, "B T D"],
    filters: Float[Array, "L D"],
    skip: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B L-1 D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B L-1 D"]]:
    """The sum of `kernels.long_conv`, one `lax.scan` over time."""
    wide = sum_type(x)
    batch, _, channels = x.shape
    taps_LD = filters.astype(wide)[::-1]  # oldest input first, as in the window

    def step(tail_BVD, token):
        (x_BD,) = token
        window_BLD = jnp.concatenate([tail_BVD, x_BD[:, None]], axis=1)
        y_BD = jnp.sum(taps_LD * window_BLD, axis=1)
        if skip is not None:
            y_BD = y_BD + skip.astype(wide) * x_BD
        return window_BLD[:, 1:], y_BD

    shape = (batch, filters.shape[0] - 1, channels)
    tail_BVD = reference.first_state(initial_state, shape, x.dtype).astype(wide)
    y_BTD, tail_BVD = reference.over_time(step, tail_BVD, (x,), segments)
    return y_BTD.astype(x.dtype), tail_BVD.astype(x.dtype)
