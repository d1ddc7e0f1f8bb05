"""The parallel block: both mixers read the same normed stream, and both results are added at once.

GPT-J's and PaLM's form (arXiv 2204.02311, section 2). Notable: one norm a block, and the two maps
from the stream can overlap; quality is nearly that of the serial block at scale.
"""

import dataclasses
from typing import Any

from flax import nnx

from models import layers, mixer
from models.parts import sublayer
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """Configs of a token mixer and a channel mixer."""

    mixer: Any
    channel: Any
    norm_eps: float = 1e-6

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module."""
        return Block(self, width, rngs)


class Block(sublayer.Chain, mixer.Block):
    """y = x + mixer(norm(x)) + channel(norm(x))."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        self.norm = layers.RMSNorm(width, rngs, config.norm_eps)
        self.parts = nnx.List([part.build(width, rngs) for part in (config.mixer, config.channel)])

    def __call__(self, x, *, segments=None, state=None):
        u = self.norm(x)
        new = []
        for part, old in zip(self.parts, sublayer.before(state, self.parts), strict=True):
            y, after = part(u, segments=segments, state=old)
            x = x + y
            new.append(after)
        return constrain(x, "batch", "time", "embed"), tuple(new)
