"""HGRN2: a gated recurrence whose state is an outer product of what is let in and what is read.

HGRN2: Gated Linear RNNs with State Expansion (arXiv 2404.07904, eq. 6). Notable: the key is 1 - f,
what the forget gate f lets go, so it has no map of its own; f is at least `lower_bound`, which the
paper learns by layer so that upper layers forget less: a mixer does not know its layer, so here it
is a setting. The output norm runs over all heads together, as in the released code.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Heads; keys of a head are as wide as its values (the paper's 128 at larger widths)."""

    heads: int = 4
    key_dim: int = 0  # per head, the expansion of the state; 0: width / heads
    lower_bound: float = 0.0  # of the forget gates, in [0, 1); the paper's grows with the layer

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or lower_bound do not fit."""
        return Mixer(self, width, rngs)


CASES = {"hgrn2": Config(), "hgrn2_bounded": Config(lower_bound=0.3)}


class Mixer(mixer.Mixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T, o_t = q_t S_t, y = norm(o) W."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, bound = config.heads, config.lower_bound
        value = checks.split_heads(width, heads)
        key = config.key_dim or value
        if not 0 <= bound < 1:
            near = 0.0 if bound < 0 else 0.99
            raise ValueError(f"lower_bound={bound} is outside [0, 1). Use {near}.")
        self.qf = weights.inward(rngs, width, (2, heads, key), ("parts", "heads", "key"))
        self.i = weights.inward(rngs, width, (heads, value), ("heads", "value"))
        self.norm = weights.filled(rngs, 1.0, (heads, value), ("heads", "value"))
        self.o = weights.outward(rngs, (heads, value), width, ("heads", "value"))
        self.lower_bound = bound
        self.state_shape = (heads, key, value)

    def __call__(self, x, *, segments=None, state=None):
        qf_BTPHK = weights.project("btd,dphk->btphk", x, self.qf)
        k_BTHK, log_decay_BTHK = self._gate(qf_BTPHK[:, :, 1].astype(mixer.wide(x.dtype)))
        o_BTHV, s_BHKV = gated_linear(
            jax.nn.silu(qf_BTPHK[:, :, 0]),
            k_BTHK.astype(x.dtype),
            weights.project("btd,dhv->bthv", x, self.i),
            log_decay_BTHK,
            segments=segments,
            initial_state=state,
            scale=1.0,
        )
        flat_BTD = o_BTHV.reshape(*x.shape[:2], -1)
        o_BTHV = layers.rms_norm(flat_BTD, self.norm[...].reshape(-1)).reshape(o_BTHV.shape)
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), s_BHKV

    def _gate(self, f_BTHK):
        """1 - f and log f of f = lower_bound + (1 - lower_bound) sigmoid(f_BTHK)."""
        log_BTHK = jax.nn.log_sigmoid(f_BTHK)
        if self.lower_bound:
            bound = self.lower_bound
            log_BTHK = jnp.logaddexp(math.log(bound), math.log1p(-bound) + log_BTHK)
        return (1 - self.lower_bound) * jax.nn.sigmoid(-f_BTHK), log_BTHK

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, H, K, V)."""
        return jnp.zeros((batch, *self.state_shape), mixer.wide(dtype))
