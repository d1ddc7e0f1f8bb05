"""One block of the residual stream: a token mixer, then perhaps a channel mixer, pre-normed."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import layers, mixer
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """`mixer` and `channel` are Configs of architectures; channel=None leaves the second out."""

    mixer: Any
    channel: Any = None
    norm_eps: float = 1e-6

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module."""
        return Block(self, width, rngs)


class Block(mixer.Mixer):
    """x <- x + mixer(norm(x)); x <- x + channel(norm(x)) (arXiv 2002.04745, pre-norm)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        parts = [part for part in (config.mixer, config.channel) if part is not None]
        self.norms = nnx.List([layers.RMSNorm(width, rngs, config.norm_eps) for _ in parts])
        self.mixers = nnx.List([part.build(width, rngs) for part in parts])

    def __call__(self, x, *, segments=None, state=None):
        states = state if state is not None else (None,) * len(self.mixers)
        new = []
        for norm, part, old in zip(self.norms, self.mixers, states, strict=True):
            y, after = part(norm(x), segments=segments, state=old)
            x = constrain(x + y, "batch", "time", "embed")
            new.append(after)
        return x, tuple(new)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """One state for each part."""
        return tuple(part.init_state(batch, capacity, dtype) for part in self.mixers)
