"""DSS: S4 with a diagonal state, the first to show that the diagonal is enough.

Diagonal State Spaces are as Effective as Structured State Spaces (arXiv 2203.14343, proposition 1
and section 3.3). Notable: this is DSS-exp, with Re(Lambda) = -exp(.), B = 1 and all learning of B
and C in W; all channels share Lambda, which starts at the eigenvalues of the normal part of HiPPO,
and differ in W and in their steps. As in the released code (not the paper) the real and imaginary
parts of Lambda have a step each, equal at the start. The output is a gelu and one linear map.
DSS-softmax, the released default, is left out: it normalises each mode by the length of the row and
lets modes grow, so that it has no causal state that could be carried on past that length.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import diagonal


@dataclasses.dataclass
class Config:
    """`state` complex modes, of which every channel keeps its own."""

    state: int = 64
    dt_min: float = 1e-3  # step sizes start log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a state below 1 and step sizes out of order."""
        return Mixer(self, width, rngs)


CASES = {"dss": Config()}


class Mixer(mixer.Mixer):
    """K_l = Re sum_n W_n (e^{z_n} - 1) / L_n e^{z_n l}, out = gelu(K * x + D x) W_o + b.

    z_n = dt_0 Re(L_n) + i dt_1 Im(L_n).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.state < 1:
            raise ValueError(f"state={config.state} must be at least 1; the paper uses 64.")
        rate, frequency, _ = diagonal.normal_legs(2 * config.state)
        steps = diagonal.log_steps(config.dt_min, config.dt_max)
        twice = lambda key, shape: jnp.broadcast_to(steps(key, shape[1:]), shape)
        self.log_dt = weights.weight(rngs, twice, (2, width), ("parts", "channels"))
        shared = (config.state,), ("state",)
        self.log_rate = weights.weight(rngs, diagonal.rows(np.log(rate)), *shared)
        self.frequency = weights.weight(rngs, diagonal.rows(frequency), *shared)
        shape, dims = (2, width, config.state), ("parts", "channels", "state")
        self.w = weights.weight(rngs, weights.normal(1.0), shape, dims)
        self.skip = weights.weight(rngs, weights.normal(1.0), (width,), ("channels",))
        self.o = weights.outward(rngs, (width,), width, ("channels",))
        self.o_bias = weights.filled(rngs, 0.0, (width,), ("embed",))

    def __call__(self, x, *, segments=None, state=None):
        dt, turn = jnp.exp(self.log_dt[...])[..., None]
        log_decay, phase, into = diagonal.zero_order_hold(
            dt, jnp.exp(self.log_rate[...]), self.frequency[...], turn
        )
        y_BTD, h_B2M = diagonal.complex_modes(
            x,
            log_decay,
            phase,
            diagonal.times(self.w[...], into),
            segments=segments,
            initial_state=state,
        )
        y_BTD = jax.nn.gelu((y_BTD + self.skip[...] * x).astype(x.dtype))
        y_BTD = weights.project("btc,cd->btd", y_BTD, self.o) + self.o_bias[...]
        return y_BTD.astype(x.dtype), h_B2M

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, 2, D N): real and imaginary parts."""
        return jnp.zeros((batch, 2, self.w[0].size), mixer.wide(dtype))
