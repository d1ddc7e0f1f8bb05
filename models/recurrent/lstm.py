"""LSTM: long short-term memory, the nonlinear baseline that runs token by token.

Hochreiter and Schmidhuber, Neural Computation 9(8), 1997; the forget gate is that of Gers et al.
(Neural Computation 12(10), 2000), without peepholes: arXiv 1402.1128, eqs. 1 to 6 less W_ic, W_fc
and W_oc. Notable: the forget gate's bias starts at 1 (Jozefowicz et al., ICML 2015), the recurrent
map uniform(+- 1 / sqrt(channels)) as in PyTorch. A map back to the residual stream follows.
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
    """A state of `channels` cells and as many outputs."""

    channels: int = 0  # 0: the model's width
    forget_bias: float = 1.0

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where channels is negative."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """c_t = f_t c_{t-1} + i_t tanh(z_t), h_t = o_t tanh(c_t), y = h W_o.

    i_t, f_t, o_t = sigmoid(W x_t + R h_{t-1} + b), z_t = W_z x_t + R_z h_{t-1} + b_z.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels = config.channels or width
        if channels < 1:
            raise ValueError(f"channels={channels} is negative. Use 0 (the width) or at least 1.")
        bound = 1 / math.sqrt(channels)
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        start = jnp.asarray([0.0, config.forget_bias, 0.0, 0.0])[:, None]
        dims = ("parts", "channels")
        self.w = weights.inward(rngs, width, (4, channels), dims)
        self.recurrent = weights.weight(rngs, init, (channels, 4, channels), ("state", *dims))
        self.bias = weights.weight(
            rngs, lambda key, shape: jnp.broadcast_to(start, shape), (4, channels), dims
        )
        self.o = weights.outward(rngs, (channels,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        ifoz_BTPC = weights.project("btd,dpc->btpc", x, self.w).astype(dtype) + self.bias[...]
        of_step = self.recurrent[...].astype(dtype)
        last, h_BTC = nonlinear_scan.scan(_step, of_step, state, ifoz_BTPC, segments)
        return weights.project("btc,cd->btd", h_BTC.astype(x.dtype), self.o), last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Cells c and outputs h, zeros (B, C)."""
        shape = (batch, self.o.shape[0])
        return {name: jnp.zeros(shape, mixer.wide(dtype)) for name in "ch"}


def _step(recurrent_CPE, state, ifoz_BPC):
    ifoz_BPC = ifoz_BPC + jnp.einsum("bc,cpe->bpe", state["h"], recurrent_CPE)
    ifo_BPC, z_BC = jax.nn.sigmoid(ifoz_BPC[:, :3]), jnp.tanh(ifoz_BPC[:, 3])
    c_BC = ifo_BPC[:, 1] * state["c"] + ifo_BPC[:, 0] * z_BC
    h_BC = ifo_BPC[:, 2] * jnp.tanh(c_BC)
    return {"c": c_BC, "h": h_BC}, h_BC
