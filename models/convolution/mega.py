"""Mega: gated attention within chunks, whose queries and keys pass a moving average over all time.

Mega: Moving Average Equipped Gated Attention (arXiv 2209.10655, section 3; Mega-chunk of 3.5).
Notable: the average, several damped real modes a channel, is the only path between chunks; a single
head has keys of few numbers, made of one shared projection; a reset gate weighs what attention read
and an update gate how much of the result replaces the input. The bias of two positions is the
rotary one of the released code, alpha^T R_{s-t} beta, which adds entries to queries and keys.
Chunks are counted inside a document. As in the released pre-norm layer, the update gate goes from
the stream itself, not its norm, to h, so this is a block; its norm is an RMS norm, one of the
released choices. The pattern `mega,glu` adds the channel mixer that follows in the paper. Maps
start with variance 1 / inputs (released: a deviation of 0.02).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from kernels.attention import attention, cached_attention
from models import cache, layers, mixer, weights
from models.parts import diagonal
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """Attention in chunks of `chunk` tokens after an average of `modes` numbers a channel."""

    modes: int = 16  # h of the paper
    key_dim: int = 0  # z of the paper; 0: a quarter of the width
    value_dim: int = 0  # v of the paper; 0: twice the width
    chunk: int = 128
    norm_eps: float = 1e-6

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module; ValueError for an odd key_dim and sizes below 1."""
        return Block(self, width, rngs)


CASES = {"mega": Config()}


