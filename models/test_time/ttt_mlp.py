"""TTT-MLP: the state is a network of two layers that takes a gradient step at every token.

Learning to (Learn at Test Time): RNNs with Expressive Hidden States (arXiv 2407.04620, sections 2.1
to 2.7). Notable: as TTT-Linear, but the inner model has a hidden layer four times as wide and a
gelu, and its largest step is a tenth. The inner loop runs in float32, where the released code has
bfloat16.
"""

import dataclasses

from flax import nnx

from models import checks
from models.parts import ttt


@dataclasses.dataclass
class Config:
    """Heads, the hidden layer, and the tokens and the largest step of an inner mini-batch."""

    heads: int = 4
    expand: int = 4  # hidden width over the head's
    batch: int = 16  # b of section 2.4: tokens whose gradients are taken at the same weights
    rate: float = 0.1  # eta_base of section 2.7; divided by the head's width
    conv: int = 4  # taps of the convolutions that tell queries from keys
    rope_base: float = 10_000.0

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, expand, batch, rate, conv or rope_base do not fit."""
        return Mixer(self, width, rngs)


CASES = {"ttt_mlp": Config()}


class Mixer(ttt.Layer):
    """f(x; W) = x + norm(gelu(x W_1 + b_1) W_2 + b_2)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.expand < 1:
            raise ValueError(f"expand={config.expand} must be at least 1; the paper uses 4.")
        settings = dataclasses.asdict(config)
        hidden = settings.pop("expand") * checks.split_heads(width, config.heads)
        super().__init__(width, rngs, hidden=(hidden,), **settings)
