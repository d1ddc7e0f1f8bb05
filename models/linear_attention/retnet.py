"""RetNet: retention, linear attention with a constant decay a head and rotated queries and keys.

Retentive Network (arXiv 2307.08621, eqs. 5 to 8). Notable: heads forget at gamma = 1 - 2^(-5 - h);
rotations count positions inside the document; values and the swish gate are twice as wide as the
model; a group norm of each head stands in for a normaliser. xPos' growth factors are left out, as
in the released code, since gamma does their work; so is the scaling of scores, which the norm
undoes. Weights start as in that code: Xavier with gain 2^(-5/2), and 1/2 for the output.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import cache, checks, layers, mixer, weights
from models.parts import features

GAIN_IN, GAIN_OUT = 2**-2.5, 0.5
EPS = 1e-6


@dataclasses.dataclass
class Config:
    """Heads; the paper's have 256 keys and 512 values."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: twice key_dim
    rope_base: float = 10_000.0  # 0: no positions

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or key_dim do not fit."""
        return Mixer(self, width, rngs)


CASES = {"retnet": Config()}


class Mixer(mixer.Mixer):
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = q_t S_t / sqrt(K), y = (norm(o) * swish(x G)) W."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        key, _ = features.head_dims(width, heads, config.key_dim, config.value_dim or 1)
        value = config.value_dim or 2 * key
        if config.rope_base < 0:
            raise ValueError(f"rope_base={config.rope_base} is negative. Use 0 (none) or 10000.")
        if config.rope_base:
            checks.pairs(key, "key_dim")

        def inward(size, *dims):
            out = heads * size  # Xavier's variance is gain^2 * 2 / (in + out)
            init = weights.fan_in(width + out, gain=GAIN_IN * 2**0.5)
            parts = (width, 2, heads, size)
            return weights.weight(rngs, init, parts, ("embed", "parts", "heads", *dims))

        self.qk, self.vg = inward(key, "key"), inward(value, "value")
        out = weights.fan_in(heads * value + width, gain=GAIN_OUT * 2**0.5)
        self.o = weights.weight(rngs, out, (heads, value, width), ("heads", "value", "embed"))
        self.norm = weights.filled(rngs, 1.0, (heads, value), ("heads", "value"))
        self.state_shape = (heads, key, value)
        self.rope_base = config.rope_base

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"s": None, "length": jnp.zeros(x.shape[0], jnp.int32)}
        position_BT, length = cache.document_positions(state["length"], segments, x.shape[1])
        qk_BTPHK = weights.project("btd,dphk->btphk", x, self.qk)
        vg_BTPHV = weights.project("btd,dphv->btphv", x, self.vg)
        q_BTHK, k_BTHK = qk_BTPHK[:, :, 0], qk_BTPHK[:, :, 1]
        if self.rope_base:
            q_BTHK = layers.rotary(q_BTHK, position_BT, self.rope_base)
            k_BTHK = layers.rotary(k_BTHK, position_BT, self.rope_base)
        o_BTHV, s_BHKV = gated_linear(
            q_BTHK,
            k_BTHK,
            vg_BTPHV[:, :, 0],
            jnp.asarray(log_decays(self.state_shape[0]), mixer.wide(x.dtype)),
            segments=segments,
            initial_state=state["s"],
        )
        o_BTHV = layers.layer_norm(o_BTHV, self.norm[...], eps=EPS)
        o_BTHV = o_BTHV * jax.nn.silu(vg_BTPHV[:, :, 1])
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), {"s": s_BHKV, "length": length}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The matrix state (B, H, K, V), and the tokens of the document so far."""
        s_BHKV = jnp.zeros((batch, *self.state_shape), mixer.wide(dtype))
        return {"s": s_BHKV, "length": jnp.zeros(batch, jnp.int32)}


def log_decays(heads: int) -> np.ndarray:
    """log(1 - 2^(-5 - h)) of each head (eq. 8)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))
