"""Hash layer: a mixture whose router is a fixed hash, with nothing to learn or to balance.

Hash Layers For Large Sparse Models (arXiv 2106.04426, section 3). Notable: the paper hashes the
token's id. A mixer sees only activations, so the hash here is the nearest of E fixed random
directions; where the layers before change, so does a token's expert. The expert's output is not
weighted, as in the paper.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import routing


@dataclasses.dataclass
class Config:
    """Experts and their size."""

    experts: int = 8
    hidden: int = 0  # of one expert; 0: 4 * width

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a size does not fit."""
        return Mixer(self, width, rngs)


CASES = {"hash": Config()}


class Mixer(mixer.Mixer):
    """y = relu(x W_e) V_e, e = argmax of x r_e / |r_e| over fixed random r_e; no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, 1)
        hidden = routing.hidden_units(config.hidden, width, 4, 1)
        self.directions = weights.inward(rngs, width, (config.experts,), ("experts",))
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.relu,
            gated=False,
            share=1 / config.experts,
        )

    def __call__(self, x, *, segments=None, state=None):
        real_BT = routing.real(segments, x)
        scores_BTE = routing.logits(x, self.directions)
        scores_BTE = scores_BTE / jnp.linalg.norm(self.directions[...], axis=0)
        scores_BTE = jax.lax.stop_gradient(scores_BTE)
        _, expert_BTJ = routing.choose(scores_BTE, 1, real_BT)
        hot_BTE = routing.hot(expert_BTJ, scores_BTE.shape[2])
        routing.measure(hot_BTE.astype(scores_BTE.dtype), hot_BTE, real_BT)
        return self.experts(x, expert_BTJ, jnp.ones(expert_BTJ.shape, x.dtype)), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()
