"""The short convolution as its equation reads: one token at a time, carrying the tail."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
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
    accumulator = sum_type(x)
    batch, length, channels = x.shape
    weight_WD = weight.astype(accumulator)
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, weight.shape[0] - 1, channels), x.dtype)

    real_BT = packed.is_real(segments)

    def step(tail_BVD, inputs):
        x_BD, real, start = inputs
        before_BVD = jnp.where(start[:, None, None], 0, tail_BVD)
        window_BWD = jnp.concatenate([before_BVD, x_BD[:, None]], axis=1)
        y_BD = jnp.sum(weight_WD * window_BWD, axis=1)
        if bias is not None:
            y_BD = y_BD + bias.astype(accumulator)
        if activation == "silu":
            y_BD = y_BD * jax.nn.sigmoid(y_BD)
        kept_BVD = jnp.where(real[:, None, None], window_BWD[:, 1:], tail_BVD)
        return kept_BVD, jnp.where(real[:, None], y_BD, 0)

    inputs = (
        jnp.moveaxis(jnp.where(real_BT[..., None], x, 0).astype(accumulator), 1, 0),
        real_BT.T,
        packed.starts(segments).T,
    )
    initial = initial_state.astype(x.dtype).astype(accumulator)
    tail_BVD, y_TBD = jax.lax.scan(step, initial, inputs)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x.dtype), tail_BVD.astype(x.dtype)
