"""Softmax attention of an encoder: every token sees its whole document, or both sides nearby.

BERT (arXiv 1810.04805) with the rotary positions and the local layers of ModernBERT (arXiv
2412.13663, section 2.1). Notable: no state, so it cannot decode; a local layer reads blocks of
queries beside the blocks around them, so its time is O(T reach).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import chunks
from kernels import segments as packed
from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights
from models.parts import rotary

STATELESS = (
    "attention.bidirectional is bidirectional: it has no state to decode from. "
    "Use it in an encoder."
)


@dataclasses.dataclass
class Config:
    """Heads, and how far a token sees."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    reach: int = 0  # tokens seen on each side (ModernBERT's local layers: 64); 0: all
    rope_base: float = 10_000.0  # 0: no positions
    qk_norm: bool = False  # RMS norm of every head's q and k

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, reach and width do not fit."""
        return Mixer(self, width, rngs)


CASES = {"bidirectional": Config(), "bidirectional_local": Config(reach=6, qk_norm=True)}


class Mixer(mixer.Mixer):
    """o_t = softmax_s(q_t k_s / sqrt(K)) v_s over the document, or over |t - s| <= reach."""

    causal = False

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = config.head_dim or checks.split_heads(width, heads)
        if heads < 1 or dim < 1:
            raise ValueError(f"heads={heads} of head_dim={dim}: both must be at least 1.")
        checks.window(config.reach, "reach")
        self.rotary = rotary.Rotary(config.rope_base) if config.rope_base else None
        if self.rotary is not None:
            self.rotary.check(dim)
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        self.norms = (
            weights.filled(rngs, 1.0, (2, dim), ("parts", "key")) if config.qk_norm else None
        )
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.reach = config.reach

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            raise ValueError(STATELESS)
        nothing_B = jnp.zeros(x.shape[0], jnp.int32)
        positions_BT = cache.positions(nothing_B, segments, x.shape[1])
        qkv_BTPHK = weights.project("btd,dphk->btphk", x, self.qkv)
        q_BTHK, k_BTHK, v_BTHK = (qkv_BTPHK[:, :, i] for i in range(3))
        if self.norms is not None:
            q_BTHK = layers.rms_norm(q_BTHK, self.norms[0])
            k_BTHK = layers.rms_norm(k_BTHK, self.norms[1])
        if self.rotary is not None:
            q_BTHK = self.rotary(q_BTHK, positions_BT)
            k_BTHK = self.rotary(k_BTHK, positions_BT)
        if self.reach:
            o_BTHK = _local(q_BTHK, k_BTHK, v_BTHK, segments, self.reach)
        else:
            o_BTHK = attention(q_BTHK, k_BTHK, v_BTHK, segments=segments, causal=False)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Refused: there is nothing to decode from."""
        raise ValueError(STATELESS)


def _local(q_BTHK, k_BTHK, v_BTHK, segments, reach: int):
    """Attention within `reach` on both sides: blocks of queries, each beside three of keys.

    A query that stands `reach` later sees, causally, a window of 2 reach + 1 around itself.
    """
    batch, length = q_BTHK.shape[:2]
    size = min(length, max(reach, 32))
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    segments = packed.numbered(segments)  # whose numbers are compared: none comes back
    q, k, v, segments = chunks.pad((q_BTHK, k_BTHK, v_BTHK, segments), size)
    time = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)

    def blocks(x):
        return x.reshape(-1, size, *x.shape[2:])

    def around(x):
        x = x.reshape(batch, -1, size, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (1, 1)) + ((0, 0),) * (x.ndim - 2))
        beside = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return beside.reshape(-1, 3 * size, *x.shape[3:])

    o = cached_attention(
        blocks(q),
        around(k),
        around(v),
        positions=blocks(time) + reach,
        kv_positions=around(time),
        segments=blocks(segments),
        kv_segments=around(segments),
        window=2 * reach + 1,
    )
    return o.reshape(batch, -1, *o.shape[2:])[:, :length]
