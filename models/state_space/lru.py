"""LRU: a dense complex diagonal recurrence, started on a ring and held inside the unit circle.

Resurrecting Recurrent Neural Networks for Long Sequences (arXiv 2303.06349, eqs. 6 to 8 and
appendix A). Notable: the eigenvalue is exp(-exp(nu) + i exp(theta)), so no training step leaves the
circle; gamma, learned from sqrt(1 - |lambda|^2) on, keeps the state's variance at the input's; the
GLU after it is the block's, with the gelu of the released code before it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.linear_scan import complex_linear_scan
from models import mixer, weights
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """A complex state of `state` numbers for the whole layer, on a ring of the unit circle."""

    state: int = 0  # 0: the model's width
    r_min: float = 0.0  # radii of the eigenvalues start between r_min and r_max
    r_max: float = 1.0
    max_phase: float = 2 * math.pi  # and their angles below this

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a ring outside the unit circle."""
        return Mixer(self, width, rngs)


CASES = {"lru": Config()}


class Mixer(mixer.Mixer):
    """h_t = lambda h_{t-1} + gamma B x_t, y = Re(C h) + D x, out = GLU(gelu(y))."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        low, high = config.r_min, config.r_max
        if config.state < 0:
            raise ValueError(f"state={config.state} is negative. Use 0 (the width) or more.")
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"r_min={low} and r_max={high} must be 0 <= r_min < r_max <= 1; usual: 0.9, 0.999."
            )
        if not 0 < config.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase={config.max_phase} must be in (0, 2 pi]; usual: 6.28.")
        state = config.state or width
        rate = weights.weight(rngs, _ring(low, high), (state,), ("channels",))
        self.log_rate = rate
        self.log_phase = weights.weight(rngs, _angles(config.max_phase), (state,), ("channels",))
        gain = jnp.log(-jnp.expm1(-2 * jnp.exp(rate[...]))) / 2
        self.log_gain = weights.weight(rngs, lambda key, shape: gain, (state,), ("channels",))
        into = weights.fan_in(2 * width)
        self.b = weights.weight(rngs, into, (width, 2, state), ("embed", "parts", "channels"))
        self.c = weights.weight(
            rngs, weights.fan_in(state), (2, state, width), ("parts", "channels", "embed")
        )
        self.skip = weights.weight(rngs, weights.normal(1.0), (width,), ("embed",))
        out = weights.fan_in(width)
        self.o = weights.weight(rngs, out, (width, 2, width), ("channels", "parts", "embed"))
        self.o_bias = weights.filled(rngs, 0.0, (2, width), ("parts", "embed"))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        u_BTPN = weights.project("btd,dpn->btpn", x, self.b).astype(dtype)
        u_BTPN = u_BTPN * jnp.exp(self.log_gain[...])
        (real_BTN, imag_BTN), h_B2N = complex_linear_scan(
            u_BTPN[:, :, 0],
            u_BTPN[:, :, 1],
            -jnp.exp(self.log_rate[...]),
            jnp.exp(self.log_phase[...]),
            segments=segments,
            initial_state=state,
        )
        h_BTPN = jnp.stack([real_BTN, -imag_BTN], axis=2).astype(x.dtype)
        # Without a layout of its own XLA mixes up rows of a mesh where tokens are few (0.10, 0.12).
        y_BTD = weights.project("btpn,pnd->btd", h_BTPN, self.c)
        y_BTD = constrain(y_BTD, "batch", "time", "embed")
        y_BTD = jax.nn.gelu((y_BTD + self.skip[...] * x).astype(x.dtype))
        o_BTPD = weights.project("btc,cpd->btpd", y_BTD, self.o) + self.o_bias[...]
        return (o_BTPD[:, :, 0] * jax.nn.sigmoid(o_BTPD[:, :, 1])).astype(x.dtype), h_B2N

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, 2, N): real and imaginary parts."""
        return jnp.zeros((batch, 2, *self.log_rate.shape), mixer.wide(dtype))


def _ring(low, high):
    """nu with radius exp(-exp(nu)) uniform over the area of the ring (lemma 3.2)."""

    def init(key, shape):
        # The open ends: at radius 0 or 1 nu is infinite.
        inside = jax.random.uniform(key, shape, minval=1e-4, maxval=1 - 1e-4)
        return jnp.log(-jnp.log(inside * (high**2 - low**2) + low**2) / 2)

    return init


def _angles(max_phase):
    """theta with exp(theta) uniform in (0, max_phase)."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1e-4) * max_phase)
