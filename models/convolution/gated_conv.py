"""The gated short convolution of LFM2: two gates around a convolution over three tokens.

LFM2 Technical Report (arXiv 2511.23404, section 2). Notable: its whole memory is the last two
tokens, so most layers of a hybrid can be this one; there is no activation at all.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import layers, mixer, weights


@dataclasses.dataclass
class Config:
    """`channels` convolved channels over `conv` tokens."""

    channels: int = 0  # 0: the model's width
    conv: int = 3

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for negative channels or a convolution outside 2 to 8 tokens."""
        return Mixer(self, width, rngs)


CASES = {"gated_conv": Config()}


class Mixer(mixer.Mixer):
    """(B_t, C_t, u_t) = x_t W, y_t = (C_t * conv(B * u)_t) W_o."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.channels < 0:
            raise ValueError(f"channels={config.channels} is negative. Use 0 (the width) or more.")
        channels = config.channels or width
        self.bcu = weights.inward(rngs, width, (3, channels), ("parts", "channels"))
        self.conv = layers.ShortConv(
            (channels,), ("channels",), rngs, width=config.conv, bias=False
        )
        self.o = weights.outward(rngs, (channels,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        bcu_BTPC = weights.project("btd,dpc->btpc", x, self.bcu)
        u_BTC, tail = self.conv(
            bcu_BTPC[:, :, 0] * bcu_BTPC[:, :, 2], segments=segments, state=state
        )
        return weights.project("btc,cd->btd", bcu_BTPC[:, :, 1] * u_BTC, self.o), tail

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The convolution's tail, all zero."""
        return self.conv.init_state(batch, dtype)
