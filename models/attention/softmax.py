"""Softmax attention with grouped heads, rotary positions and an optional sliding window.

Attention Is All You Need (arXiv 1706.03762, eq. 1), grouped queries (2305.13245), rotary positions
(2104.09864). Notable: the state is a ring of keys and values, so a window bounds it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import layers, mixer


@dataclasses.dataclass
class Config:
    """Multi-head (kv_heads = heads), grouped-query, or multi-query (kv_heads = 1) attention."""

    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    window: int = 0  # tokens that a query sees, itself included; 0: all
    rope_base: float = 10_000.0  # 0: no positions

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, kv_heads and width do not fit."""
        return Mixer(self, width, rngs)


CASES = (Config(), Config(kv_heads=1, window=16))  # what the contract is proven for


class Mixer(mixer.Mixer):
    """o_t = softmax_s(q_t k_s / sqrt(K)) v_s over the visible s, then the output projection."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, groups = config.heads, config.kv_heads or config.heads
        dim = config.head_dim or layers.split_heads(width, heads)
        if groups < 1 or heads % groups:
            fits = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
            raise ValueError(f"kv_heads={groups} does not divide heads={heads}. Use one of {fits}.")
        if config.rope_base and dim % 2:
            raise ValueError(f"head_dim={dim} is odd; rotary positions need pairs. Use {dim + 1}.")
        if config.window < 0:
            raise ValueError(f"window={config.window} is negative. Use 0 (all) or at least 1.")
        init = layers.fan_in(width)
        self.q = layers.weight(rngs, init, (width, heads, dim), ("embed", "heads", "key"))
        shared = "heads" if groups > 1 else "groups"  # a single head is whole on every device
        self.kv = layers.weight(
            rngs, init, (width, 2, groups, dim), ("embed", "parts", shared, "key")
        )
        out = layers.fan_in(heads, dim)
        self.o = layers.weight(rngs, out, (heads, dim, width), ("heads", "key", "embed"))
        self.window, self.rope_base = config.window, config.rope_base
        self.cache_shape = (groups, dim)

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = _positions(old["length"], segments, x.shape[1])
        q_BTHK = layers.project("btd,dhk->bthk", x, self.q)
        kv_BTPGK = layers.project("btd,dpgk->btpgk", x, self.kv)
        k_BTGK, v_BTGK = kv_BTPGK[:, :, 0], kv_BTPGK[:, :, 1]
        if self.rope_base:
            q_BTHK = layers.rotary(q_BTHK, positions_BT, self.rope_base)
            k_BTGK = layers.rotary(k_BTGK, positions_BT, self.rope_base)

        new = _write(old, k_BTGK, v_BTGK, positions_BT, segments)
        if state is None:
            o_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, segments)
        elif x.shape[1] == 1:
            o_BTHK = cached_attention(
                q_BTHK,
                new["k"],
                new["v"],
                positions=positions_BT,
                kv_positions=new["place"] - 1,
                window=self.window,
            )
        else:  # a fresh cache costs nothing; a continued one is read beside the new tokens
            o_BTHK = jax.lax.cond(
                jnp.all(old["length"] == 0),
                lambda: self._attend(q_BTHK, k_BTGK, v_BTGK, segments),
                lambda: self._attend_both(q_BTHK, k_BTGK, v_BTGK, positions_BT, segments, old),
            )
        return layers.project("bthk,hkd->btd", o_BTHK, self.o), new

    def _attend(self, q, k, v, segments):
        return attention(q, k, v, segments=segments, window=self.window)

    def _attend_both(self, q, k, v, positions, segments, cache):
        kv_segments = None
        if segments is not None:
            first, _ = mixer.first_and_last(segments)
            cached = jnp.broadcast_to(first[:, None], cache["place"].shape)
            kv_segments = jnp.concatenate([cached, segments], axis=1)
        return cached_attention(
            q,
            jnp.concatenate([cache["k"].astype(k.dtype), k], axis=1),
            jnp.concatenate([cache["v"].astype(v.dtype), v], axis=1),
            positions=positions,
            kv_positions=jnp.concatenate([cache["place"] - 1, positions], axis=1),
            segments=segments,
            kv_segments=kv_segments,
            window=self.window,
        )

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """An empty ring of `capacity` (at most `window`) slots; `place` is 1 + position."""
        slots = min(capacity, self.window or capacity)
        return {
            "k": jnp.zeros((batch, slots, *self.cache_shape), dtype),
            "v": jnp.zeros((batch, slots, *self.cache_shape), dtype),
            "place": jnp.zeros((batch, slots), jnp.int32),
            "length": jnp.zeros(batch, jnp.int32),
        }


def _positions(length_B, segments, count):
    """Tokens of the row before each new one; padding, which is as if it were not there, repeats."""
    if segments is None:
        return length_B[:, None] + jnp.arange(count, dtype=jnp.int32)
    return length_B[:, None] + jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1


def _write(cache, k_BTGK, v_BTGK, positions_BT, segments):
    """Put the new tokens into the ring; only tokens of the row's last document stay visible."""
    batch, slots = cache["place"].shape
    count, kept = k_BTGK.shape[1], cache["place"]
    total_B = positions_BT[:, -1] + 1
    written_BT = positions_BT >= total_B[:, None] - slots
    if segments is not None:
        first, last = mixer.first_and_last(segments)
        written_BT &= (segments == last[:, None]) & (segments != 0)
        kept = jnp.where((first == last)[:, None], kept, 0)
    slot_BT = jnp.where(written_BT, positions_BT % slots, slots)  # the last index is dropped

    def put(old, new):
        new = new.astype(old.dtype)
        if batch == count == 1 and segments is None:  # decoding one row: no scatter
            at = (0, slot_BT[0, 0], *(0,) * (old.ndim - 2))
            return jax.lax.dynamic_update_slice(old, new, at)
        return old.at[jnp.arange(batch)[:, None], slot_BT].set(new, mode="drop")

    return {
        "k": put(cache["k"], k_BTGK),
        "v": put(cache["v"], v_BTGK),
        "place": put(kept, positions_BT + 1),
        "length": total_B,
    }
