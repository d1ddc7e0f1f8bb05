"""RG-LRU: Griffin's gated diagonal recurrence between a convolution and a GeLU branch.

Griffin (arXiv 2402.19427, section 2.4, eqs. 1 to 4). Notable: the decay is
a = exp(-8 softplus(L) r_t); the input is scaled by sqrt(1 - a^2) except at a document's first
token, where, as in the released RecurrentGemma, it enters whole; gates are block-diagonal maps.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from kernels.linear_scan import linear_scan
from models import checks, layers, mixer, weights

SHARPNESS = 8.0  # c of eq. 3


@dataclasses.dataclass
class Config:
    """Recurrence of `channels` in `blocks` blocks of gates."""

    channels: int = 0  # 0: the model's width
    blocks: int = 4  # of the block-diagonal gate maps
    conv: int = 4

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where blocks does not divide the channels."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), y = (gelu(W_1 u) * h) W_o."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels = config.channels or width
        block = checks.split_heads(channels, config.blocks, "blocks")
        init, inner = weights.fan_in(width), weights.fan_in(block)
        self.xy = weights.weight(rngs, init, (width, 2, channels), ("embed", "parts", "channels"))
        self.conv = layers.ShortConv((channels,), ("channels",), rngs, width=config.conv)
        self.gates = weights.weight(
            rngs, inner, (2, config.blocks, block, block), ("parts", "heads", "key", "value")
        )
        self.gate_bias = weights.weight(
            rngs, weights.constant(0.0), (2, config.blocks, block), ("parts", "heads", "value")
        )
        self.rate = weights.weight(rngs, _rate_init, (channels,), ("channels",))
        out = weights.fan_in(channels)
        self.o = weights.weight(rngs, out, (channels, width), ("channels", "embed"))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"conv": None, "h": None, "begun": jnp.zeros(x.shape[0], bool)}
        xy_BTPC = weights.project("btd,dpc->btpc", x, self.xy)
        u_BTC, tail = self.conv(xy_BTPC[:, :, 0], segments=segments, state=state["conv"])
        r_BTC, i_BTC = self._gates(u_BTC)
        log_a_BTC = -SHARPNESS * jax.nn.softplus(self.rate[...]) * r_BTC
        entry_BTC = jnp.sqrt(-jnp.expm1(2 * log_a_BTC))
        first_BT, begun = _document_starts(segments, state["begun"], x.shape[1])
        entry_BTC = jnp.where(first_BT[..., None], 1.0, entry_BTC)
        h_BTC, last_BC = linear_scan(
            (entry_BTC * i_BTC * u_BTC).astype(x.dtype),
            log_a_BTC,
            segments=segments,
            initial_state=state["h"],
        )
        h_BTC = jax.nn.gelu(xy_BTPC[:, :, 1]) * h_BTC
        y = weights.project("btc,cd->btd", h_BTC, self.o)
        return y, {"conv": tail, "h": last_BC, "begun": begun}

    def _gates(self, u_BTC):
        """Recurrence gate r_t and input gate i_t (eqs. 1 and 2), in float32."""
        blocks = self.gates.shape[1]
        u_BTHK = u_BTC.reshape(*u_BTC.shape[:2], blocks, -1)
        gates_PBTHK = weights.project("bthk,phkv->pbthv", u_BTHK, self.gates)
        gates_PBTHK = gates_PBTHK.astype(mixer.wide(u_BTC.dtype))
        gates_PBTHK = gates_PBTHK + self.gate_bias[...][:, None, None]
        gates_PBTC = jax.nn.sigmoid(gates_PBTHK).reshape(2, *u_BTC.shape)
        return gates_PBTC[0], gates_PBTC[1]

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tail, the state (B, C), and whether its document has begun."""
        return {
            "conv": self.conv.init_state(batch, dtype),
            "h": jnp.zeros((batch, self.rate.shape[0]), mixer.wide(dtype)),
            "begun": jnp.zeros(batch, bool),
        }


def _rate_init(key, shape):
    """L such that exp(-8 softplus(L)), the decay of an open gate, is uniform in [0.9, 0.999]."""
    decay = jax.random.uniform(key, shape, minval=0.9, maxval=0.999)
    return jnp.log(jnp.expm1(-jnp.log(decay) / SHARPNESS))


def _document_starts(segments, begun, length):
    """Where a document's first token stands (B, T), and whether the row's last one has begun."""
    if segments is None:
        return ~begun[:, None] & (jnp.arange(length) == 0), jnp.ones_like(begun)
    real = boundaries.is_real(segments)
    first_real = real & (jnp.cumsum(real, axis=1) == 1)
    return boundaries.starts(segments) | (first_real & ~begun[:, None]), begun | real.any(1)
