"""RWKV's channel mix: squared-ReLU hidden units that see the token and the one before.

RWKV (arXiv 2305.13048, section 3.1) gates the output by a sigmoid, the receptance; RWKV-7
(2503.14456) does without. Notable: the token before is the document's own, zero at its start. How
much of it enters differs from channel to channel: it starts as in the released code for the layer
half way down, since a layer here cannot know its own depth. The maps start at the scale of all
others here, not small or, as RWKV-7's last one, at zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import layers, mixer, weights


@dataclasses.dataclass
class Config:
    """RWKV-4 to 6 with the receptance, RWKV-7 without."""

    hidden: int = 0  # 0: 4 * width
    receptance: bool = True  # gate the output

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError for a negative size."""
        return Mixer(self, width, rngs)


CASES = {"rwkv_channel": Config(), "rwkv7_channel": Config(receptance=False)}


class Mixer(mixer.Mixer):
    """y = sigmoid(x_r W_r) * (relu(x_k W_k)^2 W_v), x_k = x_t + (x_{t-1} - x_t) m_k, as for r."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.hidden < 0:
            raise ValueError(
                f"hidden={config.hidden} is negative. Use 0 (4 times the width) or more."
            )
        hidden = config.hidden or 4 * width
        parts = 2 if config.receptance else 1
        power = 0.5 if config.receptance else 0.5**4
        self.before = weights.weight(rngs, _falling(power), (parts, width), ("parts", "embed"))
        self.up = weights.inward(rngs, width, (hidden,), ("channels",))
        self.down = weights.outward(rngs, (hidden,), width, ("channels",))
        gate = weights.inward(rngs, width, (width,), ("channels",)) if config.receptance else None
        self.gate = gate

    def __call__(self, x, *, segments=None, state=None):
        before_BTD, last = layers.token_shift(x, segments, state)
        wide = mixer.wide(x.dtype)  # where gradients of the mixing weights are summed over time
        step_BTD = before_BTD.astype(wide) - x.astype(wide)
        mixed = [(x.astype(wide) + step_BTD * m).astype(x.dtype) for m in self.before[...]]
        hidden_BTF = jnp.square(jax.nn.relu(weights.project("btd,df->btf", mixed[0], self.up)))
        y = weights.project("btf,fd->btd", hidden_BTF, self.down)
        if self.gate is not None:
            y = jax.nn.sigmoid(weights.project("btd,dc->btc", mixed[1], self.gate)) * y
        return y, last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The token before the first: zero."""
        return jnp.zeros((batch, 1, self.before.shape[1]), dtype)


def _falling(power):
    """1 - (i / D)^power for channel i: the first see the token before alone, the last hardly."""
    return lambda key, shape: jnp.broadcast_to(
        1 - (jnp.arange(shape[1]) / shape[1]) ** power, shape
    )
