"""SRU: gates that see the cell of the token before through one number a channel, and a highway.

Simple Recurrent Units for Highly Parallelizable Recurrence (arXiv 1709.02755, version 5, eqs. 1 to
4). Notable: all large products are over whole rows; what remains token by token is elementwise, yet
nonlinear (v * c_{t-1} inside the gates), so it is a loop. The highway is scaled by alpha, section
3.2, which keeps the variance at the start. All weights start uniform as in the released code: maps
of variance 1 / D, and half of it for the gates', whose vectors v have variance 1 / 2. Deviation:
the state is as wide as the stream, as the highway asks (the paper would project).
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
    """As many channels as the model's width; there is no output projection."""

    highway_bias: float = 0.0  # of the reset gate; below zero the input passes (paper: 0 to -3)

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the highway cannot be scaled."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """c_t = f_t c_{t-1} + (1 - f_t) W x_t, y_t = r_t c_t + (1 - r_t) alpha x_t.

    f_t = sigmoid(W_f x_t + v_f c_{t-1} + b_f), r_t = sigmoid(W_r x_t + v_r c_{t-1} + b_r).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if not abs(config.highway_bias) <= 20:
            near = math.copysign(20.0, config.highway_bias)
            raise ValueError(
                f"highway_bias={config.highway_bias} shuts the gate for good: its size must be at "
                f"most 20. Use {near}; usual: 0.0 to -3.0."
            )
        dims = ("parts", "channels")
        self.w = weights.weight(rngs, _maps, (width, 3, width), ("embed", *dims))
        self.v = weights.weight(rngs, _uniform(0.5), (2, width), dims)
        start = jnp.asarray([0.0, config.highway_bias])[:, None]
        self.bias = weights.weight(
            rngs, lambda key, shape: jnp.broadcast_to(start, shape), (2, width), dims
        )
        self.scale = math.sqrt(1 + 2 * math.exp(config.highway_bias))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        u_BTPC = weights.project("btd,dpc->btpc", x, self.w).astype(dtype)
        gates_BTPC = u_BTPC[:, :, 1:] + self.bias[...]
        inputs = (u_BTPC[:, :, 0], gates_BTPC, self.scale * x.astype(dtype))
        of_step = self.v[...].astype(dtype)
        last, y = nonlinear_scan.scan(_step, of_step, state, inputs, segments)
        return y.astype(x.dtype), last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, C)."""
        return jnp.zeros((batch, self.v.shape[1]), mixer.wide(dtype))


def _step(v_PC, c_BC, inputs):
    u_BC, gates_BPC, highway_BC = inputs
    gates_BPC = jax.nn.sigmoid(gates_BPC + v_PC * c_BC[:, None])
    forget_BC, reset_BC = gates_BPC[:, 0], gates_BPC[:, 1]
    c_BC = forget_BC * c_BC + (1 - forget_BC) * u_BC
    return c_BC, reset_BC * c_BC + (1 - reset_BC) * highway_BC


def _uniform(variance):
    bound = math.sqrt(3 * variance)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _maps(key, shape):
    """Of the candidate and both gates (D, 3, C)."""
    share = jnp.sqrt(jnp.asarray([1.0, 0.5, 0.5]))[:, None]
    return share * _uniform(1 / shape[0])(key, shape)