class Block(mixer.Block):
    """y = x + phi * (h - x), phi = sigmoid(u W_phi), h = silu(u W_h + (r * o) U_h), u = EMA(n).

    n = norm(x); o = softmax(q k^T + b) v in chunks, v = silu(n W_v), z = silu(u W_z),
    q = gain_q z + offset_q and k likewise; r = silu(u W_r).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        for name in ("modes", "chunk"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
        key = config.key_dim or 2 * max(1, width // 8)
        value = config.value_dim or 2 * width
        if key < 2 or key % 2:
            near = max(2, key // 2 * 2)
            raise ValueError(f"key_dim={key} must be even, for rotary pairs. Use {near}.")
        if value < 1:
            raise ValueError(f"value_dim={value} is negative. Use 0 (twice the width) or more.")
        shape, dims = (width, config.modes), ("channels", "state")
        self.norm = layers.RMSNorm(width, rngs, config.norm_eps)
        small = weights.normal(0.2)
        self.alpha = weights.weight(rngs, small, shape, dims)
        self.delta = weights.weight(rngs, small, shape, dims)
        self.into = weights.weight(rngs, _alternating, shape, dims)
        self.out = weights.weight(rngs, weights.fan_in(config.modes), shape, dims)
        self.skip = weights.weight(rngs, weights.normal(1.0), (width,), ("channels",))
        self.v = weights.inward(rngs, width, (value,), ("channels",))
        self.v_bias = weights.filled(rngs, 0.0, (value,), ("channels",))
        self.z = weights.inward(rngs, width, (key,), ("key",))
        self.z_bias = weights.filled(rngs, 0.0, (key,), ("key",))
        self.r = weights.inward(rngs, width, (value,), ("channels",))
        self.r_bias = weights.filled(rngs, 0.0, (value,), ("channels",))
        self.gate = weights.inward(rngs, width, (2, width), ("parts", "channels"))
        self.gate_bias = weights.filled(rngs, 0.0, (2, width), ("parts", "channels"))
        tiny = weights.normal(0.02)
        self.gain = weights.weight(rngs, tiny, (2, key), ("parts", "key"))
        self.offset = weights.filled(rngs, 0.0, (2, key), ("parts", "key"))
        self.position = weights.weight(rngs, tiny, (2, key), ("parts", "key"))
        self.o = weights.outward(rngs, (value,), width, ("channels",))
        self.chunk = config.chunk

    def __call__(self, x, *, segments=None, state=None):
        training = state is None
        old = self.init_state(x.shape[0], x.shape[1], x.dtype) if training else state
        n_BTD = self.norm(x)
        u_BTD, average = self._average(n_BTD, segments, None if training else old["average"])
        position_BT, length_B = cache.document_positions(old["length"], segments, x.shape[1])
        q_BTK, k_BTK = self._query_and_key(u_BTD, position_BT)
        v_BTV = weights.project("btd,dv->btv", n_BTD, self.v) + self.v_bias[...]
        v_BTV = jax.nn.silu(v_BTV).astype(x.dtype)
        past = {"k": old["k"], "v": old["v"], "length": old["length"]}
        o_BTV = self._attend(q_BTK, k_BTK, v_BTV, position_BT, segments, None if training else past)
        y = constrain(self._gated(x, u_BTD, o_BTV), "batch", "time", "embed")
        fresh = {"k": k_BTK, "v": v_BTV}
        kept = {
            name: self._write(past[name], fresh[name], position_BT, length_B, segments)
            for name in fresh
        }
        return y, kept | {"average": average, "length": length_B}

    def _average(self, x, segments, state):
        """h_t = a b x_t + (1 - a d) h_{t-1}, u_t = silu(c h_t + w x_t), as in the released code."""
        alpha, delta = jax.nn.sigmoid(self.alpha[...]), jax.nn.sigmoid(self.delta[...])
        u_BTD, average = diagonal.real_modes(
            x,
            jnp.log1p(-alpha * delta),
            self.out[...] * alpha * self.into[...],
            segments=segments,
            initial_state=state,
        )
        return jax.nn.silu(u_BTD + self.skip[...] * x).astype(x.dtype), average

    def _query_and_key(self, u_BTD, position_BT):
        """q / sqrt(z) and k, each followed by the position's part of the bias."""
        dtype = mixer.wide(u_BTD.dtype)
        z_BTK = weights.project("btd,dk->btk", u_BTD, self.z).astype(dtype)
        z_BTK = jax.nn.silu(z_BTK + self.z_bias[...])
        qk_BTPK = z_BTK[:, :, None] * self.gain[...] + self.offset[...]
        scale = jnp.array([z_BTK.shape[-1] ** -0.5, 1.0], dtype)[:, None]
        # Only differences within a chunk count: small angles keep their digits.
        position_BT = position_BT % self.chunk
        turned = jnp.broadcast_to(self.position[...], qk_BTPK.shape).astype(dtype)
        qk_BTPK = jnp.concatenate([qk_BTPK * scale, layers.rotary(turned, position_BT)], axis=-1)
        qk_BTPK = qk_BTPK.astype(u_BTD.dtype)
        return qk_BTPK[:, :, 0], qk_BTPK[:, :, 1]

    def _attend(self, q_BTK, k_BTK, v_BTV, position_BT, segments, past):
        """Softmax over the earlier tokens of the same chunk, as if chunks were documents."""
        begins_BT = position_BT % self.chunk == 0
        if segments is not None:
            begins_BT &= boundaries.is_real(segments)
        chunk_BT = 1 + jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32)  # 1 goes on from the past
        if segments is not None:
            chunk_BT = jnp.where(boundaries.is_real(segments), chunk_BT, 0)
        one_head = lambda rows: rows[:, :, None]
        q_BTHK = one_head(q_BTK)

        def alone():
            k_BTHK, v_BTHV = one_head(k_BTK), one_head(v_BTV)
            return attention(
                q_BTHK, k_BTHK, v_BTHV, segments=chunk_BT, window=self.chunk, scale=1.0
            )

        def beside():
            batch, slots = past["k"].shape[:2]
            slot_S, time_T = jnp.arange(slots), slots + jnp.arange(q_BTK.shape[1])
            held_BS = slot_S < (past["length"] % self.chunk)[:, None]
            time_BT = jnp.broadcast_to(time_T, chunk_BT.shape)
            return cached_attention(
                q_BTHK,
                one_head(jnp.concatenate([past["k"].astype(k_BTK.dtype), k_BTK], axis=1)),
                one_head(jnp.concatenate([past["v"].astype(v_BTV.dtype), v_BTV], axis=1)),
                positions=time_BT,
                kv_positions=jnp.concatenate([jnp.where(held_BS, slot_S, -1), time_BT], axis=1),
                segments=chunk_BT,
                kv_segments=jnp.concatenate([jnp.ones_like(held_BS, jnp.int32), chunk_BT], axis=1),
                window=slots + self.chunk,
                scale=1.0,
            )

        if past is None:
            return alone()[:, :, 0]
        if q_BTK.shape[1] == 1:
            return beside()[:, :, 0]
        return jax.lax.cond(jnp.all(past["length"] == 0), alone, beside)[:, :, 0]

    def _write(self, old_BSK, new_BTK, position_BT, length_B, segments):
        """The tokens of the last document's open chunk; zeros in the slots still to come."""
        slots = old_BSK.shape[1]
        opened_B = length_B // self.chunk * self.chunk
        slot_BT = position_BT - opened_B[:, None]
        written_BT, kept_B = slot_BT >= 0, jnp.ones_like(length_B, bool)
        if segments is not None:
            written_BT &= boundaries.of_last(segments)
            kept_B = boundaries.goes_on(segments)
        kept_BS = kept_B[:, None] & (jnp.arange(slots) < (length_B - opened_B)[:, None])
        kept_BSK = jnp.where(kept_BS[..., None], old_BSK, 0)
        slot_BT = jnp.where(written_BT, slot_BT, slots)  # the last index is dropped
        rows_B1 = jnp.arange(old_BSK.shape[0])[:, None]
        return kept_BSK.at[rows_B1, slot_BT].set(new_BTK.astype(old_BSK.dtype), mode="drop")

    def _gated(self, x, u_BTD, o_BTV):
        """x + phi * (silu(u W_h + (r * o) U_h + b_h) - x), the sum in the wide dtype."""
        r_BTV = jax.nn.silu(weights.project("btd,dv->btv", u_BTD, self.r) + self.r_bias[...])
        gate_BTPD = weights.project("btd,dpc->btpc", u_BTD, self.gate) + self.gate_bias[...]
        read_BTD = weights.project("btv,vd->btd", (r_BTV * o_BTV).astype(x.dtype), self.o)
        # Without a layout of its own XLA mixes up rows of a mesh where tokens are few (0.10, 0.12).
        read_BTD = constrain(read_BTD, "batch", "time", "embed")
        h_BTD = jax.nn.silu(gate_BTPD[:, :, 1] + read_BTD)
        stream = x.astype(mixer.wide(x.dtype))
        return (stream + jax.nn.sigmoid(gate_BTPD[:, :, 0]) * (h_BTD - stream)).astype(x.dtype)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Keys and values of an open chunk, the average's modes, and the document's length."""
        slots = min(capacity, self.chunk)
        key, value = 2 * self.z.shape[1], self.v.shape[1]
        return {
            "k": jnp.zeros((batch, slots, key), dtype),
            "v": jnp.zeros((batch, slots, value), dtype),
            "average": jnp.zeros((batch, self.alpha.size), mixer.wide(dtype)),
            "length": jnp.zeros(batch, jnp.int32),
        }


def _alternating(key, shape):
    """1, -1, 1, .. over the modes, with a little noise, as in the released code."""
    sign = jnp.where(jnp.arange(shape[1]) % 2 == 0, 1.0, -1.0)
    return sign + 0.02 * jax.random.normal(key, shape)
