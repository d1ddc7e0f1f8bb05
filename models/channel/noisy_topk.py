"""Sparsely-gated mixture: a softmax over the k highest logits, and losses of importance and load.

Outrageously Large Neural Networks (arXiv 1701.06538, section 2.1, eqs. 3 to 5; 4 and appendix A,
eqs. 6 to 11). Notable: the load loss reads P(x, e), the probability that e would be among the k
under fresh noise on its logit, which is smooth in the logits and trains the noise's scale.
A call draws nothing here, so the choice is the noise-free one, as the paper's at evaluation, and
P is taken around the clean logits. The router starts at random (the paper: zero, where noise alone
breaks ties); the noise's scale starts at softplus(0) as there. Experts are its ReLU networks,
without the final sigmoid.
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
    top_k: int = 2  # less than experts
    hidden: int = 0  # of one expert; 0: 4 * width
    importance: float = 0.1  # coefficient of CV^2 of the summed weights
    load: float = 0.1  # coefficient of CV^2 of the smooth load

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where top_k and experts do not fit."""
        return Mixer(self, width, rngs)


CASES = {"noisy_topk": Config()}


class Mixer(mixer.Mixer):
    """y = sum_e G_e f_e(x), G = softmax over the k highest of x W_g; no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, config.top_k)
        if config.top_k == config.experts:
            raise ValueError(
                f"top_k={config.top_k} is all experts: no load to estimate. Use {config.top_k - 1}."
            )
        hidden = routing.hidden_units(config.hidden, width, 4, 1)
        self.router = weights.inward(rngs, width, (config.experts,), ("experts",))
        self.noise = weights.filled(rngs, 0.0, (width, config.experts), ("embed", "experts"))
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.relu,
            gated=False,
            share=config.top_k / config.experts,
        )
        self.top_k, self.importance, self.load = config.top_k, config.importance, config.load

    def __call__(self, x, *, segments=None, state=None):
        real_BT = routing.real(segments, x)
        logits_BTE = routing.logits(x, self.router)
        high_BTJ, expert_BTJ = routing.choose(logits_BTE, self.top_k, real_BT)
        weight_BTJ = jax.nn.softmax(high_BTJ)
        hot_BTJE = jax.nn.one_hot(expert_BTJ, logits_BTE.shape[-1], dtype=logits_BTE.dtype)
        gates_BTE = jnp.einsum("btj,btje->bte", weight_BTJ, hot_BTJE)
        scale_BTE = jax.nn.softplus(routing.logits(x, self.noise))
        load_BTE = smooth_load(logits_BTE, scale_BTE, self.top_k)
        importance = squared_variation(routing.mean(gates_BTE, real_BT))
        load = squared_variation(routing.mean(load_BTE, real_BT))
        auxiliary.loss("importance", self.importance * importance)
        auxiliary.loss("load", self.load * load)
        hot_BTE = routing.hot(expert_BTJ, logits_BTE.shape[2])
        routing.measure(jax.nn.softmax(logits_BTE), hot_BTE, real_BT)
        return self.experts(x, expert_BTJ, weight_BTJ), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()


def smooth_load(logits_BTE, scale_BTE, top_k):
    """P(x, e) = Phi((h_e - the k-th highest logit but for h_e) / scale_e) (eq. 9)."""
    high_BTJ, _ = jax.lax.top_k(logits_BTE, top_k + 1)
    last_BT1, next_BT1 = high_BTJ[..., -2:-1], high_BTJ[..., -1:]
    rival_BTE = jnp.where(logits_BTE > next_BT1, next_BT1, last_BT1)
    return jax.scipy.stats.norm.cdf((logits_BTE - rival_BTE) / scale_BTE)


def squared_variation(value_E):
    """CV^2, variance over squared mean (eq. 7); 0 where all are zero."""
    tiny = jnp.finfo(value_E.dtype).tiny ** 0.5
    return jnp.var(value_E) / jnp.maximum(jnp.square(jnp.mean(value_E)), tiny)
