"""Token mixers side by side in one layer, whose normed outputs are averaged.

Hymba's parallel heads (arXiv 2411.13676, eq. 3: attention and Mamba on the same input, each output
normed and weighed by a learned gain) and Falcon-H1's hybrid layer (arXiv 2507.22448). Notable: it
is a mixer, not a whole block: a channel mixer may follow it. Deviation: Hymba shares one input map
between the two; here each mixer has its own.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from models import layers, mixer, weights
from models.parts import sublayer


@dataclasses.dataclass
class Config:
    """Configs of the mixers that share a layer."""

    mixers: tuple
    norm_eps: float = 1e-6

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where there is nothing to average."""
        return Mixer(self, width, rngs)


class Mixer(sublayer.Chain):
    """y = mean_i beta_i * norm_i(mixer_i(x)), beta a gain a channel, 1 at the start."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if len(config.mixers) < 2:
            raise ValueError(
                f"mixers holds {len(config.mixers)} mixer; heads in parallel need at least 2."
            )
        self.parts = nnx.List([part.build(width, rngs) for part in config.mixers])
        count = (len(config.mixers), width)
        self.gain = weights.filled(rngs, 1.0, count, ("parts", "embed"))
        self.eps = config.norm_eps

    def __call__(self, x, *, segments=None, state=None):
        total, new = jnp.zeros(x.shape, mixer.wide(x.dtype)), []
        olds = sublayer.before(state, self.parts)
        for i, (part, old) in enumerate(zip(self.parts, olds, strict=True)):
            y, after = part(x, segments=segments, state=old)
            total = total + layers.rms_norm(y, self.gain[...][i], self.eps)
            new.append(after)
        return (total / len(new)).astype(x.dtype), tuple(new)
