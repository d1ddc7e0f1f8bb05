"""RWKV-5 (Eagle): linear attention with a learned constant decay for every channel of the keys.

Eagle and Finch (arXiv 2404.05892, section 4.1). Notable: every map reads a learned mix
of a token and the one before it; a token reads before its own write decays and weighs that write by
the bonus u; the output passes a group norm by head and a silu gate. Decays, bonuses and mixes start
as in the released code; maps at variance 1 / fan-in.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights
from models.parts import rwkv


@dataclasses.dataclass
class Config:
    """Heads; the paper's are 64 wide."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    depth: float = 0.5  # layer / layers, which the start of mixes, decays and bonuses depends on

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or depth do not fit."""
        return Mixer(self, width, rngs)


CASES = {"rwkv5": Config()}


class Mixer(mixer.Mixer):
    """S_t = diag(w) S_{t-1} + k_t v_t^T, o_t = r_t (S_{t-1} + diag(u) k_t v_t^T), gated."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, depth = config.heads, config.depth
        dim = config.head_dim or checks.split_heads(width, heads)
        rwkv.check_depth(depth)
        shallow = 1 - depth
        powers = (0.5 * shallow, shallow, shallow, 0.5 * shallow)
        self.mix = rwkv.mix(rngs, width, powers, (0.0, 0.0, 0.3 * depth, 0.0))
        self.rkvg = weights.weight(
            rngs,
            weights.fan_in(width),
            (4, width, heads, dim),
            ("parts", "embed", "heads", "key"),
        )
        self.speed = weights.weight(rngs, rwkv.decay_speed(depth), (heads, dim), ("heads", "key"))
        self.bonus = weights.weight(rngs, rwkv.bonus(depth), (heads, dim), ("heads", "key"))
        self.norm = weights.filled(rngs, 1.0, (heads, dim), ("heads", "key"))
        self.norm_bias = weights.filled(rngs, 0.0, (heads, dim), ("heads", "key"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.state_shape = (heads, dim, dim)

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"x": None, "s": None}
        before_BTD, last = layers.token_shift(x, segments, state["x"])
        mixed_BTPD = x[:, :, None] + (before_BTD - x)[:, :, None] * self.mix[...]
        rkvg_BTPHK = weights.project("btpd,pdhk->btphk", mixed_BTPD.astype(x.dtype), self.rkvg)
        log_decay_HK = -jnp.exp(self.speed[...].astype(mixer.wide(x.dtype)))
        v_BTHK = rkvg_BTPHK[:, :, 2]
        o_BTHK, s_BHKV = gated_linear(
            rkvg_BTPHK[:, :, 0],
            rkvg_BTPHK[:, :, 1],
            v_BTHK,
            jnp.broadcast_to(log_decay_HK, v_BTHK.shape),
            bonus=self.bonus[...],
            segments=segments,
            initial_state=state["s"],
            scale=1.0,
        )
        o_BTHK = layers.layer_norm(o_BTHK, self.norm[...], self.norm_bias[...], rwkv.NORM_EPS)
        o_BTHK = o_BTHK * jax.nn.silu(rkvg_BTPHK[:, :, 3])
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), {"x": last, "s": s_BHKV}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The token before (B, 1, D) and the matrix state (B, H, K, V), all zero."""
        return {
            "x": jnp.zeros((batch, 1, self.mix.shape[1]), dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }
