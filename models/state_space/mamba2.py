"""Mamba-2: a state space whose transition is one scalar per head, computed as chunked attention.

Transformers are SSMs (arXiv 2405.21060, section 7 and listing 1). Notable: C, B and x play
q, k and v; B and C are shared by the heads of a group; the block has no separate channel mixer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Inner width expand * D in heads of head_dim; a state of `state` numbers a channel."""

    expand: int = 2
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    conv: int = 4

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where head_dim or groups do not fit."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """h_t = exp(dt A) h_{t-1} + dt B_t x_t^T, y_t = C_t h_t + D x_t, out = norm(y * silu(z)) W."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        inner, dim, groups, state = (
            config.expand * width,
            config.head_dim,
            config.groups,
            config.state,
        )
        heads = checks.split_heads(inner, dim, "head_dim", "expand * width =")
        if groups < 1 or heads % groups:
            near = checks.nearest_divisor(heads, groups)
            raise ValueError(f"groups={groups} does not divide the {heads} heads. Use {near}.")
        init = weights.fan_in(width)
        head_dims, group_dims = ("heads", "value"), ("parts", "groups", "state")
        self.z = weights.weight(rngs, init, (width, heads, dim), ("embed", *head_dims))
        self.x = weights.weight(rngs, init, (width, heads, dim), ("embed", *head_dims))
        self.bc = weights.weight(rngs, init, (width, 2, groups, state), ("embed", *group_dims))
        self.dt = weights.weight(rngs, init, (width, heads), ("embed", "heads"))
        conv: dict[str, Any] = dict(width=config.conv, activation="silu")
        self.x_conv = layers.ShortConv((heads, dim), head_dims, rngs, **conv)
        self.bc_conv = layers.ShortConv((2, groups, state), group_dims, rngs, **conv)
        self.dt_bias = weights.weight(
            rngs, weights.inverse_softplus(1e-3, 0.1), (heads,), ("heads",)
        )
        self.log_a = weights.weight(rngs, weights.log_uniform(1.0, 16.0), (heads,), ("heads",))
        self.skip = weights.weight(rngs, weights.constant(1.0), (heads,), ("heads",))
        self.norm = weights.weight(rngs, weights.constant(1.0), (heads, dim), head_dims)
        out = weights.fan_in(inner)
        self.o = weights.weight(rngs, out, (heads, dim, width), (*head_dims, "embed"))
        self.state_shape = (heads, state, dim)
        self.groups = groups

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"x": None, "bc": None, "s": None}
        u_BTHP, x_tail = self.x_conv(
            weights.project("btd,dhp->bthp", x, self.x),
            segments=segments,
            state=state["x"],
        )
        bc_BTPGN, bc_tail = self.bc_conv(
            weights.project("btd,dpgn->btpgn", x, self.bc),
            segments=segments,
            state=state["bc"],
        )
        dt_BTH = weights.project("btd,dh->bth", x, self.dt).astype(mixer.wide(x.dtype))
        dt_BTH = jax.nn.softplus(dt_BTH + self.dt_bias[...])
        y_BTHP, s_BHNP = gated_linear(
            bc_BTPGN[:, :, 1],
            bc_BTPGN[:, :, 0],
            u_BTHP * dt_BTH[..., None].astype(x.dtype),
            -jnp.exp(self.log_a[...]) * dt_BTH,
            segments=segments,
            initial_state=state["s"],
            scale=1.0,
        )
        # In float32: the gradient of a skip is a sum over tokens that nearly cancels.
        y_BTHP = (y_BTHP + u_BTHP * self.skip[...][:, None]).astype(x.dtype)
        z_BTHP = weights.project("btd,dhp->bthp", x, self.z)
        y_BTHP = self._gated_norm(y_BTHP * jax.nn.silu(z_BTHP))
        y = weights.project("bthp,hpd->btd", y_BTHP, self.o)
        return y, {"x": x_tail, "bc": bc_tail, "s": s_BHNP}

    def _gated_norm(self, y_BTHP):
        """RMS norm over the channels of each group, so that groups can live on several devices."""
        grouped = y_BTHP.reshape(*y_BTHP.shape[:2], self.groups, -1)
        scale = self.norm[...].reshape(self.groups, -1)
        return layers.rms_norm(grouped, scale, eps=1e-5).reshape(y_BTHP.shape)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tails and the state (B, H, N, P), all zero."""
        return {
            "x": self.x_conv.init_state(batch, dtype),
            "bc": self.bc_conv.init_state(batch, dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }
