"""DeltaNet: a matrix state in which every write replaces what its key held.

Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484, eq. 4
and section 3.4); negative eigenvalues from Unlocking State-Tracking in Linear RNNs Through
Negative Eigenvalues (arXiv 2411.12537, section 4.3). Notable: no gate forgets, a transition is
I - beta k k^T; with beta_max = 2 its eigenvalue along k reaches -1, which solves parity. The output
norm is RMS, as in the released code.
"""

import dataclasses

import jax
from flax import nnx

from kernels.delta_rule import delta_rule
from models import checks, mixer, weights
from models.parts import delta


@dataclasses.dataclass
class Config:
    """Heads of keys and values, both as wide as the model altogether."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: key_dim
    conv: int = 4  # taps of the short convolutions
    beta_max: float = 1.0  # the write strength is in (0, beta_max); 2: eigenvalues in (-1, 1)

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or beta_max do not fit."""
        return Mixer(self, width, rngs)


CASES = {"deltanet": Config(), "deltanet_negative": Config(beta_max=2.0)}


class Mixer(delta.DeltaMixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t / sqrt(K)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        delta.check_sizes(heads, key_dim=config.key_dim, value_dim=config.value_dim)
        delta.check_beta_max(config.beta_max)
        key = config.key_dim or checks.split_heads(width, heads)
        super().__init__(width, heads, key, config.value_dim or key, config.conv, rngs)
        self.beta = weights.inward(rngs, width, (heads,), ("heads",))
        self.beta_max = config.beta_max

    def __call__(self, x, *, segments=None, state=None):
        (q_BTHK, k_BTHK, v_BTHV), tails, s_BHKV = self.read(x, segments, state)
        beta_BTH = weights.project("btd,dh->bth", x, self.beta).astype(mixer.wide(x.dtype))
        o_BTHV, s_BHKV = delta_rule(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            self.beta_max * jax.nn.sigmoid(beta_BTH),
            segments=segments,
            initial_state=s_BHKV,
        )
        return self.write(o_BTHV), tails | {"s": s_BHKV}
