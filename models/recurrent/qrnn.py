"""QRNN: gates and candidates from a causal convolution, then a recurrence that only pools.

Quasi-Recurrent Neural Networks (arXiv 1611.01576, eqs. 1 and 4, fo-pooling). Notable: the
convolution mixes channels as well as `width` tokens, and is the only map of the input. Deviation: a
map back to the residual stream follows, so the state may have another size.
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
    """A state of `channels` numbers and a convolution over `window` tokens."""

    channels: int = 0  # 0: the model's width
    window: int = 2  # tokens, the current one included

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the sizes are out of range."""
        return Mixer(self, width, rngs)


CASES = {"qrnn": Config(), "qrnn_window": Config(window=4)}


class Mixer(mixer.Mixer):
    """c_t = f_t c_{t-1} + (1 - f_t) z_t, y_t = (o_t c_t) W_o.

    z_t = tanh(sum_j W_zj x_{t-j}), f_t and o_t likewise with a sigmoid; j from 0 to window - 1.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels, window = config.channels or width, config.window
        if channels < 1:
            raise ValueError(f"channels={channels} is negative. Use 0 (the width) or at least 1.")
        if not 2 <= window <= 8:
            near = min(max(window, 2), 8)
            raise ValueError(f"window={window} is outside 2 to 8 tokens. Use {near}; usual: 2.")
        self.w = weights.weight(
            rngs,
            weights.fan_in(window, width),
            (window, width, 3, channels),
            ("width", "embed", "parts", "channels"),
        )
        self.bias = weights.filled(rngs, 0.0, (3, channels), ("parts", "channels"))
        self.o = weights.outward(rngs, (channels,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        taps, tails = [x], []
        for j in range(self.w.shape[0] - 1):
            before, last = layers.token_shift(taps[-1], segments, state["x"][:, j : j + 1])
            taps.append(before)
            tails.append(last)
        x_BTWD = jnp.stack(taps, axis=2)
        zfo_BTPC = weights.project("btwd,wdpc->btpc", x_BTWD, self.w).astype(mixer.wide(x.dtype))
        zfo_BTPC = zfo_BTPC + self.bias[...]
        z_BTC, f_BTC, o_BTC = (zfo_BTPC[:, :, part] for part in range(3))
        c_BTC, last = linear_scan(
            (jax.nn.sigmoid(-f_BTC) * jnp.tanh(z_BTC)).astype(x.dtype),
            jax.nn.log_sigmoid(f_BTC),
            segments=segments,
            initial_state=state["c"],
        )
        y_BTC = (jax.nn.sigmoid(o_BTC) * c_BTC).astype(x.dtype)
        y = weights.project("btc,cd->btd", y_BTC, self.o)
        return y, {"x": jnp.concatenate(tails, axis=1), "c": last}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The last window - 1 tokens, newest first, and the pooled state (B, C), all zero."""
        window, width, _, channels = self.w.shape
        return {
            "x": jnp.zeros((batch, window - 1, width), dtype),
            "c": jnp.zeros((batch, channels), mixer.wide(dtype)),
        }
