"""Lightning attention: linear attention with constant decays, silu maps, a norm and a sigmoid gate.

Lightning Attention-2 (arXiv 2401.04658, section 3), TransNormerLLM (2307.14995, section 3) and
MiniMax-01 (2501.08313, section 2.2). Notable: this is MiniMax-01's layer: silu on queries, keys
and values, the slopes of ALiBi as decay rates, no scale, one norm over all heads in place of a
normaliser. Layer l of L multiplies the rates by 1 - l / (L - 1), which is the setting `slope`.
TransNormerLLM leaves values and gate linear and rotates the first layer's keys; that is not here.
Weights start at variance 1 / fan-in.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import layers, mixer, weights
from models.parts import features


@dataclasses.dataclass
class Config:
    """Heads and how fast they forget."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: width / heads
    slope: float = 1.0  # factor of every head's rate; 0: nothing is forgotten

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or slope do not fit."""
        return Mixer(self, width, rngs)


CASES = {"lightning": Config()}


class Mixer(mixer.Mixer):
    """S_t = exp(-r_h) S_{t-1} + k_t v_t^T, o_t = q_t S_t, y = (norm(o) * sigmoid(x G)) W."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        key, value = features.head_dims(width, heads, config.key_dim, config.value_dim)
        if config.slope < 0:
            raise ValueError(f"slope={config.slope} is negative: heads would grow. Use 0 or more.")
        self.qk = weights.inward(rngs, width, (2, heads, key), ("parts", "heads", "key"))
        self.vg = weights.inward(rngs, width, (2, heads, value), ("parts", "heads", "value"))
        self.norm = weights.filled(rngs, 1.0, (heads, value), ("heads", "value"))
        self.o = weights.outward(rngs, (heads, value), width, ("heads", "value"))
        self.state_shape = (heads, key, value)
        self.slope = config.slope

    def __call__(self, x, *, segments=None, state=None):
        qk_BTPHK = jax.nn.silu(weights.project("btd,dphk->btphk", x, self.qk))
        vg_BTPHV = weights.project("btd,dphv->btphv", x, self.vg)
        rate_H = jnp.asarray(self.slope * slopes(self.state_shape[0]), mixer.wide(x.dtype))
        o_BTHV, s_BHKV = gated_linear(
            qk_BTPHK[:, :, 0],
            qk_BTPHK[:, :, 1],
            jax.nn.silu(vg_BTPHV[:, :, 0]),
            -rate_H,
            segments=segments,
            initial_state=state,
            scale=1.0,
        )
        flat = o_BTHV.reshape(*o_BTHV.shape[:2], -1)
        o_BTHV = layers.rms_norm(flat, self.norm[...].reshape(-1)).reshape(o_BTHV.shape)
        o_BTHV = o_BTHV * jax.nn.sigmoid(vg_BTPHV[:, :, 1])
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), s_BHKV

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, H, K, V)."""
        return jnp.zeros((batch, *self.state_shape), mixer.wide(dtype))


def slopes(heads: int) -> np.ndarray:
    """r_h = 2^(-8 (h + 1) / H)."""
    return 2.0 ** (-8 * (np.arange(heads) + 1) / heads)
