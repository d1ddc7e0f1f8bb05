"""Hyena: long convolutions with implicit filters, alternating with gates by the data.

Hyena Hierarchy: Towards Larger Convolutional Language Models (arXiv 2302.10866, definition 3.1 and
section 3.3). Notable: filters come from a small network of sines over the lag, times a window that
decays at another rate in every channel. The recurrence is the paper's, one convolution before each
gate; the released code leaves the first one out. Filters reach `length` tokens back, as they do in
the released code through its longest row; what decoding carries is as many inputs of each
convolution, or as many as the capacity where it is smaller.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.long_conv import long_conv
from models import layers, mixer, weights
from models.parts.implicit_filter import ImplicitFilter


@dataclasses.dataclass
class Config:
    """`order` gates, each after a convolution with filters of `length` taps."""

    order: int = 2
    length: int = 1024  # the longest memory, in tokens
    conv: int = 3  # of the projections
    filter_hidden: int = 64
    filter_bands: int = 16  # sines and cosines of the lag that the network reads
    filter_frequency: float = 1.0  # of the network's sines

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for an order below 1 and sizes of filters that do not fit."""
        return Mixer(self, width, rngs)


CASES = {"hyena": Config()}


class Mixer(mixer.Mixer):
    """z^1 = v, z^{n+1} = x^n * (h^n conv z^n), y = z^{N+1} W; (x, v) pass a short convolution."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        order = config.order
        if order < 1:
            raise ValueError(f"order={order} must be at least 1; the paper uses 2 and 3.")
        parts = (order + 1, width)
        self.xv = weights.inward(rngs, width, parts, ("parts", "channels"))
        self.conv = layers.ShortConv(parts, ("parts", "channels"), rngs, width=config.conv)
        self.filters = ImplicitFilter(
            order,
            width,
            config.length,
            rngs,
            hidden=config.filter_hidden,
            bands=config.filter_bands,
            frequency=config.filter_frequency,
        )
        self.skip = weights.weight(rngs, weights.normal(1.0), (order, width), ("parts", "channels"))
        self.o = weights.outward(rngs, (width,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"conv": None, "z": [None] * len(self.skip[...])}
        xv_BTPC, conv_tail = self.conv(
            weights.project("btd,dpc->btpc", x, self.xv), segments=segments, state=state["conv"]
        )
        z_BTC, tails = xv_BTPC[:, :, -1], []
        first = state["z"][0]
        filters_NLC = self.filters(x.shape[1] if first is None else first.shape[1] + 1)
        for n, tail in enumerate(state["z"]):
            z_BTC, tail = long_conv(
                z_BTC, filters_NLC[n], self.skip[n], segments=segments, initial_state=tail
            )
            z_BTC = xv_BTPC[:, :, n] * z_BTC
            tails.append(tail)
        y = weights.project("btc,cd->btd", z_BTC, self.o)
        return y, {"conv": conv_tail, "z": tails}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The last inputs of every convolution, all zero: at most `length` - 1 tokens."""
        order, width = self.skip.shape
        before = max(1, min(capacity, self.filters.length) - 1)
        tails = [jnp.zeros((batch, before, width), dtype) for _ in range(order)]
        return {"conv": self.conv.init_state(batch, dtype), "z": tails}
