"""minGRU: a GRU whose gate and candidate do not read the state, so that it trains in parallel.

Were RNNs All We Needed? (arXiv 2410.01201, section 3.1 and appendix B). Notable: the decay
1 - z_t is kept as its logarithm, -softplus(k_t), and the candidate passes g, which is positive: the
paper's stable form, to which `linear_scan` takes logarithms of decays alone. Deviation: the state
before the first token is zero (the paper's code takes g of an input).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.linear_scan import linear_scan
from models import layers, mixer, weights


@dataclasses.dataclass
class Config:
    """A state of expand * width channels."""

    expand: float = 1.5  # channels / width

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the state has no channel."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t), z_t = sigmoid(W_z x_t), y = h W_o."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels = int(config.expand * width)
        if channels < 1:
            raise ValueError(
                f"expand={config.expand} leaves no channel at width {width}. Use {1 / width} "
                f"or more; usual: 1.5."
            )
        self.w = weights.inward(rngs, width, (2, channels), ("parts", "channels"))
        self.bias = weights.filled(rngs, 0.0, (2, channels), ("parts", "channels"))
        self.o = weights.outward(rngs, (channels,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        zh_BTPC = weights.project("btd,dpc->btpc", x, self.w).astype(mixer.wide(x.dtype))
        zh_BTPC = zh_BTPC + self.bias[...]
        z_BTC, h_BTC = zh_BTPC[:, :, 0], zh_BTPC[:, :, 1]
        h_BTC, last = linear_scan(
            (jax.nn.sigmoid(z_BTC) * layers.positive(h_BTC)).astype(x.dtype),
            jax.nn.log_sigmoid(-z_BTC),
            segments=segments,
            initial_state=state,
        )
        return weights.project("btc,cd->btd", h_BTC, self.o), last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, C)."""
        return jnp.zeros((batch, self.o.shape[0]), mixer.wide(dtype))
