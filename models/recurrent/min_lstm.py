"""minLSTM: an LSTM whose gates do not read the state and are normalised to sum to one.

Were RNNs All We Needed? (arXiv 2410.01201, section 3.2 and appendix B). Notable: only the ratio of
the forget and the input gate matters, so the logarithms of both come from one difference,
d = softplus(-f) - softplus(-i), as -softplus(d) and -softplus(-d); the candidate passes g, which
is positive. Deviation: the state before the first token is zero (the paper's code takes g of an
input).
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
    forget_bias: float = 0.0  # the paper also starts it above zero (its figure 5)

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the state has no channel."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(W_h x_t), y = h W_o.

    f_t = sigmoid(W_f x_t + b_f), i_t = sigmoid(W_i x_t + b_i).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels = int(config.expand * width)
        if channels < 1:
            raise ValueError(
                f"expand={config.expand} leaves no channel at width {width}. Use {1 / width} "
                f"or more; usual: 1.5."
            )
        self.w = weights.inward(rngs, width, (3, channels), ("parts", "channels"))
        start = jnp.asarray([config.forget_bias, 0.0, 0.0])[:, None]
        init = lambda key, shape: jnp.broadcast_to(start, shape)
        self.bias = weights.weight(rngs, init, (3, channels), ("parts", "channels"))
        self.o = weights.outward(rngs, (channels,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        fih_BTPC = weights.project("btd,dpc->btpc", x, self.w).astype(mixer.wide(x.dtype))
        fih_BTPC = fih_BTPC + self.bias[...]
        f_BTC, i_BTC, h_BTC = fih_BTPC[:, :, 0], fih_BTPC[:, :, 1], fih_BTPC[:, :, 2]
        ratio_BTC = jax.nn.softplus(-f_BTC) - jax.nn.softplus(-i_BTC)
        h_BTC, last = linear_scan(
            (jax.nn.sigmoid(ratio_BTC) * layers.positive(h_BTC)).astype(x.dtype),
            -jax.nn.softplus(ratio_BTC),
            segments=segments,
            initial_state=state,
        )
        return weights.project("btc,cd->btd", h_BTC, self.o), last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, C)."""
        return jnp.zeros((batch, self.o.shape[0]), mixer.wide(dtype))
