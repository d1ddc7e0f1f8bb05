"""S4D: a diagonal state space for every channel, with constant complex modes.

On the Parameterization and Initialization of Diagonal State Space Models (arXiv 2206.11893, eqs. 2
to 4 and section 4). Notable: N / 2 modes stand for N, with their conjugates; step sizes are one a
channel; a GLU mixes the channels afterwards. The paper trains by one long convolution; here both
training and decoding run the recurrence, a chunk of tokens at a time (`models/parts/diagonal.py`),
whose state is N numbers a channel, so that rows can be packed and continued.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import diagonal


@dataclasses.dataclass
class Config:
    """A state of `state` real numbers a channel, held as half as many complex modes."""

    state: int = 64  # N of the paper
    start: Literal["lin", "inv", "legs"] = "lin"  # S4D-Lin, S4D-Inv, S4D-LegS
    discretization: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 1e-3  # step sizes start log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for an odd state, unknown names and step sizes out of order."""
        return Mixer(self, width, rngs)


CASES = {"s4d": Config(), "s4d_inv": Config(start="inv", discretization="bilinear")}


class Mixer(mixer.Mixer):
    """h' = A h + B x, y = 2 Re(C h) + D x, discretised; out = GLU(gelu(y))."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.state < 2 or config.state % 2:
            near = max(2, config.state // 2 * 2)
            raise ValueError(f"state={config.state} must be even and at least 2. Use {near}.")
        if config.start not in STARTS:
            raise ValueError(f"start={config.start!r} is unknown. Use one of {', '.join(STARTS)}.")
        if config.discretization not in RULES:
            legal = " or ".join(RULES)
            raise ValueError(f"discretization={config.discretization!r} is unknown. Use {legal}.")
        modes = STARTS[config.start](config.state)
        dims, shape = ("channels", "state"), (width, config.state // 2)
        steps = diagonal.log_steps(config.dt_min, config.dt_max)
        self.log_dt = weights.weight(rngs, steps, (width,), ("channels",))
        self.log_rate = weights.weight(rngs, diagonal.rows(np.log(-modes.real)), shape, dims)
        self.frequency = weights.weight(rngs, diagonal.rows(modes.imag), shape, dims)
        self.c = weights.weight(rngs, weights.normal(0.5**0.5), (2, *shape), ("parts", *dims))
        self.skip = weights.weight(rngs, weights.normal(1.0), (width,), ("channels",))
        self.o = weights.weight(
            rngs, weights.fan_in(width), (width, 2, width), ("channels", "parts", "embed")
        )
        self.o_bias = weights.filled(rngs, 0.0, (2, width), ("parts", "embed"))
        self.rule = config.discretization

    def __call__(self, x, *, segments=None, state=None):
        log_decay, phase, read = self._discrete()
        y_BTD, h_B2M = diagonal.complex_modes(
            x, log_decay, phase, read, segments=segments, initial_state=state
        )
        y_BTD = jax.nn.gelu((y_BTD + self.skip[...] * x).astype(x.dtype))
        o_BTPD = weights.project("btc,cpd->btpd", y_BTD, self.o) + self.o_bias[...]
        return (o_BTPD[:, :, 0] * jax.nn.sigmoid(o_BTPD[:, :, 1])).astype(x.dtype), h_B2M

    def _discrete(self):
        """log of |A|, angle of A and 2 C B of the discrete system, all real numbers."""
        dt = jnp.exp(self.log_dt[...])[:, None]
        rate, frequency = jnp.exp(self.log_rate[...]), self.frequency[...]
        log_decay, phase, into = RULES[self.rule](dt, rate, frequency)
        return log_decay, phase, 2 * diagonal.times(self.c[...], into)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, 2, D N / 2): real and imaginary parts."""
        return jnp.zeros((batch, 2, self.log_rate.size), mixer.wide(dtype))


def _linear(state):
    """A_n = -1/2 + i pi n (S4D-Lin, eq. 9)."""
    return -0.5 + 1j * np.pi * np.arange(state // 2)


def _inverse(state):
    """A_n = -1/2 + i N / pi (N / (2 n + 1) - 1) (S4D-Inv, eq. 8)."""
    return -0.5 + 1j * state / np.pi * (state / (2 * np.arange(state // 2) + 1) - 1)


def _legs(state):
    """The eigenvalues of HiPPO-LegS's normal part (S4D-LegS, eq. 7)."""
    rate, frequency, _ = diagonal.normal_legs(state)
    return -rate + 1j * frequency


STARTS = {"lin": _linear, "inv": _inverse, "legs": _legs}
RULES = {"zoh": diagonal.zero_order_hold, "bilinear": diagonal.bilinear}
