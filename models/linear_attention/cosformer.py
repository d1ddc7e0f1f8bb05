"""cosFormer: products of rectified queries and keys, weighted by the cosine of their distance.

cosFormer (arXiv 2202.08791, cos-based re-weighting). Notable: cos(a - b) = cos a cos b + sin a sin
b separates the distance into two features of the position. The weight of a distance reaches 0 at
the horizon M; the paper sets M to the length of the sequence, which a decoder does not know, so it
is a setting. Positions past the horizon count as the horizon, so that no weight turns negative.
Weights start at variance 1 / fan-in.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import cache, mixer
from models.parts import features


@dataclasses.dataclass
class Config(features.Settings):
    """Heads and the longest document that positions tell apart."""

    horizon: int = 4096  # M: tokens; at least the length of a document

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or horizon do not fit."""
        return Mixer(self, width, rngs)


CASES = {"cosformer": Config()}


class Mixer(features.FeatureMixer):
    """o_t = sum_s w_ts v_s / sum_s w_ts, w_ts = relu(q_t) relu(k_s) cos(pi / 2 * (t - s) / M).

    Sums run over s <= t of the document.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.horizon < 1:
            raise ValueError(
                f"horizon={config.horizon} must be at least 1; take the longest document, 4096."
            )
        super().__init__(config, width, rngs, rows=lambda key: 2 * key)
        self.horizon = config.horizon

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"s": None, "length": jnp.zeros(x.shape[0], jnp.int32)}
        position_BT, length = cache.document_positions(state["length"], segments, x.shape[1])
        f_BTPHF = self._turned(jax.nn.relu(self.queries_keys(x)), position_BT)
        q_BTHF, k_BTHF = f_BTPHF[:, :, 0], f_BTPHF[:, :, 1]
        y, s_BHFW = self.read(x, q_BTHF, k_BTHF, segments=segments, state=state["s"])
        return y, {"s": s_BHFW, "length": length}

    def _turned(self, x_BTPHK, position_BT):
        """(x cos a, x sin a), a = pi / 2 * position / M."""
        share_BT = jnp.minimum(position_BT, self.horizon) / self.horizon
        angle_BT111 = (math.pi / 2 * share_BT).astype(mixer.wide(x_BTPHK.dtype))[
            ..., None, None, None
        ]
        parts = (x_BTPHK * jnp.cos(angle_BT111), x_BTPHK * jnp.sin(angle_BT111))
        return jnp.concatenate(parts, axis=-1)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """S beside z (B, H, 2K, V + 1), and the tokens of the document so far."""
        s_BHFW = super().init_state(batch, capacity, dtype)
        return {"s": s_BHFW, "length": jnp.zeros(batch, jnp.int32)}
