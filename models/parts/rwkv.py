"""What the RWKV generations share: the start of their token shifts and decays, by channel.

The numbers are those of the released code (RWKV-LM). They depend on a layer's position in the
stack, which a mixer does not know; the Config's `depth` in [0, 1), layer / layers, stands for it.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from models import weights

NORM_EPS = 64e-5  # of the output norm, for heads of 64


def check_depth(depth: float) -> None:
    """Raise unless depth is in [0, 1)."""
    if not 0 <= depth < 1:
        near = 0.0 if depth < 0 else 0.9
        raise ValueError(f"depth={depth} is outside [0, 1): it is layer / layers. Use {near}.")


def channels(shape: Sequence[int]):
    """0 for the first channel to 1 for the last, in the shape given."""
    count = math.prod(shape)
    return (jnp.arange(count) / max(count - 1, 1)).reshape(shape)


def mix(rngs: nnx.Rngs, width: int, powers: tuple[float, ...], raised: tuple[float, ...] = ()):
    """Weights (parts, width) of the token before: 1 - (n / width)^power - raised for channel n."""

    def init(key, shape):
        ramp = jnp.arange(width) / width
        raise_by = raised or (0.0,) * len(powers)
        return jnp.stack([1 - ramp**p - r for p, r in zip(powers, raise_by, strict=True)])

    return weights.weight(rngs, init, (len(powers), width), ("parts", "embed"))


def decay_speed(depth: float) -> weights.Initializer:
    """w of decay = exp(-exp(w)), from -6 for the first channel to -1 (RWKV-5 and 6)."""
    return lambda key, shape: -6 + 5 * channels(shape) ** (0.7 + 1.3 * depth)


def bonus(depth: float) -> weights.Initializer:
    """u, the weight of a token's own write (RWKV-5 and 6)."""

    def init(key, shape):
        wave = ((jnp.arange(math.prod(shape)) + 1) % 3 - 1).reshape(shape)
        return depth * (1 - channels(shape)) + 0.1 * wave

    return init
