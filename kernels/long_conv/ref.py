"""The long convolution as its equation reads: one token at a time, carrying the tail."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
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
    accumulator = sum_type(x)
    batch, length, channels = x.shape
    taps_LD = filters.astype(accumulator)[::-1]  # oldest input first, as in the window
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, filters.shape[0] - 1, channels), x.dtype)

    real_BT = packed.is_real(segments)

    def step(tail_BVD, inputs):
        x_BD, real, start = inputs
        before_BVD = jnp.where(start[:, None, None], 0, tail_BVD)
        window_BLD = jnp.concatenate([before_BVD, x_BD[:, None]], axis=1)
        y_BD = jnp.sum(taps_LD * window_BLD, axis=1)
        if skip is not None:
            y_BD = y_BD + skip.astype(accumulator) * x_BD
        kept_BVD = jnp.where(real[:, None, None], window_BLD[:, 1:], tail_BVD)
        return kept_BVD, jnp.where(real[:, None], y_BD, 0)

    inputs = (
        jnp.moveaxis(jnp.where(real_BT[..., None], x, 0).astype(accumulator), 1, 0),
        real_BT.T,
        packed.starts(segments).T,
    )
    initial = initial_state.astype(x.dtype).astype(accumulator)
    tail_BVD, y_TBD = jax.lax.scan(step, initial, inputs)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x.dtype), tail_BVD.astype(x.dtype)
