"""MLGRU: a linear gated recurrence with ternary maps, of the MatMul-free language model.

Scalable MatMul-free Language Modeling (arXiv 2406.02528, section 3.3.1, eqs. 8 to 13). Notable: the
GRU without matrices on its hidden state, as HGRN has it, so it is a diagonal scan; the four maps
are BitLinear (weights -1, 0, 1; inputs of 8 bits). Deviation: the paper keeps a lower bound on the
forget gate that grows with depth; here it is a number of the Config.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.linear_scan import linear_scan
from models import mixer, weights
from models.parts import ternary


@dataclasses.dataclass
class Config:
    """Channels of the recurrence."""

    channels: int = 0  # 0: the model's width
    lower_bound: float = 0.0  # of the forget gate: 0 in a first layer, larger in later ones

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a bound outside [0, 1)."""
        return Mixer(self, width, rngs)


CASES = {"mlgru": Config()}


class Mixer(mixer.Mixer):
    """h_t = f_t h_{t-1} + (1 - f_t) silu(x_t W_c), y_t = (h_t * sigmoid(x_t W_g)) W_o."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.channels < 0:
            raise ValueError(f"channels={config.channels} is negative. Use 0 (the width) or more.")
        if not 0 <= config.lower_bound < 1:
            near = 0.0 if config.lower_bound < 0 else 0.9
            raise ValueError(f"lower_bound={config.lower_bound} must be in [0, 1). Use {near}.")
        channels = config.channels or width
        self.forget, self.candidate, self.gate = (
            weights.inward(rngs, width, (channels,), ("channels",)) for _ in range(3)
        )
        self.bias = weights.filled(rngs, 0.0, (2, channels), ("parts", "channels"))
        self.o = weights.outward(rngs, (channels,), width, ("channels",))
        self.lower_bound = config.lower_bound

    def __call__(self, x, *, segments=None, state=None):
        forget_BTC, c_BTC, gate_BTC = (
            ternary.bit_linear("btd,dc->btc", x, w[...], x.dtype)
            for w in (self.forget, self.candidate, self.gate)
        )
        open_BTC = jax.nn.sigmoid(-(forget_BTC + self.bias[...][0]))  # 1 - f without a bound
        open_BTC = (1 - self.lower_bound) * open_BTC
        c_BTC = jax.nn.silu(c_BTC + self.bias[...][1])
        h_BTC, last_BC = linear_scan(
            open_BTC * c_BTC, jnp.log1p(-open_BTC), segments=segments, initial_state=state
        )
        gated_BTC = h_BTC * jax.nn.sigmoid(gate_BTC)
        y = ternary.bit_linear("btc,cd->btd", gated_BTC, self.o[...], x.dtype)
        return y.astype(x.dtype), last_BC

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, C)."""
        return jnp.zeros((batch, self.bias.shape[1]), mixer.wide(dtype))
