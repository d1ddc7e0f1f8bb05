"""The short convolution as its equation reads: one token at a time, carrying the tail."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import reference
from kernels.products import sum_type


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    activation: str = "none",
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """The sum of `kernels.short_conv`, one `lax.scan` over time."""
    wide = sum_type(x)
    batch, _, channels = x.shape
    taps_WD = weight.astype(wide)

    def step(tail_BVD, token):
        (x_BD,) = token
        window_BWD = jnp.concatenate([tail_BVD, x_BD[:, None]], axis=1)
        y_BD = jnp.sum(taps_WD * window_BWD, axis=1)
        if bias is not None:
            y_BD = y_BD + bias.astype(wide)
        if activation == "silu":
            y_BD = y_BD * jax.nn.sigmoid(y_BD)
        return window_BWD[:, 1:], y_BD

    shape = (batch, weight.shape[0] - 1, channels)
    tail_BVD = reference.first_state(initial_state, shape, x.dtype).astype(wide)
    y_BTD, tail_BVD = reference.over_time(step, tail_BVD, (x,), segments)
    return y_BTD.astype(x.dtype), tail_BVD.astype(x.dtype)
