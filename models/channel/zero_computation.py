"""MoE++: a mixture some of whose experts cost nothing: zero, copy and constants.

MoE++ (arXiv 2410.07348, eqs. 3 to 5 and 7). Notable: a token spends as much as the router thinks it
worth. The loss asks of the free experts `tau` times less evenness than of the others. As in the
released code, and not in eq. 3, the weights of a token sum to 1 over the experts that it chose, the
zero one left out. Left out of that code: the router's residual from the layer before (a layer
stands alone), its tanh layer, its doubled inputs, and the capacity (as in MegaBlocks nothing is
dropped). The experts are SwiGLU.
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
    """Experts with weights, constant ones beside a zero and a copy, and what they weigh."""

    experts: int = 8  # with hidden units
    constants: int = 2  # experts that mix the token with a vector of their own
    top_k: int = 2
    hidden: int = 0  # of one expert; 0: 8/3 of the width
    balance: float = 1e-2  # coefficient of the loss that evens the load
    tau: float = 0.75  # weight in it of the experts that cost nothing

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a size does not fit."""
        return Mixer(self, width, rngs)


CASES = {"zero_computation": Config()}


class Mixer(mixer.Mixer):
    """y = sum of p_e f_e(x) / sum of p_e, of the top k of p = softmax(x W_r) but zero; no state.

    Experts in order: SwiGLU ones; f(x) = 0; f(x) = x; f(x) = a_1 x + a_2 v, a = softmax(x W_c).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, min(config.top_k, 1))
        if config.constants < 1:
            raise ValueError(f"constants={config.constants} must be at least 1. Use 1.")
        total = config.experts + 2 + config.constants
        routing.check(total, config.top_k)
        hidden = routing.hidden_units(config.hidden, width, 8, 3)
        self.router = weights.inward(rngs, width, (total,), ("experts",))
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.silu,
            gated=True,
            share=config.top_k / total,
        )
        self.mix = weights.inward(rngs, width, (config.constants, 2), ("experts", "parts"))
        shape = (config.constants, width)
        self.vectors = weights.weight(rngs, weights.normal(1.0), shape, ("experts", "embed"))
        self.top_k, self.balance, self.tau = config.top_k, config.balance, config.tau

    def __call__(self, x, *, segments=None, state=None):
        real_BT = routing.real(segments, x)
        logits_BTE = routing.logits(x, self.router)
        probs_BTE = jax.nn.softmax(logits_BTE)
        logit_BTJ, expert_BTJ = routing.choose(logits_BTE, self.top_k, real_BT)
        hot_BTE = routing.hot(expert_BTJ, probs_BTE.shape[2])
        count = self.experts.up.shape[0]
        auxiliary.loss("balance", self.balance * self._uneven(probs_BTE, hot_BTE, real_BT))
        routing.measure(probs_BTE, hot_BTE, real_BT)
        # p over the sum of p is a softmax of what is kept; the zero expert alone leaves nothing.
        kept_BTJ = expert_BTJ != count
        lowest = jnp.finfo(logit_BTJ.dtype).min
        weight_BTJ = jax.nn.softmax(jnp.where(kept_BTJ, logit_BTJ, lowest)) * kept_BTJ
        free_BTJE = expert_BTJ[..., None] == count + 1 + jnp.arange(1 + self.mix.shape[1])
        gates_BTE = jnp.sum(weight_BTJ[..., None] * free_BTJE, axis=2).astype(x.dtype)
        y = self.experts(x, jnp.minimum(expert_BTJ, count), weight_BTJ)
        return y + gates_BTE[..., :1] * x + self._constant(x, gates_BTE[..., 1:]), ()

    def _constant(self, x, gates_BTE):
        """sum_e gate_e (a_e1 x + a_e2 v_e)."""
        mix_BTEP = weights.project("btd,dep->btep", x, self.mix).astype(mixer.wide(x.dtype))
        mix_BTEP = gates_BTE[..., None] * jax.nn.softmax(mix_BTEP).astype(x.dtype)
        constant = weights.project("bte,ed->btd", mix_BTEP[..., 1], self.vectors)
        return mix_BTEP[..., 0].sum(-1, keepdims=True) * x + constant

    def _uneven(self, probs_BTE, hot_BTE, real_BT):
        """sum_e eta_e f_e P_e, eta = 1 for an expert with weights and tau for the others (eq. 7).

        f_e is the share of tokens that chose e, P_e the mean probability of e.
        """
        costs_E = jnp.arange(probs_BTE.shape[2]) < self.experts.up.shape[0]
        share_E = routing.mean(hot_BTE.astype(probs_BTE.dtype), real_BT)
        eta_E = jnp.where(costs_E, 1.0, self.tau).astype(probs_BTE.dtype)
        return jnp.sum(eta_E * share_E * routing.mean(probs_BTE, real_BT))

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()
