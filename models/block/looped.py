"""One block's weights run several times: depth without parameters.

Layer sharing of MobileLLM (arXiv 2402.14905, section 2.3: each block twice in a row, while its
weights are in fast memory) and looped depth as in Universal Transformers (arXiv 1807.03819).
Notable: every pass keeps its own state, since every pass reads another stream.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer
from models.parts import sublayer


@dataclasses.dataclass
class Config:
    """`block` is the Config of a whole block; its weights run `times` times."""

    block: Any
    times: int = 2

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module; ValueError for less than one pass."""
        return Block(self, width, rngs)


class Block(mixer.Block):
    """x <- block(x), `times` times with the same weights."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.times < 1:
            raise ValueError(f"times={config.times} must be at least 1.")
        self.block = config.block.build(width, rngs)
        self.times, self.causal = config.times, self.block.causal

    def __call__(self, x, *, segments=None, state=None):
        new = []
        for old in sublayer.before(state, range(self.times)):
            x, after = self.block(x, segments=segments, state=old)
            new.append(after)
        return x, tuple(new)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """A state for each pass."""
        return tuple(self.block.init_state(batch, capacity, dtype) for _ in range(self.times))
