"""Differential attention: the difference of two softmax maps, in which common noise cancels.

Differential Transformer (arXiv 2410.05258, section 2.1, eqs. 1 to 3). Notable: a head has two
queries and two keys of K numbers and one value of 2 K, so there are half as many heads as in
softmax attention of the same width; the output of each head passes an RMS norm of its own and is
scaled by 1 - lambda_init. The paper sets lambda_init = 0.8 - 0.6 exp(-0.3 (depth - 1)); here it is
a number, as a layer does not know its depth, and 0.8 is what the paper tried for all layers alike.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Heads of two maps each, with rotary positions."""

    heads: int = 2
    key_dim: int = 0  # of one map; 0: width / heads / 2. A value has 2 key_dim
    lambda_init: float = 0.8  # 0.2 in the first layer of a deep model, rising to 0.8
    rope_base: float = 10_000.0

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the heads do not fit the width."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """o = (softmax(q_1 k_1 / sqrt(K)) - lambda softmax(q_2 k_2 / sqrt(K))) v, y = norm(o) W.

    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init, one number for all heads.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        key = _key_dim(config, width)
        dims = ("parts", "heads", "key")
        self.q = weights.inward(rngs, width, (2, heads, key), dims)
        self.k = weights.inward(rngs, width, (2, heads, key), dims)
        self.v = weights.inward(rngs, width, (heads, 2 * key), ("heads", "value"))
        draw = weights.normal(0.1)
        self.lambda_q = weights.weight(rngs, draw, (2, key), ("parts", "key"))
        self.lambda_k = weights.weight(rngs, draw, (2, key), ("parts", "key"))
        self.norm = weights.filled(rngs, 1.0, (2 * key,), ("value",))
        self.o = weights.outward(rngs, (heads, 2 * key), width, ("heads", "value"))
        self.lambda_init, self.rope_base = config.lambda_init, config.rope_base
        self.heads, self.key = heads, key

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = cache.positions(old["length"], segments, x.shape[1])
        q_1, q_2 = self._halves(x, self.q, positions_BT)
        k_1, k_2 = self._halves(x, self.k, positions_BT)
        v_BTHV = weights.project("btd,dhv->bthv", x, self.v)

        # What two nearby maps read must keep its digits: attention gives its output v's dtype.
        full = mixer.wide(x.dtype)

        def alone():
            v = v_BTHV.astype(full)
            first = attention(q_1, k_1, v, segments=segments)
            return self._difference(first, attention(q_2, k_2, v, segments=segments))

        def beside(seen, **where):
            v = seen["v"].astype(full)
            first = cached_attention(q_1, seen["k_1"], v, **where)
            return self._difference(first, cached_attention(q_2, seen["k_2"], v, **where))

        o_BTHV, new = cache.attend(
            {"k_1": k_1, "k_2": k_2, "v": v_BTHV},
            old,
            positions_BT,
            segments,
            training=state is None,
            alone=alone,
            beside=beside,
        )
        o_BTHV = layers.rms_norm(o_BTHV, self.norm[...], eps=1e-5) * (1 - self.lambda_init)
        return weights.project("bthv,hvd->btd", o_BTHV.astype(x.dtype), self.o), new

    def _halves(self, x, w, positions_BT):
        """The heads' two queries or keys, turned."""
        both_BTPHK = weights.project("btd,dphk->btphk", x, w)
        turn = lambda half: layers.rotary(both_BTPHK[:, :, half], positions_BT, self.rope_base)
        return turn(0), turn(1)

    def _difference(self, first_BTHV, second_BTHV):
        """The first map's output less lambda times the second's."""
        powers = jnp.exp(jnp.sum(self.lambda_q[...] * self.lambda_k[...], axis=-1))
        weight = powers[0] - powers[1] + self.lambda_init
        return first_BTHV - weight * second_BTHV

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Empty slots of both keys and of the value that they share."""
        key, value = (self.heads, self.key), (self.heads, 2 * self.key)
        return cache.empty(batch, capacity, dtype, k_1=key, k_2=key, v=value)


def _key_dim(config: Config, width: int) -> int:
    """Numbers of one map's key; ValueError, one line, for settings that do not fit."""
    heads, key = config.heads, config.key_dim
    if not key:
        if heads < 1 or width % (2 * heads):
            near = checks.nearest_divisor(width // 2, heads)
            raise ValueError(
                f"heads={heads} of two maps: {2 * heads} do not divide the width {width}. "
                f"Use {near}."
            )
        key = width // heads // 2
    if heads < 1 or key < 1:
        raise ValueError(f"heads={heads} of key_dim={key}: both must be at least 1.")
    checks.pairs(key, "key_dim")
    if not 0 <= config.lambda_init < 1:
        raise ValueError(f"lambda_init={config.lambda_init} is outside [0, 1). Use 0.8.")
    if config.rope_base <= 1:
        raise ValueError(f"rope_base={config.rope_base} must be above 1; 10000.0 is usual.")
    return key
