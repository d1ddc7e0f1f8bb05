"""Mamba: a diagonal state space whose step size, input and output maps depend on the token.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv 2312.00752, algorithm 2 and
figure 3). Notable: the block is its own channel mixer, a convolution and the scan between a gate;
A starts as S4D-Real, -1 .. -N in every channel, and B is discretised by Euler's step, as in the
released code, whose initialisation this is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.selective_scan import selective_scan
from models import layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Inner width expand * D, a state of `state` numbers a channel."""

    expand: int = 2
    state: int = 16
    dt_rank: int = 0  # of the map to step sizes; 0: width / 16, rounded up
    conv: int = 4
    dt_min: float = 1e-3  # step sizes start log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for sizes below 1 and step sizes out of order."""
        return Mixer(self, width, rngs)


CASES = {"mamba1": Config()}


class Mixer(mixer.Mixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t h_t + D u_t) * silu(z_t), out = y W."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        for name in ("expand", "state"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
        if config.dt_rank < 0:
            raise ValueError(f"dt_rank={config.dt_rank} is negative. Use 0 (width / 16) or more.")
        if not 0 < config.dt_min <= config.dt_max:
            raise ValueError(
                f"dt_min={config.dt_min} must be > 0 and at most dt_max={config.dt_max}; "
                f"usual: 0.001 and 0.1."
            )
        inner, rank = config.expand * width, config.dt_rank or -(-width // 16)
        self.uz = weights.inward(rngs, width, (2, inner), ("parts", "channels"))
        self.conv = layers.ShortConv(
            (inner,), ("channels",), rngs, width=config.conv, activation="silu"
        )
        to_rank = weights.fan_in(inner)
        self.bc = weights.weight(
            rngs, to_rank, (inner, 2, config.state), ("channels", "parts", "state")
        )
        self.dt_down = weights.weight(rngs, to_rank, (inner, rank), ("channels", "rank"))
        self.dt_up = weights.weight(rngs, _uniform(rank**-0.5), (rank, inner), ("rank", "channels"))
        steps = weights.inverse_softplus(config.dt_min, config.dt_max)
        self.dt_bias = weights.weight(rngs, steps, (inner,), ("channels",))
        self.log_a = weights.weight(rngs, _s4d_real, (inner, config.state), ("channels", "state"))
        self.skip = weights.filled(rngs, 1.0, (inner,), ("channels",))
        self.o = weights.outward(rngs, (inner,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"conv": None, "h": None}
        uz_BTPC = weights.project("btd,dpc->btpc", x, self.uz)
        u_BTC, tail = self.conv(uz_BTPC[:, :, 0], segments=segments, state=state["conv"])
        bc_BTPN = weights.project("btc,cpn->btpn", u_BTC, self.bc)
        low_BTR = weights.project("btc,cr->btr", u_BTC, self.dt_down)
        dt_BTC = weights.project("btr,rc->btc", low_BTR, self.dt_up).astype(mixer.wide(x.dtype))
        y_BTC, h_BCN = selective_scan(
            u_BTC,
            jax.nn.softplus(dt_BTC + self.dt_bias[...]),
            -jnp.exp(self.log_a[...]),
            bc_BTPN[:, :, 0],
            bc_BTPN[:, :, 1],
            self.skip[...],
            segments=segments,
            initial_state=state["h"],
        )
        y_BTC = y_BTC * jax.nn.silu(uz_BTPC[:, :, 1])
        return weights.project("btc,cd->btd", y_BTC, self.o), {"conv": tail, "h": h_BCN}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The convolution's tail and the state (B, C, N), all zero."""
        return {
            "conv": self.conv.init_state(batch, dtype),
            "h": jnp.zeros((batch, *self.log_a.shape), mixer.wide(dtype)),
        }


def _uniform(bound):
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _s4d_real(key, shape):
    """log of 1 .. N in every channel (arXiv 2312.00752, section 3.6)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
