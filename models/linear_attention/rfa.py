"""Random feature attention: a Gaussian kernel of unit queries and keys, under a forget gate.

Random Feature Attention (arXiv 2103.02143, sections 3.1 and 3.2, the gated variant). Notable: sine
and cosine features of w (sigma * x) for |x| = 1, with fixed Gaussian w and learned sigma; one
scalar gate a head weighs what was against what comes. Estimates of a positive sum can be near 0 or
below; the released code cuts them at a constant, here they are cut at the least that the exact sum
can be, exp(-2 max(sigma)^2) times the gates' total weight. The paper redraws w from a pool while
training; here one draw is kept. Weights start at variance 1 / fan-in.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.linear_scan import linear_scan
from models import layers, mixer, weights
from models.parts import features

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass
class Config(features.Settings):
    """Heads, and random directions a head; each gives a sine and a cosine."""

    directions: int = 64

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or directions do not fit."""
        return Mixer(self, width, rngs)


CASES = {"rfa": Config()}


class Mixer(features.FeatureMixer):
    """S_t = g_t S_{t-1} + (1 - g_t) f(k_t) v_t^T, o_t = f(q_t) S_t / f(q_t) z_t.

    z is S without v. With f(x) = [sin(w sigma x), cos(w sigma x)] / sqrt(F) the mean of f(q) f(k)
    is exp(-|sigma (q - k)|^2 / 2).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        count = config.directions
        if count < 1:
            raise ValueError(f"directions={count} must be at least 1; the paper uses 64.")
        super().__init__(config, width, rngs, rows=lambda key: 2 * count)
        heads, key = self.qk.shape[-2:]
        self.gate = weights.inward(rngs, width, (heads,), ("heads",))
        self.gate_bias = weights.filled(rngs, 0.0, (heads,), ("heads",))
        self.sigma = weights.filled(rngs, 1.0, (heads, key), ("heads", "key"))
        init = jax.nn.initializers.normal(1.0)
        self.directions = weights.weight(rngs, init, (heads, count, key), ("heads", "state", "key"))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"s": None, "mass": None}
        dtype = mixer.wide(x.dtype)
        f_BTPHF = self._map(layers.l2_norm(self.queries_keys(x).astype(dtype)))
        gate_BTH = weights.project("btd,dh->bth", x, self.gate).astype(dtype) + self.gate_bias[...]
        keep_BTH, write_BTH = jax.nn.log_sigmoid(gate_BTH), jax.nn.sigmoid(-gate_BTH)
        mass_BTH, mass_BH = linear_scan(
            write_BTH, keep_BTH, segments=segments, initial_state=state["mass"]
        )
        least_H = jnp.exp(-2 * jnp.square(self.sigma[...]).max(-1))
        y, s_BHFW = self.read(
            x,
            f_BTPHF[:, :, 0],
            f_BTPHF[:, :, 1] * write_BTH[..., None],
            keep_BTH,
            segments=segments,
            state=state["s"],
            least=jnp.maximum(least_H * mass_BTH, features.LEAST)[..., None],
        )
        return y, {"s": s_BHFW, "mass": mass_BH}

    def _map(self, x_BTPHK):
        """f(x) in float32."""
        w_HFK = jax.lax.stop_gradient(self.directions[...]) * self.sigma[...][:, None]
        angle_BTPHF = jnp.einsum("btphk,hfk->btphf", x_BTPHK, w_HFK, precision=HIGHEST)
        parts = (jnp.sin(angle_BTPHF), jnp.cos(angle_BTPHF))
        return jnp.concatenate(parts, axis=-1) / math.sqrt(angle_BTPHF.shape[-1])

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """S beside z (B, H, 2F, V + 1), and the gates' total weight (B, H)."""
        s_BHFW = super().init_state(batch, capacity, dtype)
        return {"s": s_BHFW, "mass": s_BHFW[:, :, 0, 0]}
