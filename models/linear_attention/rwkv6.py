"""RWKV-6 (Finch): RWKV-5 whose decays and token mixes depend on the token through low-rank maps.

Eagle and Finch (arXiv 2404.05892, section 4.2). Notable: "ddlerp", the mix of a token and the one
before it, is itself a low-rank function of such a mix; the decay is exp(-exp(w_t)).
Decays, bonuses and mixes start as in the released code, but of each low-rank map the second factor
is small and the first at variance 1 / fan-in; there the first is zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights
from models.parts import rwkv

START = 1e-2  # scale of the low-rank maps' second factors


@dataclasses.dataclass
class Config:
    """Heads, 64 wide in the paper, and the ranks of the maps that see the token."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    mix_rank: int = 32  # of each of the five mixes
    decay_rank: int = 64
    depth: float = 0.5  # layer / layers, which the start of mixes, decays and bonuses depends on

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, ranks or depth do not fit."""
        return Mixer(self, width, rngs)


CASES = {"rwkv6": Config()}


class Mixer(mixer.Mixer):
    """S_t = diag(w_t) S_{t-1} + k_t v_t^T, o_t = r_t (S_{t-1} + diag(u) k_t v_t^T), gated."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, depth, rank = config.heads, config.depth, config.mix_rank
        dim = config.head_dim or checks.split_heads(width, heads)
        rwkv.check_depth(depth)
        if rank < 1:
            raise ValueError(f"mix_rank={rank} must be at least 1; the paper uses 32.")
        shallow, dims = 1 - depth, ("heads", "key")
        self.first_mix = rwkv.mix(rngs, width, (shallow,))
        powers = (0.5 * shallow, shallow, shallow, 0.5 * shallow, shallow)
        self.mix = rwkv.mix(rngs, width, powers, (0.0, 0.0, 0.3 * depth, 0.0, 0.0))
        self.mix_down = weights.inward(rngs, width, (5, rank), ("parts", "rank"))
        self.mix_up = weights.weight(
            rngs, weights.normal(START), (5, rank, width), ("parts", "rank", "embed")
        )
        self.rkvg = weights.weight(
            rngs, weights.fan_in(width), (4, width, heads, dim), ("parts", "embed", *dims)
        )
        self.speed = layers.LowRank(
            width,
            config.decay_rank,
            (heads, dim),
            dims,
            rngs,
            activation=jnp.tanh,
            init=weights.normal(START),
            bias=rwkv.decay_speed(depth),
        )
        self.bonus = weights.weight(rngs, rwkv.bonus(depth), (heads, dim), dims)
        self.norm = weights.filled(rngs, 1.0, (heads, dim), dims)
        self.norm_bias = weights.filled(rngs, 0.0, (heads, dim), dims)
        self.o = weights.outward(rngs, (heads, dim), width, dims)
        self.state_shape = (heads, dim, dim)

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"x": None, "s": None}
        mixed_BTPD, last = self._mix(x, segments, state["x"])
        rkvg_BTPHK = weights.project("btpd,pdhk->btphk", mixed_BTPD[:, :, :4], self.rkvg)
        o_BTHK, s_BHKV = gated_linear(
            rkvg_BTPHK[:, :, 0],
            rkvg_BTPHK[:, :, 1],
            rkvg_BTPHK[:, :, 2],
            -jnp.exp(self.speed(mixed_BTPD[:, :, 4])),
            bonus=self.bonus[...],
            segments=segments,
            initial_state=state["s"],
            scale=1.0,
        )
        o_BTHK = layers.layer_norm(o_BTHK, self.norm[...], self.norm_bias[...], rwkv.NORM_EPS)
        o_BTHK = o_BTHK * jax.nn.silu(rkvg_BTPHK[:, :, 3])
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), {"x": last, "s": s_BHKV}

    def _mix(self, x, segments, last):
        """ddlerp: x_t + (x_{t-1} - x_t) (mix + tanh(x' A) B), x' a mix too; r, k, v, g and w's."""
        before_BTD, last = layers.token_shift(x, segments, last)
        change_BTD = before_BTD - x
        first_BTD = (x + change_BTD * self.first_mix[0]).astype(x.dtype)
        hidden_BTPR = jnp.tanh(weights.project("btd,dpr->btpr", first_BTD, self.mix_down))
        mix_BTPD = weights.project("btpr,prd->btpd", hidden_BTPR, self.mix_up)
        mixed_BTPD = x[:, :, None] + change_BTD[:, :, None] * (mix_BTPD + self.mix[...])
        return mixed_BTPD.astype(x.dtype), last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The token before (B, 1, D) and the matrix state (B, H, K, V), all zero."""
        return {
            "x": jnp.zeros((batch, 1, self.mix.shape[1]), dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }
