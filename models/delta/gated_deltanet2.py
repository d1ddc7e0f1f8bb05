"""Gated DeltaNet-2: a delta rule that decides for every channel what it erases and what it writes.

Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention (arXiv 2605.22791). Notable: the
one write strength of Gated DeltaNet becomes two gates, b over the keys' channels for the erasure
and w over the values' for the write; with both the same scalar it is Kimi Delta Attention, whose
decay and sigmoid output gate it keeps. Maps start at variance 1 / fan-in, where the released code
uses its framework's default.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.delta_rule import dplr
from models import mixer, weights
from models.parts import delta


@dataclasses.dataclass
class Config(delta.ChannelSettings):
    """Heads of keys and values, both as wide as the model altogether."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, gate_rank or conv do not fit."""
        return Mixer(self, width, rngs)


CASES = {"gated_deltanet2": Config()}


class Mixer(delta.ChannelMixer):
    """S_t = (I - k_t (b_t * k_t)^T) diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = q_t S_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        super().__init__(config, width, rngs)
        heads, key, value = self.state_shape
        self.erase = weights.inward(rngs, width, (heads, key), ("heads", "key"))
        self.strength = weights.inward(rngs, width, (heads, value), ("heads", "value"))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        (q_BTHK, k_BTHK, v_BTHV), tails, s_BHKV = self.read(x, segments, state, dtype)
        erase_BTHK = weights.project("btd,dhk->bthk", x, self.erase).astype(dtype)
        strength_BTHV = weights.project("btd,dhv->bthv", x, self.strength)
        log_decay_BTHK = self.decay(x)
        # dplr's a reads the state before its decay, the erasure reads it after.
        o_BTHV, s_BHKV = dplr(
            q_BTHK,
            k_BTHK,
            v_BTHV * jax.nn.sigmoid(strength_BTHV),
            jnp.exp(log_decay_BTHK) * jax.nn.sigmoid(erase_BTHK) * k_BTHK,
            -k_BTHK,
            log_decay_BTHK,
            segments=segments,
            initial_state=s_BHKV,
        )
        return self.gated(x, o_BTHV), tails | {"s": s_BHKV}
