"""Comba: a delta rule that erases less than it writes and corrects its output by the key.

Comba: Improving Bilinear RNNs with Closed-loop Control (arXiv 2506.02475, section 3). Notable: the
transition is a scalar plus low rank, alpha - b beta k k^T, whose erasure reads the state before it
decays and is weaker than the write by a learned b in (0, 1) a head; the query is corrected to
q - d k. The released layer normalises the key again after weighing it by b, in which b is lost, and
q after the correction, and weighs d by b; here both are normalised first, as the equations say. b
starts at sigmoid(1) as there, d at `correction`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.delta_rule import dplr
from models import checks, mixer, weights
from models.parts import delta


@dataclasses.dataclass
class Config:
    """Heads of keys, and of values twice as wide."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: 3/4 of width / heads, as in the released code
    value_dim: int = 0  # per head; 0: twice key_dim
    conv: int = 4  # taps of the short convolutions
    correction: float = 1.0  # d at the start; the authors use 0.02 for small models

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or conv do not fit."""
        return Mixer(self, width, rngs)


CASES = {"comba": Config()}


class Mixer(delta.DeltaMixer):
    """S_t = (alpha_t - b beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = (q_t - d k_t) S_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        delta.check_sizes(heads, key_dim=config.key_dim, value_dim=config.value_dim)
        key = config.key_dim or max(1, 3 * checks.split_heads(width, heads) // 4)
        value = config.value_dim or 2 * key
        super().__init__(width, heads, key, value, config.conv, rngs)
        self.beta = weights.inward(rngs, width, (heads,), ("heads",))
        self.decay = delta.Decay(width, heads, rngs)
        self.erase = weights.filled(rngs, 1.0, (heads,), ("heads",))
        self.correction = weights.filled(rngs, config.correction, (heads,), ("heads",))
        self.z = weights.inward(rngs, width, (heads, value), ("heads", "value"))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        (q_BTHK, k_BTHK, v_BTHV), tails, s_BHKV = self.read(x, segments, state, dtype)
        beta_BTH = weights.project("btd,dh->bth", x, self.beta).astype(dtype)
        written_BTHK = jax.nn.sigmoid(beta_BTH)[..., None] * k_BTHK
        o_BTHV, s_BHKV = dplr(
            q_BTHK - self.correction[...][:, None] * k_BTHK,
            written_BTHK,
            v_BTHV,
            k_BTHK,
            -jax.nn.sigmoid(self.erase[...])[:, None] * written_BTHK,
            jnp.broadcast_to(self.decay(x)[..., None], k_BTHK.shape),
            segments=segments,
            initial_state=s_BHKV,
        )
        z_BTHV = weights.project("btd,dhv->bthv", x, self.z)
        return self.write(o_BTHV, jax.nn.sigmoid(z_BTHV)), tails | {"s": s_BHKV}
