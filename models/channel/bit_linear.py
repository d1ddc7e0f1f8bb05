"""BitNet b1.58: a gated linear unit whose weights are -1, 0 or 1 and whose activations have 8 bits.

The Era of 1-bit LLMs (arXiv 2402.17764, eqs. 1 to 3; SwiGLU, no biases); the channel mixer of the
MatMul-free language model too (2406.02528). Notable: weights stay float for the
optimiser and are rounded at every call; gradients go straight through each rounding, as in the
released code. Every map normalises its input by its RMS (no gain) before it rounds. Products are of
whole numbers, exact in any dtype, but run as usual ones: the memory and energy that ternary
hardware would save are not saved here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import routing, ternary


@dataclasses.dataclass
class Config:
    """Hidden units: `hidden`, or 8/3 of the width."""

    hidden: int = 0  # 0: 8/3 of the width

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a negative size."""
        return Mixer(self, width, rngs)


CASES = {"bit_linear": Config()}


class Mixer(mixer.Mixer):
    """y = (silu(x W_1) * x W_2) W_3 with ternary W and rounded inputs; no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        hidden = routing.hidden_units(config.hidden, width, 8, 3)
        self.gate = weights.inward(rngs, width, (hidden,), ("channels",))
        self.up = weights.inward(rngs, width, (hidden,), ("channels",))
        self.down = weights.outward(rngs, (hidden,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        gate_BTF = ternary.bit_linear("btd,df->btf", x, self.gate[...], x.dtype)
        up_BTF = ternary.bit_linear("btd,df->btf", x, self.up[...], x.dtype)
        y = ternary.bit_linear(
            "btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, self.down[...], x.dtype
        )
        return y.astype(x.dtype), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()
