"""H3: a shift and a diagonal state space with gates between, so that tokens can be compared.

Hungry Hungry Hippos: Towards Language Modeling with State Space Models (arXiv 2212.14052, section
3.1 and algorithm 1). Notable: the shift state space is a convolution over its last `shift` tokens,
so that k_{t-1} v_t-like products form; the diagonal one, of constant complex modes, remembers them.
Heads have one channel, as in the paper's language models of 125M parameters. The taps of the shift
start with variance 1 / shift, not 1, which keeps the scale of k.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kernels.long_conv import long_conv
from models import mixer, weights
from models.parts import diagonal


@dataclasses.dataclass
class Config:
    """A state of `state` real numbers a channel, held as half as many complex modes."""

    state: int = 64
    shift: int = 64  # tokens that the shift state space holds
    dt_min: float = 1e-3  # step sizes start log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for an odd state, a short shift and step sizes out of order."""
        return Mixer(self, width, rngs)


CASES = {"h3": Config()}


class Mixer(mixer.Mixer):
    """y = (q * SSM_diag(SSM_shift(k) * v)) W; either SSM adds its input, weighed by D."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.state < 2 or config.state % 2:
            near = max(2, config.state // 2 * 2)
            raise ValueError(f"state={config.state} must be even and at least 2. Use {near}.")
        if config.shift < 2:
            raise ValueError(f"shift={config.shift} must be at least 2 tokens; the paper uses 64.")
        modes = config.state // 2
        dims, shape = ("channels", "state"), (width, modes)
        self.qkv = weights.inward(rngs, width, (3, width), ("parts", "channels"))
        taps = weights.fan_in(config.shift)
        self.taps = weights.weight(rngs, taps, (config.shift, width), ("width", "channels"))
        steps = diagonal.log_steps(config.dt_min, config.dt_max)
        self.log_dt = weights.weight(rngs, steps, (width,), ("channels",))
        start = -0.5 * np.ones(modes) + 1j * np.pi * np.arange(modes)  # S4D-Lin
        self.log_rate = weights.weight(rngs, diagonal.rows(np.log(-start.real)), shape, dims)
        self.frequency = weights.weight(rngs, diagonal.rows(start.imag), shape, dims)
        self.c = weights.weight(rngs, weights.normal(0.5**0.5), (2, *shape), ("parts", *dims))
        self.skips = weights.weight(rngs, weights.normal(1.0), (2, width), ("parts", "channels"))
        self.o = weights.outward(rngs, (width,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"k": None, "h": None}
        qkv_BTPC = weights.project("btd,dpc->btpc", x, self.qkv)
        k_BTC, tail = long_conv(
            qkv_BTPC[:, :, 1],
            self.taps[...],
            self.skips[0],
            segments=segments,
            initial_state=state["k"],
        )
        kv_BTC = k_BTC * qkv_BTPC[:, :, 2]
        log_decay, phase, into = diagonal.zero_order_hold(
            jnp.exp(self.log_dt[...])[:, None], jnp.exp(self.log_rate[...]), self.frequency[...]
        )
        y_BTC, h_B2M = diagonal.complex_modes(
            kv_BTC,
            log_decay,
            phase,
            2 * diagonal.times(self.c[...], into),
            segments=segments,
            initial_state=state["h"],
        )
        y_BTC = (y_BTC + self.skips[1] * kv_BTC).astype(x.dtype) * qkv_BTPC[:, :, 0]
        return weights.project("btc,cd->btd", y_BTC, self.o), {"k": tail, "h": h_B2M}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The last keys (B, shift - 1, D) and the modes (B, 2, D N / 2), all zero."""
        shift, width = self.taps.shape
        return {
            "k": jnp.zeros((batch, shift - 1, width), dtype),
            "h": jnp.zeros((batch, 2, self.log_rate.size), mixer.wide(dtype)),
        }
