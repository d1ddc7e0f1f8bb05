"""DeepSeekMoE: many small experts beside shared ones, sigmoid scores, balance by a bias.

DeepSeekMoE (arXiv 2401.06066, eqs. 9 to 11), DeepSeek-V3 (2412.19437, eqs. 12 to 20), balancing
without a loss (2408.15664, algorithm 1). Notable: the bias takes part in the choice alone, never in
the weights. It is no function of the loss: its gradient here is (load - mean load), the choices
counted over the call and scaled to next to nothing, so that an optimiser that steps by the sign of
it does what the paper does after each step, and the norm of all gradients hardly notices.
In `groups`, a token chooses among the best groups, each judged by its two best experts (V3; V2
judges by the best one). The sequence-wise loss is worked out for each document and averaged by
their lengths. The first variant of the paper is score="softmax": weights that do not sum to 1, no
bias, balanced by the loss alone. V3's factor on the routed part (2.5, in its code) is left out.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from models import auxiliary, checks, mixer, weights
from models.parts import routing

TINY = 2.0**-30  # of a choice too many, in the gradient of the bias


@dataclasses.dataclass
class Config:
    """Routed and shared experts of `hidden` units each, and how the routed ones are chosen."""

    experts: int = 16  # routed
    top_k: int = 4
    shared: int = 1  # experts that every token has
    hidden: int = 0  # of one expert; 0: 2/3 of the width, a quarter of a usual GLU
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    groups: int = 4  # of experts
    top_groups: int = 2  # groups among which a token chooses
    balance: float = 1e-4  # coefficient of the sequence-wise loss

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where experts, groups and top_k do not fit."""
        return Mixer(self, width, rngs)


CASES = {
    "deepseek_moe": Config(),
    "deepseek_moe_v1": Config(score="softmax", groups=1, top_groups=1, balance=1e-2),
}


class Mixer(mixer.Mixer):
    """y = shared(x) + sum over the chosen e of g_e f_e(x), all of them SwiGLU; no state."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, config.top_k)
        _check(config)
        hidden = routing.hidden_units(config.hidden, width, 2, 3)
        self.router = weights.inward(rngs, width, (config.experts,), ("experts",))
        bias = weights.filled(rngs, 0.0, (config.experts,), ("router",))
        self.bias = bias if config.score == "sigmoid" else None
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.silu,
            gated=True,
            share=config.top_k / config.experts,
        )
        self.shared = Shared(width, config.shared * hidden, rngs) if config.shared else None
        self.top_k, self.balance = config.top_k, config.balance
        self.groups, self.top_groups = config.groups, config.top_groups

    def __call__(self, x, *, segments=None, state=None):
        real_BT = routing.real(segments, x)
        logits_BTE = routing.logits(x, self.router)
        scores_BTE = jax.nn.softmax(logits_BTE) if self.bias is None else jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
        expert_BTJ, weight_BTJ = self._choose(scores_BTE, real_BT)
        hot_BTE = routing.hot(expert_BTJ, probs_BTE.shape[2])
        if self.bias is not None:
            weight_BTJ = weight_BTJ / weight_BTJ.sum(-1, keepdims=True)
            weight_BTJ = balanced(weight_BTJ, self.bias[...], hot_BTE.sum((0, 1)))
        loss = sequence_balance(probs_BTE, hot_BTE, segments) / self.top_k
        auxiliary.loss("balance", self.balance * loss)
        routing.measure(probs_BTE, hot_BTE, real_BT)
        y = self.experts(x, expert_BTJ, weight_BTJ)
        return y if self.shared is None else y + self.shared(x), ()

    def _choose(self, scores_BTE, real_BT):
        """The experts of highest score + bias within the best groups, and their scores."""
        biased_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.bias is not None:
            biased_BTE = biased_BTE + jax.lax.stop_gradient(self.bias[...])
        if self.groups > 1:
            batch, length, experts = biased_BTE.shape
            biased_BTGI = biased_BTE.reshape(batch, length, self.groups, -1)
            best, _ = jax.lax.top_k(biased_BTGI, min(2, biased_BTGI.shape[-1]))
            _, group_BTJ = jax.lax.top_k(best.sum(-1), self.top_groups)
            open_BTG = routing.hot(group_BTJ, self.groups) > 0
            open_BTE = jnp.repeat(open_BTG, experts // self.groups, axis=-1)
            biased_BTE = jnp.where(open_BTE, biased_BTE, -jnp.inf)
        _, expert_BTJ = routing.choose(biased_BTE, self.top_k, real_BT)
        inside_BTJ = jnp.minimum(expert_BTJ, scores_BTE.shape[-1] - 1)
        return expert_BTJ, jnp.take_along_axis(scores_BTE, inside_BTJ, axis=-1)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Nothing: each token is mixed alone."""
        return ()


