"""Multi-head latent attention: keys and values of all heads come from one small vector a token.

DeepSeek-V2 (arXiv 2405.04434, section 2.1, eqs. 9 to 19). Notable: the state holds that latent and
one rotary key, and beside it the up-projections are absorbed: W_uk moves into the query and W_uv
behind the softmax, which makes decoding multi-query attention over the latents. Training spells out
the heads' keys and values, which costs fewer operations. Weights start with variance 1 / inputs
(the paper: standard deviation 0.006).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Sizes of a head and of the latents; 0 takes the paper's share of the head."""

    heads: int = 4
    head_dim: int = 0  # of a key's part without position, and of a value; 0: width / heads
    rope_dim: int = 0  # of the rotary part, whose key all heads share; 0: half of head_dim
    kv_rank: int = 0  # of the latent of keys and values; 0: 4 head_dim
    q_rank: int = 0  # of the latent of queries; 0: none, as in DeepSeek-V2-Lite
    rope_base: float = 10_000.0

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the sizes do not fit."""
        return Mixer(self, width, rngs)


CASES = {"mla": Config(), "mla_low_rank": Config(rope_dim=4, kv_rank=24, q_rank=40)}


class Mixer(mixer.Mixer):
    """c = norm(W_dkv x), k = [W_uk c, rope(W_kr x)], v = W_uv c; softmax attention of all heads."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = config.head_dim or checks.split_heads(width, heads)
        rope = config.rope_dim or max(2, dim // 4 * 2)
        rank = config.kv_rank or 4 * dim
        _check(config, dim, rope, rank)
        self.has_q_latent = config.q_rank > 0
        if self.has_q_latent:
            self.q_down = weights.inward(rngs, width, (config.q_rank,), ("rank",))
            self.q_norm = weights.filled(rngs, 1.0, (config.q_rank,), ("rank",))
        inputs = (config.q_rank, "rank") if self.has_q_latent else (width, "embed")
        self.q = _up(rngs, *inputs, (heads, dim + rope), "key")
        self.kv_down = weights.inward(rngs, width, (rank,), ("rank",))
        self.kv_norm = weights.filled(rngs, 1.0, (rank,), ("rank",))
        self.k_rope = weights.inward(rngs, width, (rope,), ("key",))
        self.k_up = _up(rngs, rank, "rank", (heads, dim), "key")
        self.v_up = _up(rngs, rank, "rank", (heads, dim), "value")
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "value"))
        self.dim, self.rope, self.rank = dim, rope, rank
        self.rope_base = config.rope_base

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = cache.positions(old["length"], segments, x.shape[1])
        q_BTHK, q_rope_BTHK = self._queries(x, positions_BT)
        c_BTR = weights.project("btd,dr->btr", x, self.kv_down)
        c_BTR = layers.rms_norm(c_BTR, self.kv_norm[...])
        k_rope_BT1K = weights.project("btd,dk->btk", x, self.k_rope)[:, :, None]
        k_rope_BT1K = layers.rotary(k_rope_BT1K, positions_BT, self.rope_base)

        def spelled_out():
            shared_BTHK = jnp.broadcast_to(k_rope_BT1K, q_rope_BTHK.shape)
            k_BTHK = weights.project("btr,rhk->bthk", c_BTR, self.k_up)
            return attention(
                jnp.concatenate([q_BTHK, q_rope_BTHK], axis=-1),
                jnp.concatenate([k_BTHK, shared_BTHK], axis=-1),
                weights.project("btr,rhv->bthv", c_BTR, self.v_up),
                segments=segments,
            )

        def absorbed(seen, **where):
            q_BTHR = weights.project("bthk,rhk->bthr", q_BTHK, self.k_up)
            o_BTHR = cached_attention(
                jnp.concatenate([q_BTHR, q_rope_BTHK], axis=-1),
                seen["key"],
                seen["key"][..., : self.rank],
                scale=(self.dim + self.rope) ** -0.5,
                **where,
            )
            return weights.project("bthr,rhv->bthv", o_BTHR, self.v_up)

        o_BTHV, new = cache.attend(
            {"key": jnp.concatenate([c_BTR[:, :, None], k_rope_BT1K], axis=-1)},
            old,
            positions_BT,
            segments,
            training=state is None,
            alone=spelled_out,
            beside=absorbed,
        )
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), new

    def _queries(self, x, positions_BT):
        """The heads' queries: the part without position, and the turned part."""
        if self.has_q_latent:
            c_BTR = weights.project("btd,dr->btr", x, self.q_down)
            c_BTR = layers.rms_norm(c_BTR, self.q_norm[...])
            q_BTHK = weights.project("btr,rhk->bthk", c_BTR, self.q)
        else:
            q_BTHK = weights.project("btd,dhk->bthk", x, self.q)
        turned_BTHK = layers.rotary(q_BTHK[..., self.dim :], positions_BT, self.rope_base)
        return q_BTHK[..., : self.dim], turned_BTHK

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Empty slots of one key, the latent and the rotary part, for all heads."""
        return cache.empty(batch, capacity, dtype, key=(1, self.rank + self.rope))


def _up(rngs, inputs, dim_in, shape, dim_out):
    """A map from `inputs` numbers to the heads, of variance 1 / inputs."""
    init = weights.fan_in(inputs)
    return weights.weight(rngs, init, (inputs, *shape), (dim_in, "heads", dim_out))


def _check(config: Config, dim: int, rope: int, rank: int) -> None:
    """ValueError, one line, for sizes that do not fit."""
    if config.heads < 1 or dim < 1:
        raise ValueError(f"heads={config.heads} of head_dim={dim}: both must be at least 1.")
    if rope < 2 or rope % 2:
        near = max(2, rope + rope % 2)
        raise ValueError(f"rope_dim={rope} must be an even number of at least 2. Use {near}.")
    if rank < 1:
        raise ValueError(f"kv_rank={rank} must be at least 1. Use 0 (4 head_dim = {4 * dim}).")
    if config.q_rank < 0:
        raise ValueError(f"q_rank={config.q_rank} is negative. Use 0 (no latent) or at least 1.")
    if config.rope_base <= 1:
        raise ValueError(f"rope_base={config.rope_base} must be above 1; 10000.0 is usual.")
