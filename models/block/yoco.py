"""YOCO: the lower half of the layers is efficient, the upper half reads one shared key-value cache.

You Only Cache Once (arXiv 2405.05254, section 2). Notable: keys and values are made once, from the
output of the lower half (self-decoder), whose state is bounded; every layer of the upper half
(cross-decoder) attends to them with queries of its own, so the cache does not grow with depth. Give
it all layers of the model to have the paper's; the pattern is then this one block.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights
from models.parts import sublayer


@dataclasses.dataclass
class Config:
    """Mixers of the lower half, in order; number and channel mixer of the upper layers."""

    below: tuple[Any, ...]
    channel: Any
    above: int = 2  # layers that share the cache
    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module; ValueError where heads and width do not fit."""
        return Block(self, width, rngs)


class Block(mixer.Block):
    """x += below_i(x); k, v = norm(x) W; then x += attention(norm(x) W_i, k, v), x += c_i(x)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, groups = config.heads, config.kv_heads or config.heads
        dim, eps = checks.split_heads(width, heads), config.norm_eps
        checks.groups(heads, groups)
        if config.above < 1:
            raise ValueError(f"above={config.above} must be at least 1 layer that reads the cache.")
        self.below = sublayer.sublayers(config.below, width, rngs, eps)
        self.norm = layers.RMSNorm(width, rngs, eps)
        shared = "heads" if groups > 1 else "groups"
        self.kv = weights.inward(rngs, width, (2, groups, dim), ("parts", shared, "key"))
        count = range(config.above)
        self.norms = nnx.List([layers.RMSNorm(width, rngs, eps) for _ in count])
        self.q = nnx.List(
            [weights.inward(rngs, width, (heads, dim), ("heads", "key")) for _ in count]
        )
        self.o = nnx.List(
            [weights.outward(rngs, (heads, dim), width, ("heads", "key")) for _ in count]
        )
        self.channels = sublayer.sublayers([config.channel] * config.above, width, rngs, eps)
        self.rope_base, self.cache_shape = config.rope_base, (groups, dim)

    def __call__(self, x, *, segments=None, state=None):
        batch, length, _ = x.shape
        olds = state or {"below": None, "kv": self._cache(batch, length, x.dtype), "channels": None}
        below, channels = [], []
        for part, old in zip(self.below, sublayer.before(olds["below"], self.below), strict=True):
            y, after = part(x, segments=segments, state=old)
            x = x + y
            below.append(after)

        position_BT = cache.positions(olds["kv"]["length"], segments, length)
        kv_BTPGK = weights.project("btd,dpgk->btpgk", self.norm(x), self.kv)
        tokens = {"k": layers.rotary(kv_BTPGK[:, :, 0], position_BT, self.rope_base)}
        tokens["v"] = kv_BTPGK[:, :, 1]
        new = olds["kv"]
        before = sublayer.before(olds["channels"], self.channels)
        for i, old in enumerate(before):
            q_BTHK = weights.project("btd,dhk->bthk", self.norms[i](x), self.q[i])
            q_BTHK = layers.rotary(q_BTHK, position_BT, self.rope_base)
            o_BTHK, new = self._read(
                q_BTHK, tokens, olds["kv"], position_BT, segments, state is None
            )
            x = x + weights.project("bthk,hkd->btd", o_BTHK, self.o[i])
            y, after = self.channels[i](x, segments=segments, state=old)
            x = x + y
            channels.append(after)
        return x, {"below": tuple(below), "kv": new, "channels": tuple(channels)}

    def _read(self, q_BTHK, tokens, old, position_BT, segments, training):
        """One upper layer's attention; all of them write the same cache."""
        return cache.attend(
            tokens,
            old,
            position_BT,
            segments,
            training=training,
            alone=lambda: attention(q_BTHK, tokens["k"], tokens["v"], segments=segments),
            beside=lambda seen, **where: cached_attention(q_BTHK, seen["k"], seen["v"], **where),
        )

    def _cache(self, batch, slots, dtype):
        return cache.empty(batch, slots, dtype, k=self.cache_shape, v=self.cache_shape)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """States of the lower mixers and of the channel mixers, and the one cache."""
        return {
            "below": tuple(part.init_state(batch, capacity, dtype) for part in self.below),
            "kv": self._cache(batch, capacity, dtype),
            "channels": tuple(part.init_state(batch, capacity, dtype) for part in self.channels),
        }
