"""Multilayer perceptron: one hidden layer, applied to each token alone.

Attention Is All You Need (arXiv 1706.03762, eq. 2) with relu; gelu (arXiv 1606.08415) as in GPT-2;
relu2 is the squared ReLU of Primer (arXiv 2109.08668). Notable: without biases.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass
class Config:
    """Hidden units: `hidden`, or 4 times the width."""

    hidden: int = 0  # 0: 4 * width
    activation: Literal["relu", "gelu", "relu2"] = "gelu"

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a negative size or an unknown activation."""
        return Mixer(self, width, rngs)


CASES = {"mlp": Config(), "mlp_relu2": Config(activation="relu2")}


class Mixer(mixer.Mixer):
    """y = act(x W_1) W_2; no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.hidden < 0:
            raise ValueError(
                f"hidden={config.hidden} is negative. Use 0 (4 times the width) or more."
            )
        if config.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation={config.activation!r} is unknown. Use one of {known}.")
        hidden = config.hidden or 4 * width
        self.up = weights.inward(rngs, width, (hidden,), ("channels",))
        self.down = weights.outward(rngs, (hidden,), width, ("channels",))
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x, *, segments=None, state=None):
        hidden_BTF = self.activation(weights.project("btd,df->btf", x, self.up))
        return weights.project("btf,fd->btd", hidden_BTF, self.down), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()
