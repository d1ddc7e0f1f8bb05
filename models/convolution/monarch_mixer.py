"""Monarch Mixer: a gated long convolution between Monarch maps of the channels.

Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture (arXiv 2310.12109, sections 3 and 4).
Notable: both axes are mixed by structured matrices: time by long convolutions, whose transforms are
Monarch matrices, channels by products of block-diagonal ones. The encoder's form (M2-BERT) looks
both ways and adds a second, ungated convolution of the input; a filter ahead begins at the token
itself, as in the released convolution (its later FlashFFTConv path begins at the next token). The
projections are Monarch maps here, as in the paper's layer; the released M2-BERT keeps them dense
and has blocks in its MLPs alone. Filters are Hyena's, of one network (released: one a filter), and
reach `length` tokens.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.long_conv import long_conv
from models import checks, layers, mixer, weights
from models.parts.implicit_filter import ImplicitFilter


@dataclasses.dataclass
class Config:
    """A decoder's causal mixer, or an encoder's that reads both ways."""

    causal: bool = True
    blocks: int = 0  # of each block-diagonal factor; 0: the divisor of the width nearest its root
    length: int = 1024  # the longest memory, in tokens
    conv: int = 3  # of the projections
    filter_hidden: int = 64
    filter_bands: int = 16  # sines and cosines of the lag that the filters' network reads
    filter_frequency: float = 10.0  # of that network's sines

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where blocks does not divide the width, or filters do not fit."""
        return (Mixer if self.causal else Encoder)(self, width, rngs)


CASES = {"monarch_mixer": Config(), "monarch_mixer_encoder": Config(causal=False)}


class Monarch(nnx.Module):
    """y = P^T L P R x: two block-diagonal maps, between them a transposition (P) of the channels.

    R mixes the channels of a block and L the blocks of a position: 2 D sqrt(D) weights reach from
    every channel to every other (arXiv 2204.00595, definition 3.1).
    """

    def __init__(self, width: int, blocks: int, rngs: nnx.Rngs, parts: int = 1):
        size = width // blocks
        right, left = weights.fan_in(size), weights.fan_in(blocks)
        self.right = weights.weight(
            rngs, right, (parts, blocks, size, size), ("parts", "heads", "key", "value")
        )
        self.left = weights.weight(
            rngs, left, (parts, size, blocks, blocks), ("parts", "heads", "key", "value")
        )

    def __call__(self, x_BTPD):
        """(B, T, P, D), each part by its own matrix; P = 1 in x serves all parts."""
        parts, blocks, size, _ = self.right.shape
        x_BTPIJ = x_BTPD.reshape(*x_BTPD.shape[:3], blocks, size)
        x_BTPIJ = jnp.broadcast_to(x_BTPIJ, (*x_BTPD.shape[:2], parts, blocks, size))
        x_BTPIK = weights.project("btpij,pijk->btpik", x_BTPIJ, self.right)
        x_BTPLK = weights.project("btpik,pkil->btplk", x_BTPIK, self.left)
        return x_BTPLK.reshape(*x_BTPLK.shape[:3], -1)


class Mixer(mixer.Mixer):
    """(v, g, u) = shortconv(M_1 x), y = M_2 (g * (h conv (u * v)))."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        blocks = config.blocks or checks.nearest_divisor(width, math.isqrt(width))
        checks.split_heads(width, blocks, "blocks")
        self.into = Monarch(width, blocks, rngs, parts=3)
        self.conv = layers.ShortConv((3, width), ("parts", "channels"), rngs, width=config.conv)
        # An encoder has filters back and ahead, of the gated convolution and of the other one.
        self.filters = ImplicitFilter(
            1 if self.causal else 4,
            width,
            config.length,
            rngs,
            hidden=config.filter_hidden,
            bands=config.filter_bands,
            frequency=config.filter_frequency,
        )
        skips = (1 if self.causal else 2, width)
        self.skips = weights.weight(rngs, weights.normal(1.0), skips, ("parts", "channels"))
        self.out = Monarch(width, blocks, rngs)

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"conv": None, "z": None}
        uv_BTC, gate_BTC, conv_tail = self._projected(x, segments, state["conv"])
        before = state["z"]
        filters = self.filters(x.shape[1] if before is None else before.shape[1] + 1)
        z_BTC, tail = long_conv(
            uv_BTC, filters[0], self.skips[0], segments=segments, initial_state=before
        )
        y_BTPD = self.out((gate_BTC * z_BTC)[:, :, None])
        return y_BTPD[:, :, 0], {"conv": conv_tail, "z": tail}

    def _projected(self, x, segments, state):
        """u * v, the gate g, and the short convolution's tail."""
        vgu_BTPC, tail = self.conv(self.into(x[:, :, None]), segments=segments, state=state)
        return vgu_BTPC[:, :, 2] * vgu_BTPC[:, :, 0], vgu_BTPC[:, :, 1], tail

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The last inputs of both convolutions, all zero: at most `length` - 1 tokens."""
        before = max(1, min(capacity, self.filters.length) - 1)
        tail = jnp.zeros((batch, before, self.skips.shape[1]), dtype)
        return {"conv": self.conv.init_state(batch, dtype), "z": tail}


class Encoder(Mixer):
    """y = M_2 (g * (h conv (u * v)) + r conv x), with filters h and r that reach both ways."""

    causal = False

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            self.init_state(x.shape[0], x.shape[1])
        uv_BTC, gate_BTC, _ = self._projected(x, segments, None)
        filters = self.filters(x.shape[1])
        y_BTC = gate_BTC * _both_ways(uv_BTC, filters[:2], self.skips[0], segments)
        y_BTC = y_BTC + _both_ways(x, filters[2:], self.skips[1], segments)
        return self.out(y_BTC[:, :, None])[:, :, 0], ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """ValueError: an encoder reads ahead."""
        raise ValueError(
            "monarch_mixer with causal=False is bidirectional: it has no state to decode from. "
            "Use it in an encoder."
        )


def _both_ways(x_BTC, filters_2LC, skip, segments):
    """skip x_t + sum_{l >= 0} (back[l] x_{t-l} + ahead[l] x_{t+l})."""
    back, ahead = filters_2LC
    y_BTC, _ = long_conv(x_BTC, back, skip, segments=segments)
    mirrored = None if segments is None else segments[:, ::-1]
    z_BTC, _ = long_conv(x_BTC[:, ::-1], ahead, segments=mirrored)
    return y_BTC + z_BTC[:, ::-1]
