"""The usual block: a token mixer, then perhaps a channel mixer, each added to the residual stream.

Norms stand before each mixer (pre-norm, arXiv 2002.04745), after each sum (post-norm, as in the
first Transformer, arXiv 1706.03762), or on both sides of each mixer (sandwich, arXiv 2105.13290,
also Gemma 2's).
"""

import dataclasses
from typing import Any, Literal

from flax import nnx

from models import layers, mixer
from models.parts import sublayer
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """`mixer` and `channel` are Configs of architectures; channel=None leaves the second out."""

    mixer: Any
    channel: Any = None
    norm_eps: float = 1e-6
    norm: Literal["pre", "post", "sandwich"] = "pre"

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module."""
        return Block(self, width, rngs)


class Block(sublayer.Chain, mixer.Block):
    """x <- x + f(norm(x)) (pre), norm(x + f(x)) (post) or x + norm(f(norm(x))) (sandwich)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        configs = [part for part in (config.mixer, config.channel) if part is not None]
        self.where, eps = config.norm, config.norm_eps
        if self.where == "post":
            self.parts = nnx.List([part.build(width, rngs) for part in configs])
        else:
            self.parts = sublayer.sublayers(configs, width, rngs, eps)
        after = [] if self.where == "pre" else configs
        self.norms = nnx.List([layers.RMSNorm(width, rngs, eps) for _ in after])

    def __call__(self, x, *, segments=None, state=None):
        olds, new = sublayer.before(state, self.parts), []
        for i, (part, old) in enumerate(zip(self.parts, olds, strict=True)):
            y, after = part(x, segments=segments, state=old)
            if self.where == "sandwich":
                y = self.norms[i](y)
            x = self.norms[i](x + y) if self.where == "post" else x + y
            x = constrain(x, "batch", "time", "embed")
            new.append(after)
        return x, tuple(new)