class Shared(nnx.Module):
    """The shared experts: side by side they are one SwiGLU."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = weights.inward(rngs, width, (2, hidden), ("parts", "channels"))
        self.down = weights.outward(rngs, (hidden,), width, ("channels",))

    def __call__(self, x):
        up_BTPF = weights.project("btd,dpf->btpf", x, self.up)
        hidden_BTF = jax.nn.silu(up_BTPF[:, :, 0]) * up_BTPF[:, :, 1]
        return weights.project("btf,fd->btd", hidden_BTF, self.down)


def _check(config):
    """ValueError where the groups do not fit the experts, or a setting is unknown."""
    if config.score not in ("sigmoid", "softmax"):
        raise ValueError(f"score={config.score!r} is unknown. Use one of sigmoid, softmax.")
    if config.shared < 0:
        raise ValueError(f"shared={config.shared} is negative. Use 0 (none) or more.")
    if config.groups < 1 or config.experts % config.groups:
        near = checks.nearest_divisor(config.experts, config.groups)
        raise ValueError(
            f"groups={config.groups} does not divide experts={config.experts}. Use {near}."
        )
    size = config.experts // config.groups
    least = -(-config.top_k // size)
    if not least <= config.top_groups <= config.groups:
        near = min(max(config.top_groups, least), config.groups)
        raise ValueError(
            f"top_groups={config.top_groups} of {config.groups} groups of {size} experts does not "
            f"hold top_k={config.top_k}. Use {near}."
        )


@jax.custom_vjp
def balanced(weight_BTJ, bias_E, load_E):
    """The weights as they are; the gradient of the bias is TINY (load - mean load), always."""
    return weight_BTJ


def _balanced_backward(residuals, d_weight_BTJ):
    bias_E, load_E = residuals
    load_E = load_E.astype(bias_E.dtype)
    return d_weight_BTJ, TINY * (load_E - load_E.mean()), None


balanced.defvjp(lambda weight, bias, load: (weight, (bias, load)), _balanced_backward)


def sequence_balance(probs_BTE, hot_BTE, segments):
    """sum_e f_e P_e of each document, J when even, the mean over documents by their tokens.

    f_e is E / T times the tokens that chose e, P_e the mean normalised score (eqs. 17 to 20).
    """
    batch, length, experts = probs_BTE.shape
    real_BT = routing.real(segments, probs_BTE)
    document_BT, documents = jnp.zeros((batch, length), jnp.int32), 1
    if segments is not None:
        document_BT, documents = boundaries.ordinals(segments), length
    row_BT = jnp.arange(batch)[:, None] * documents + document_BT

    def totals(value_BTE):
        value_BTE = jnp.where(real_BT[..., None], value_BTE, 0)
        flat = value_BTE.reshape(batch * length, -1)
        return jax.ops.segment_sum(flat, row_BT.reshape(-1), batch * documents)

    tokens = totals(jnp.ones_like(probs_BTE[..., :1]))
    loss = jnp.sum(
        totals(hot_BTE.astype(probs_BTE.dtype)) * totals(probs_BTE) / jnp.maximum(tokens, 1)
    )
    return loss * experts / jnp.maximum(tokens.sum(), 1)
