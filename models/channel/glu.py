"""Gated linear unit: the channel mixer of Llama-like models.

GLU Variants Improve Transformer (arXiv 2002.05202, eqs. 5, 6): SwiGLU with silu, GeGLU with gelu.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


@dataclasses.dataclass
class Config:
    """Hidden units: `hidden`, or 8/3 of the width rounded up to a multiple of 32."""

    hidden: int = 0
    activation: Literal["silu", "gelu"] = "silu"

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a negative size or an unknown activation."""
        return Mixer(self, width, rngs)


CASES = {"glu": Config(), "geglu": Config(activation="gelu")}


class Mixer(mixer.Mixer):
    """y = (act(x W_1) * x W_2) W_3; no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.hidden < 0:
            raise ValueError(
                f"hidden={config.hidden} is negative. Use 0 (8/3 of the width) or more."
            )
        hidden = config.hidden or -(-8 * width // 96) * 32
        if config.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation={config.activation!r} is unknown. Use one of {known}.")
        self.up = weights.inward(rngs, width, (2, hidden), ("parts", "channels"))
        self.down = weights.outward(rngs, (hidden,), width, ("channels",))
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x, *, segments=None, state=None):
        up_BTPF = weights.project("btd,dpf->btpf", x, self.up)
        hidden = self.activation(up_BTPF[:, :, 0]) * up_BTPF[:, :, 1]
        return weights.project("btf,fd->btd", hidden, self.down), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()
