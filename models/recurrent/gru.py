"""GRU: the gated recurrent unit, a nonlinear baseline that runs token by token.

Learning Phrase Representations using RNN Encoder-Decoder (arXiv 1406.1078, section 2.3), in cuDNN's
form. Notable: the reset gate acts after the recurrent map, so that one product a token serves all
gates (the paper resets the state before it); z weighs the old state in both. The recurrent map
starts uniform(+- 1 / sqrt(channels)), as in PyTorch. Deviation: a map back to the residual stream
follows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import nonlinear_scan


@dataclasses.dataclass
class Config:
    """A state of `channels` numbers."""

    channels: int = 0  # 0: the model's width

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where channels is negative."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """h_t = (1 - z_t) n_t + z_t h_{t-1}, y = h W_o.

    r_t, z_t = sigmoid(W x_t + R h_{t-1} + b), n_t = tanh(W_n x_t + b_n + r_t (R_n h_{t-1} + b'_n)).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels = config.channels or width
        if channels < 1:
            raise ValueError(f"channels={channels} is negative. Use 0 (the width) or at least 1.")
        bound = 1 / math.sqrt(channels)
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        dims = ("parts", "channels")
        self.w = weights.inward(rngs, width, (3, channels), dims)
        self.recurrent = weights.weight(rngs, init, (channels, 3, channels), ("state", *dims))
        self.bias = weights.filled(rngs, 0.0, (3, channels), dims)
        self.reset_bias = weights.filled(rngs, 0.0, (channels,), ("channels",))  # b'_n
        self.o = weights.outward(rngs, (channels,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        rzn_BTPC = weights.project("btd,dpc->btpc", x, self.w).astype(dtype) + self.bias[...]
        of_step = (self.recurrent[...].astype(dtype), self.reset_bias[...].astype(dtype))
        last, h_BTC = nonlinear_scan.scan(_step, of_step, state, rzn_BTPC, segments)
        return weights.project("btc,cd->btd", h_BTC.astype(x.dtype), self.o), last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, C)."""
        return jnp.zeros((batch, self.o.shape[0]), mixer.wide(dtype))


def _step(weights, h_BC, rzn_BPC):
    recurrent_CPE, bias_C = weights
    again_BPC = jnp.einsum("bc,cpe->bpe", h_BC, recurrent_CPE)
    rz_BPC = jax.nn.sigmoid(rzn_BPC[:, :2] + again_BPC[:, :2])
    n_BC = jnp.tanh(rzn_BPC[:, 2] + rz_BPC[:, 0] * (again_BPC[:, 2] + bias_C))
    h_BC = n_BC + rz_BPC[:, 1] * (h_BC - n_BC)
    return h_BC, h_BC
