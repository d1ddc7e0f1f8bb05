"""Gated DeltaNet: the delta rule, which replaces what a key held, under a forget gate.

Gated Delta Networks (arXiv 2412.06464, eq. 10). Notable: keys and queries are L2-normalised after a
short convolution, the write strength beta is a sigmoid, the decay is Mamba-2's; several value heads
may share a key head (as in Qwen3-Next).
"""

import dataclasses

import jax
from flax import nnx

from kernels.delta_rule import delta_rule
from models import checks, mixer, weights
from models.parts import delta


@dataclasses.dataclass
class Config:
    """Key heads, value heads (a multiple of them) and their dimensions."""

    heads: int = 4
    value_heads: int = 0  # 0: as many as heads
    key_dim: int = 0  # per head; 0: 3/4 of width / heads, as in the paper
    value_dim: int = 0  # per head; 0: twice key_dim
    conv: int = 4

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the heads do not fit."""
        return Mixer(self, width, rngs)


class Mixer(delta.DeltaMixer):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t / sqrt(K)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        groups, heads = config.heads, config.value_heads or config.heads
        delta.check_sizes(groups, key_dim=config.key_dim, value_dim=config.value_dim)
        if heads % groups:
            near = max(groups, heads // groups * groups)
            raise ValueError(f"value_heads={heads} is no multiple of heads={groups}. Use {near}.")
        key = config.key_dim or max(1, 3 * checks.split_heads(width, groups) // 4)
        value = config.value_dim or 2 * key
        super().__init__(width, heads, key, value, config.conv, rngs, key_heads=groups)
        self.beta = weights.inward(rngs, width, (heads,), ("heads",))
        self.decay = delta.Decay(width, heads, rngs)
        self.z = weights.inward(rngs, width, (heads, value), ("heads", "value"))

    def __call__(self, x, *, segments=None, state=None):
        (q_BTGK, k_BTGK, v_BTHV), tails, s_BHKV = self.read(x, segments, state)
        beta_BTH = weights.project("btd,dh->bth", x, self.beta).astype(mixer.wide(x.dtype))
        o_BTHV, s_BHKV = delta_rule(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            jax.nn.sigmoid(beta_BTH),
            self.decay(x),
            segments=segments,
            initial_state=s_BHKV,
        )
        z_BTHV = weights.project("btd,dhv->bthv", x, self.z)
        return self.write(o_BTHV, jax.nn.silu(z_BTHV)), tails | {"s": s_BHKV}
