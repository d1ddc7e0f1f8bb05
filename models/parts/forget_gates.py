"""Forget gates of attention beside a cache: what a slot lost to all the gates after it.

A score of query t and key s has the sum of log gates over s < i <= t added (arXiv 2503.02130). A
slot keeps that sum up to the newest token of its document, so that its digits last: no difference
of two long sums is ever taken.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as boundaries
from kernels.linear_scan import linear_scan


def since(
    log_forget: Float[Array, "B T H"], segments: Int[Array, "B T"] | None
) -> Float[Array, "B T H"]:
    """Sum of the gates after each token to the end of its document in the row; padding reads 0."""
    ids = None if segments is None else segments[:, ::-1]
    backward = log_forget[:, ::-1]
    total, _ = linear_scan(backward, jnp.zeros_like(backward), segments=ids)
    after = total[:, ::-1] - log_forget
    return after if segments is None else jnp.where(_real(segments), after, 0)


def aged(
    held: Float[Array, "B S H"],
    position: Int[Array, "B S"],
    log_forget: Float[Array, "B T H"],
    segments: Int[Array, "B T"] | None,
) -> Float[Array, "B S H"]:
    """The sums `held` by slots after the row's gates: those of its first document age them."""
    if segments is not None:
        goes_on = (boundaries.ordinals(segments) == 0)[..., None] & _real(segments)
        log_forget = jnp.where(goes_on, log_forget, 0)
    filled = (position > 0)[..., None]
    return jnp.where(filled, held + jnp.sum(log_forget, axis=1, keepdims=True), 0)


def _real(segments):
    return boundaries.is_real(segments)[..., None]
