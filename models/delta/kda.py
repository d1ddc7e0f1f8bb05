"""Kimi Delta Attention: the delta rule under a forget gate for every channel of the keys.

Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692, eq. 1 and section
4). Notable: the gate and the sigmoid output gate come from low-rank maps; the decay is Mamba-2's,
alpha = exp(-exp(A) softplus(W x + b)), for every channel. Maps start at variance 1 / fan-in, where
the released code draws them from its model's normal distribution.
"""

import dataclasses

import jax
from flax import nnx

from kernels.delta_rule import delta_rule
from models import mixer, weights
from models.parts import delta


@dataclasses.dataclass
class Config(delta.ChannelSettings):
    """Heads of keys and values, both as wide as the model altogether."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, gate_rank or conv do not fit."""
        return Mixer(self, width, rngs)


CASES = {"kda": Config()}


class Mixer(delta.ChannelMixer):
    """S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        super().__init__(config, width, rngs)
        self.beta = weights.inward(rngs, width, (config.heads,), ("heads",))

    def __call__(self, x, *, segments=None, state=None):
        (q_BTHK, k_BTHK, v_BTHV), tails, s_BHKV = self.read(x, segments, state)
        beta_BTH = weights.project("btd,dh->bth", x, self.beta).astype(mixer.wide(x.dtype))
        o_BTHV, s_BHKV = delta_rule(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            jax.nn.sigmoid(beta_BTH),
            self.decay(x),
            segments=segments,
            initial_state=s_BHKV,
        )
        return self.gated(x, o_BTHV), tails | {"s": s_BHKV}
