"""Performer: softmax attention estimated without bias by positive orthogonal random features.

Rethinking Attention with Performers (arXiv 2009.14794, FAVOR+: lemma 1, sections 2.3 and 2.4).
Notable: features are exp(w x - |x|^2 / 2), all positive; each block of w is an orthogonal matrix
whose rows have the lengths of Gaussian vectors. Exponents are taken relative to the largest one, of
a query among its own features, of keys so far in the document: sums shrink when that maximum moves,
so no exponent is ever positive. The released code takes the maximum over the whole row and can draw
features anew while training; here it is causal and one draw is kept. 1e-6 is added to each feature
as there. Weights start at variance 1 / fan-in.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import features

FLOOR = 1e-6  # keeps a sum of weights above 0 where every product of features underflows
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass
class Config(features.Settings):
    """Heads and the number of random features that they share."""

    features: int = 0  # 0: key_dim * log(key_dim), at least key_dim

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or features do not fit."""
        return Mixer(self, width, rngs)


CASES = {"performer": Config()}


class Mixer(features.FeatureMixer):
    """o_t = f(q_t) S_t / f(q_t) z_t, S_t = sum f(k_s) v_s^T, z_t = sum f(k_s), s <= t.

    f(x)_i = exp(w_i y - |y|^2 / 2), y = x / K^(1/4): the mean of f(q) f(k) is exp(q k / sqrt(K)).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.features < 0:
            raise ValueError(
                f"features={config.features} is negative. Use 0 (key_dim * log(key_dim)) or more."
            )
        rows = lambda key: config.features or max(key, round(key * math.log(key)))
        super().__init__(config, width, rngs, rows)
        shape = (self.state_shape[1], self.qk.shape[-1])
        self.directions = weights.weight(rngs, _orthogonal, shape, ("state", "key"))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"s": None, "max": None}
        e_BTPHF = self._exponents(self.queries_keys(x).astype(mixer.wide(x.dtype)))
        q_BTHF, k_BTHF = e_BTPHF[:, :, 0], e_BTPHF[:, :, 1]
        top_BTH, decay_BTH, top = features.running_max(k_BTHF.max(-1), segments, state["max"])
        largest_BTH1 = jax.lax.stop_gradient(q_BTHF.max(-1, keepdims=True))
        y, s_BHFW = self.read(
            x,
            jnp.exp(q_BTHF - largest_BTH1) + FLOOR,
            jnp.exp(k_BTHF - top_BTH[..., None]) + FLOOR,
            decay_BTH,
            segments=segments,
            state=state["s"],
        )
        return y, {"s": s_BHFW, "max": top}

    def _exponents(self, x_BTPHK):
        """w_i y - |y|^2 / 2."""
        directions_FK = jax.lax.stop_gradient(self.directions[...])
        y_BTPHK = x_BTPHK * x_BTPHK.shape[-1] ** -0.25
        along = jnp.einsum("btphk,fk->btphf", y_BTPHK, directions_FK, precision=HIGHEST)
        return along - jnp.square(y_BTPHK).sum(-1, keepdims=True) / 2

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """S beside z (B, H, F, V + 1) as multiples of exp(m), and the maximum m of each head."""
        s_BHFW = super().init_state(batch, capacity, dtype)
        return {"s": s_BHFW, "max": features.no_max(batch, self.state_shape[:1], dtype)}


def _orthogonal(key, shape):
    """Rows orthogonal in blocks of K, each as long as a Gaussian vector of K numbers."""
    count, dim = shape
    draw, lengths = jax.random.split(key)
    blocks, _ = jnp.linalg.qr(jax.random.normal(draw, (-(-count // dim), dim, dim)))
    rows = blocks.reshape(-1, dim)[:count]
    return rows * jnp.linalg.norm(jax.random.normal(lengths, shape), axis=1, keepdims=True)
