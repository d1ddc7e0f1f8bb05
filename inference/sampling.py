"""What to write next: a rule that turns the logits of the next token into an id."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rule = Callable[[Float[Array, "B V"], jax.Array], Int[Array, " B"]]


def rule(temperature: float = 1.0, vocabulary: int = 0) -> Rule:
    """Ids from softmax(logits / temperature), by a key; temperature 0 takes the largest logit.

    Ids from `vocabulary` on are never drawn (0: all may be), however likely the model holds them.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative. Use 0 (greedy) or more.")
    if vocabulary < 0:
        raise ValueError(f"vocabulary={vocabulary} is negative. Use 0 (all ids) or at least 1.")

    def draw(logits, key):
        known = logits[:, :vocabulary] if vocabulary else logits
        if temperature == 0:
            return jnp.argmax(known, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, known / temperature).astype(jnp.int32)

    return draw
