"""Ladder residual: every layer reads the stream without the result of the layer just before it.

Ladder-Residual (arXiv 2501.06589, section 3). Notable: under tensor parallelism the sum over
devices of one layer's result then runs while the next layer computes, since that does not wait for
it.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from models import mixer
from models.parts import sublayer
from parallel.sharding import constrain


@dataclasses.dataclass
class Config(sublayer.Mixers):
    """Configs of mixers, run one after another: the longer the ladder, the more is overlapped."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module."""
        return Block(self, width, rngs)


class Block(sublayer.Chain, mixer.Block):
    """x_i = x_{i-1} + y_{i-1}, y_i = f_i(norm(x_{i-1})): y_{i-1} arrives one layer later."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        self.parts = sublayer.sublayers(config.mixers, width, rngs, config.norm_eps)

    def __call__(self, x, *, segments=None, state=None):
        late, new = jnp.zeros_like(x), []
        for part, old in zip(self.parts, sublayer.before(state, self.parts), strict=True):
            y, after = part(x, segments=segments, state=old)
            x, late = constrain(x + late, "batch", "time", "embed"), y
            new.append(after)
        return constrain(x + late, "batch", "time", "embed"), tuple(new)
