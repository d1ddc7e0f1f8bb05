"""Dropless mixture of experts: rows sorted by expert, none dropped, SwiGLU experts.

MegaBlocks (arXiv 2211.15841, sections 2 and 4); losses of Switch (2101.03961, eq. 4) and ST-MoE
(2202.08906, eq. 5). Notable: an expert takes as many tokens as choose it, so a token's result
depends on no other. The experts are SwiGLU (the paper: MLPs of gelu); the weights of the chosen are
their probabilities, which do not sum to 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import auxiliary, mixer, weights
from models.parts import routing


@dataclasses.dataclass
class Config:
    """Experts, how many of them a token has, their size, and the coefficients of two losses."""

    experts: int = 8
    top_k: int = 2
    hidden: int = 0  # of one expert; 0: 8/3 of the width
    balance: float = 1e-2  # coefficient of the loss that evens the load
    z: float = 1e-3  # coefficient of the loss that keeps logits small

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where top_k and experts do not fit."""
        return Mixer(self, width, rngs)


CASES = {"dropless": Config()}


class Mixer(mixer.Mixer):
    """y = sum over the top k of p = softmax(x W_r) of p_e f_e(x); no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, config.top_k)
        hidden = routing.hidden_units(config.hidden, width, 8, 3)
        self.router = weights.inward(rngs, width, (config.experts,), ("experts",))
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.silu,
            gated=True,
            share=config.top_k / config.experts,
        )
        self.top_k, self.balance, self.z = config.top_k, config.balance, config.z

    def __call__(self, x, *, segments=None, state=None):
        real_BT = routing.real(segments, x)
        logits_BTE = routing.logits(x, self.router)
        probs_BTE = jax.nn.softmax(logits_BTE)
        weight_BTJ, expert_BTJ = routing.choose(probs_BTE, self.top_k, real_BT)
        auxiliary.loss("balance", self.balance * routing.balance(probs_BTE, expert_BTJ, real_BT))
        auxiliary.loss("z", self.z * routing.z(logits_BTE, real_BT))
        routing.measure(probs_BTE, routing.hot(expert_BTJ, probs_BTE.shape[2]), real_BT)
        return self.experts(x, expert_BTJ, weight_BTJ), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()
