"""RWKV-7 (Goose): a delta rule with vector decays, in-context learning rates and free removal keys.

RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456, section 4). Notable: what
is removed (kappa-hat) and what is written (k) are two keys; the rate a and the decay are vectors,
the decay never below exp(-0.607). The paper mixes each layer's value with the first layer's; a
mixer sees one layer only, so that is left out. Weights start as in the released code, but the
output map, zero there, has variance 1 / fan-in, and maps are normal, not orthogonal.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.delta_rule import dplr
from models import checks, layers, mixer, weights
from models.parts import rwkv

FASTEST = 0.6065306597  # exp(-1/2): -log of the fastest decay


@dataclasses.dataclass
class Config:
    """Heads, 64 wide in the paper, and the ranks of the maps that make the gates."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    decay_rank: int = 0  # 0: 2.5 sqrt(width) in steps of 32, at least 32
    rate_rank: int = 0  # 0: as decay_rank
    gate_rank: int = 0  # 0: 5 sqrt(width) in steps of 32, at least 32
    depth: float = 0.5  # layer / layers, which the start of mixes, decays and norms depends on

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, ranks or depth do not fit."""
        return Mixer(self, width, rngs)


CASES = {"rwkv7": Config()}


class Mixer(mixer.Mixer):
    """S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T, o_t = r_t S_t + bonus."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, depth, dims = config.heads, config.depth, ("heads", "key")
        shape = (heads, config.head_dim or checks.split_heads(width, heads))
        rwkv.check_depth(depth)
        shallow = 1 - depth
        powers = tuple(p * shallow for p in (0.2, 0.7, 0.7, 0.9, 0.9, 0.2))  # r k v w a g
        self.mix = rwkv.mix(rngs, width, powers)
        draw = lambda gain: weights.weight(
            rngs, weights.fan_in(width, gain=gain), (width, *shape), ("embed", *dims)
        )
        self.r, self.k, self.v = draw(1.0), draw(0.1), draw(1.0)
        small = weights.normal(0.1 / max(shape) ** 0.5)
        decay_rank = config.decay_rank or _rank(2.5, width)
        rate_rank = config.rate_rank or _rank(2.5, width)
        gate_rank = config.gate_rank or _rank(5.0, width)
        self.speed = layers.LowRank(
            *(width, decay_rank, shape, dims, rngs),
            activation=jnp.tanh,
            init=small,
            bias=_speed(depth),
        )
        self.rate = layers.LowRank(*(width, rate_rank, shape, dims, rngs), init=small, bias=_rate)
        self.gate = layers.LowRank(
            *(width, gate_rank, shape, dims, rngs),
            activation=jax.nn.sigmoid,
            init=weights.fan_in(gate_rank),
            bias=None,
        )
        self.removal = weights.weight(
            rngs, lambda key, shape: 0.76 - 0.1 * rwkv.channels(shape), shape, dims
        )
        self.rate_in_key = weights.filled(rngs, 1.02, shape, dims)
        self.bonus = weights.filled(rngs, -0.04, shape, dims)
        self.norm = weights.filled(rngs, max(depth, 0.04) ** 0.7, shape, dims)
        self.norm_bias = weights.filled(rngs, 0.0, shape, dims)
        self.o = weights.outward(rngs, shape, width, dims)
        self.state_shape = (*shape, shape[1])

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"x": None, "s": None}
        dtype = mixer.wide(x.dtype)
        before_BTD, last = layers.token_shift(x, segments, state["x"])
        r_BTD, k_BTD, v_BTD, w_BTD, a_BTD, g_BTD = (
            (x + (before_BTD - x) * mix_D).astype(x.dtype) for mix_D in self.mix[...]
        )
        r_BTHK = weights.project("btd,dhk->bthk", r_BTD, self.r).astype(dtype)
        k_BTHK = weights.project("btd,dhk->bthk", k_BTD, self.k).astype(dtype)
        v_BTHK = weights.project("btd,dhk->bthk", v_BTD, self.v)
        a_BTHK = jax.nn.sigmoid(self.rate(a_BTD))
        kappa_BTHK = layers.l2_norm(k_BTHK * self.removal[...])
        k_BTHK = k_BTHK * (1 + (a_BTHK - 1) * self.rate_in_key[...])
        o_BTHK, s_BHKV = dplr(
            r_BTHK,
            k_BTHK,
            v_BTHK,
            -kappa_BTHK,
            kappa_BTHK * a_BTHK,
            -FASTEST * jax.nn.sigmoid(self.speed(w_BTD)),
            segments=segments,
            initial_state=state["s"],
            scale=1.0,
        )
        o_BTHK = layers.layer_norm(o_BTHK, self.norm[...], self.norm_bias[...], rwkv.NORM_EPS)
        own_BTH1 = jnp.sum(r_BTHK * k_BTHK * self.bonus[...], axis=-1, keepdims=True)
        o_BTHK = (o_BTHK + own_BTH1.astype(x.dtype) * v_BTHK) * self.gate(g_BTD).astype(x.dtype)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), {"x": last, "s": s_BHKV}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The token before (B, 1, D) and the matrix state (B, H, K, V), all zero."""
        return {
            "x": jnp.zeros((batch, 1, self.mix.shape[1]), dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }


def _rank(factor: float, width: int) -> int:
    """factor sqrt(width) in steps of 32, as in the released code."""
    return max(32, round(factor * width**0.5 / 32) * 32)


def _zigzag(shape):
    """From -1 to 1 across each head, flat in the middle."""
    position = 2 * jnp.arange(shape[-1]) / max(shape[-1] - 1, 1) - 1
    return jnp.broadcast_to(position * jnp.abs(position), shape)


def _speed(depth: float) -> weights.Initializer:
    """What the decay's sigmoid sees at the start: slow channels first, fast ones last."""

    def init(key, shape):
        ramp = rwkv.channels(shape) ** (1 + depth**0.3)
        return -5.5 + 6 * ramp + 2.5 * _zigzag(shape)

    return init


def _rate(key, shape):
    """What the learning rate's sigmoid sees at the start."""
    return -0.19 + 0.3 * _zigzag(shape) + 0.4 * (rwkv.channels(shape) - 0.5)
