"""Mixtures whose experts keep a limited share of a document: Switch and GShard.

The papers give an expert a fixed number of choices in a group of tokens, in which a later token or
another document takes room: packing and decoding would then change results. Here the number grows
along the document, and what was refused takes no room of it.
"""

import dataclasses
import fractions
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models import auxiliary, cache, mixer, weights
from models.parts import routing


@dataclasses.dataclass
class Settings:
    """Experts, their size and their capacity."""

    experts: int = 8
    hidden: int = 0  # of one expert; 0: 4 * width
    capacity_factor: float = 1.0  # choices that an expert keeps, in units of an even load
    least: int = 8  # choices in a document that each expert keeps in any case
    balance: float = 1e-2  # coefficient of the loss that evens the load


class Mixer(mixer.Mixer):
    """y = sum_e w_e relu(x W_e) V_e over the `top_k` e of highest p = softmax(x W_r) with room.

    w is p (Switch), or p in proportion, so that the chosen ones sum to 1 (GShard).
    """

    top_k: ClassVar[int]
    in_proportion: ClassVar[bool]

    def __init__(self, config: Settings, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, self.top_k)
        check(config.capacity_factor, config.least)
        hidden = routing.hidden_units(config.hidden, width, 4, 1)
        self.router = weights.inward(rngs, width, (config.experts,), ("experts",))
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.relu,
            gated=False,
            share=self.top_k / config.experts,
        )
        self.factor, self.least = config.capacity_factor, config.least
        self.balance = config.balance

    def __call__(self, x, *, segments=None, state=None):
        state = state or self.init_state(x.shape[0], x.shape[1])
        real_BT = routing.real(segments, x)
        probs_BTE = jax.nn.softmax(routing.logits(x, self.router))
        weight_BTJ, expert_BTJ = routing.choose(probs_BTE, self.top_k, real_BT)
        if self.in_proportion:
            weight_BTJ = weight_BTJ / weight_BTJ.sum(-1, keepdims=True)
        kept_BTJ, after = keep(expert_BTJ, state, segments, factor=self.factor, least=self.least)
        first = routing.balance(probs_BTE, expert_BTJ[..., :1], real_BT)
        auxiliary.loss("balance", self.balance * first)
        hot_BTE = routing.hot(expert_BTJ, probs_BTE.shape[2])
        routing.measure(
            probs_BTE, hot_BTE, real_BT, dropped(expert_BTJ, kept_BTJ, hot_BTE.shape[2])
        )
        return self.experts(x, kept_BTJ, weight_BTJ), after

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """How often each expert was chosen in the document, and the document's tokens."""
        return empty_counts(batch, self.router.shape[1])


def check(factor: float, least: int) -> None:
    """ValueError where no token could ever be kept."""
    if factor <= 0:
        raise ValueError(f"capacity_factor={factor} must be positive. Use 1.0 or more.")
    if least < 1:
        raise ValueError(f"least={least} tokens of an expert must be at least 1. Use 1.")


def empty_counts(batch: int, experts: int) -> dict[str, Array]:
    """The state of `keep`: choices kept of each expert in the document so far, and its tokens."""
    counts = jnp.zeros((batch, experts), jnp.int32)
    return {"counts": counts, "position": jnp.zeros(batch, jnp.int32)}


def keep(
    expert_BTJ: Int[Array, "B T J"],
    state: dict[str, Array],
    segments: Int[Array, "B T"] | None,
    *,
    factor: float,
    least: int,
) -> tuple[Int[Array, "B T J"], dict[str, Array]]:
    """The choices within capacity (none for the others), and the state after them.

    The token at position t of its document, from 0, keeps expert e if the document has kept e less
    than max(least, ceil(factor J (t + 1) / E)) times before. The limit is worked out in integers
    (`factor` to a 64th): its rounding must not depend on the dtype.
    """
    experts = state["counts"].shape[1]
    hot_BTE = routing.hot(expert_BTJ, experts)
    position_BT, position = cache.document_positions(
        state["position"], segments, expert_BTJ.shape[1]
    )
    share = fractions.Fraction(factor).limit_denominator(64) * expert_BTJ.shape[2] / experts
    limit_BT = -(-(position_BT + 1) * share.numerator // share.denominator)
    limit_BT = jnp.maximum(limit_BT, least)
    within_BTE, counts = cache.admit(hot_BTE, limit_BT, state["counts"], segments)
    own_BTJ = jnp.take_along_axis(within_BTE, jnp.minimum(expert_BTJ, experts - 1), axis=2)
    kept_BTJ = jnp.where(own_BTJ, expert_BTJ, experts)
    return kept_BTJ, {"counts": counts, "position": position}


def dropped(
    expert_BTJ: Int[Array, "B T J"], kept_BTJ: Int[Array, "B T J"], experts: int
) -> Float[Array, ""]:
    """The share of the choices that were not kept."""
    chosen = jnp.maximum(jnp.sum(expert_BTJ < experts), 1)
    return 1 - jnp.sum(kept_BTJ < experts) / chosen
