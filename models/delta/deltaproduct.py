"""DeltaProduct: several delta rule steps a token, so a transition is a product of reflections.

DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (arXiv 2502.10297,
section 3, eq. 4); with a gate it is Gated DeltaProduct. Notable: the steps of a token are laid one
after another along time and given to one delta rule; the query reads after the last one, and the
gate, Mamba-2's, closes before the first. The write strengths are in (0, 2), as in the paper. The
released layer has an output gate too, which the equations do not; here there is none.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.delta_rule import delta_rule
from models import checks, layers, mixer, weights
from models.parts import delta


@dataclasses.dataclass
class Config:
    """Heads, and how many delta rule steps each token takes."""

    heads: int = 4
    steps: int = 2  # n_h: Householder factors of a token's transition
    gate: Literal["none", "scalar"] = "none"  # scalar: one decay a head, as in Gated DeltaNet
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: key_dim
    conv: int = 4  # taps of the short convolutions
    beta_max: float = 2.0  # write strengths are in (0, beta_max); 2: eigenvalues in (-1, 1)

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, steps, gate or beta_max do not fit."""
        return Mixer(self, width, rngs)


CASES = {"deltaproduct": Config(), "gated_deltaproduct": Config(steps=3, gate="scalar")}


class Mixer(mixer.Mixer):
    """S_t = prod_j (I - beta_tj k_tj k_tj^T) alpha_t S_{t-1} + the writes, o_t = q_t S_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, steps = config.heads, config.steps
        delta.check_sizes(heads, key_dim=config.key_dim, value_dim=config.value_dim)
        key = config.key_dim or checks.split_heads(width, heads)
        value = config.value_dim or key
        _check(config)
        wide, thin = ("parts", "heads", "value"), ("parts", "heads", "key")
        self.q = delta.Convolved(width, (heads, key), thin[1:], config.conv, rngs)
        self.k = delta.Convolved(width, (steps, heads, key), thin, config.conv, rngs)
        self.v = delta.Convolved(width, (steps, heads, value), wide, config.conv, rngs)
        self.beta = weights.inward(rngs, width, (steps, heads), ("parts", "heads"))
        self.decay = delta.Decay(width, heads, rngs) if config.gate == "scalar" else None
        self.norm = weights.filled(rngs, 1.0, (value,), ("value",))
        self.o = weights.outward(rngs, (heads, value), width, ("heads", "value"))
        self.beta_max = config.beta_max
        self.state_shape = (heads, key, value)

    def __call__(self, x, *, segments=None, state=None):
        state = state or dict.fromkeys("qkvs")
        q_BTHK, q_tail = self.q(x, segments=segments, state=state["q"])
        k_BTNHK, k_tail = self.k(x, segments=segments, state=state["k"])
        v_BTNHV, v_tail = self.v(x, segments=segments, state=state["v"])
        steps = k_BTNHK.shape[2]
        beta_BTNH = weights.project("btd,dnh->btnh", x, self.beta).astype(mixer.wide(x.dtype))
        along = lambda y_BTNxx: y_BTNxx.reshape(y_BTNxx.shape[0], -1, *y_BTNxx.shape[3:])
        o_BSHV, s_BHKV = delta_rule(
            jnp.repeat(layers.l2_norm(q_BTHK), steps, axis=1),
            along(layers.l2_norm(k_BTNHK)),
            along(v_BTNHV),
            along(self.beta_max * jax.nn.sigmoid(beta_BTNH)),
            None if self.decay is None else along(_first_step(self.decay(x), steps)),
            segments=None if segments is None else jnp.repeat(segments, steps, axis=1),
            initial_state=state["s"],
        )
        o_BTHV = layers.rms_norm(o_BSHV[:, steps - 1 :: steps], self.norm[...])
        y = weights.project("bthv,hvd->btd", o_BTHV, self.o)
        return y, {"q": q_tail, "k": k_tail, "v": v_tail, "s": s_BHKV}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tails and the matrix state (B, H, K, V), all zero."""
        return {
            "q": self.q.init_state(batch, dtype),
            "k": self.k.init_state(batch, dtype),
            "v": self.v.init_state(batch, dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }


def _first_step(log_alpha_BTH, steps: int):
    """(B, T, steps, H): all of the decay before a token's first step."""
    return jnp.pad(log_alpha_BTH[:, :, None], ((0, 0), (0, 0), (0, steps - 1), (0, 0)))


def _check(config: Config) -> None:
    if config.steps < 1:
        raise ValueError(f"steps={config.steps} must be at least 1, which is DeltaNet. Use 2.")
    if config.gate not in ("none", "scalar"):
        raise ValueError(f"gate={config.gate!r} is unknown. Use 'none' or 'scalar'.")
    delta.check_beta_max(config.beta_max)
