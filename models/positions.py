"""Absolute positions, for mixers that are blind to order: waves added to the embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import cache, weights


def build(kind: str, width: int, rngs: nnx.Rngs, start: float) -> "Waves | None":
    """The module of a kind, "none" or "sinusoidal"; see `Waves`."""
    return Waves(width, rngs, start) if kind == "sinusoidal" else None


class Waves(nnx.Module):
    """w * waves of each token's position in its document, w a learned weight a channel.

    The waves have a mean square of 1/2: with the weights sqrt(2) `start` they are as large as an
    embedding of standard deviation `start`.
    """

    def __init__(self, width: int, rngs: nnx.Rngs, start: float):
        self.size = weights.filled(rngs, 2**0.5 * start, (width,), ("embed",))

    @jax.named_scope("positions")
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        before: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], Int[Array, " B"]]:
        """In float32, and the tokens of each row's last document; `before` are those so far."""
        batch, count = tokens.shape
        before_B = jnp.zeros(batch, jnp.int32) if before is None else before
        position_BT, after_B = cache.document_positions(before_B, segments, count)
        return self.size[...] * sinusoids(position_BT, *self.size.shape), after_B


def sinusoids(
    positions: Int[Array, "B T"], width: int, base: float = 10_000.0
) -> Float[Array, "B T D"]:
    """sin(positions * base^(-2i/D)) in the first half, their cosines after (arXiv 1706.03762, 3.5).

    In float32. The paper has sines and cosines in turn; with a weight a channel that is the same.
    """
    half = -(-width // 2)
    angle = positions[..., None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]
