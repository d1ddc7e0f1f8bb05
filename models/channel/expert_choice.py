"""Expert choice: each expert takes its best tokens of a document, so that loads are always even.

Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368, section 3.2). Notable: whether an
expert takes a token depends on the tokens after it, so this is for encoders only, never for a
language model. An expert takes floor(capacity_factor n / E) of a document's n tokens (the paper
chooses in a batch): a token has 0 to E experts, capacity_factor of them on average; the tokens of a
document of less than E / capacity_factor have none and pass by. The measure "dropped" is the share
of tokens that no expert took.
"""

import dataclasses
import fractions
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from models import mixer, weights
from models.parts import routing


@dataclasses.dataclass
class Config:
    """Experts, their size, and how many of them a token has on average."""

    experts: int = 8
    hidden: int = 0  # of one expert; 0: 4 * width
    capacity_factor: float = 2.0  # experts of a token on average

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a size does not fit."""
        return Mixer(self, width, rngs)


CASES = {"expert_choice": Config()}


class Mixer(mixer.Mixer):
    """y_t = sum over the experts e that took t of p_te gelu(x W_e) V_e, p = softmax(x W_r)."""

    causal = False

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, 1)
        if not 0 < config.capacity_factor <= config.experts:
            near = min(max(config.capacity_factor, 1.0), config.experts)
            raise ValueError(
                f"capacity_factor={config.capacity_factor} is not in (0, {config.experts}]: "
                f"an expert takes a token once. Use {near}."
            )
        hidden = routing.hidden_units(config.hidden, width, 4, 1)
        self.router = weights.inward(rngs, width, (config.experts,), ("experts",))
        self.experts = routing.Experts(
            config.experts,
            width,
            hidden,
            rngs,
            activation=jax.nn.gelu,
            gated=False,
            share=min(1.0, config.capacity_factor / config.experts),
        )
        self.factor = fractions.Fraction(config.capacity_factor).limit_denominator(64)

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            self.init_state(0, 0)
        batch, length, width = x.shape
        probs_BTE = jax.nn.softmax(routing.logits(x, self.router))
        taken_BTE = chosen(probs_BTE, segments, self.factor)
        real_BT = routing.real(segments, x)
        alone = routing.mean((~taken_BTE.any(-1)).astype(probs_BTE.dtype), real_BT)
        routing.measure(probs_BTE, taken_BTE.astype(jnp.int32), real_BT, alone)
        # Sorted by expert as they lie; a row's experts take at most factor * length tokens in all.
        most = max(1, batch * math.floor(self.factor * length))
        taken_EN = taken_BTE.reshape(-1, taken_BTE.shape[2]).T
        (index_M,) = jnp.nonzero(taken_EN.reshape(-1), size=most, fill_value=0)
        token_M = index_M % (batch * length)
        rows = self.experts.rows(x.reshape(-1, width)[token_M], taken_EN.sum(1, dtype=jnp.int32))
        weight_M = probs_BTE.reshape(batch * length, -1).T.reshape(-1)[index_M]
        rows = rows * weight_M[:, None].astype(x.dtype)
        return jnp.zeros_like(x).reshape(-1, width).at[token_M].add(rows).reshape(x.shape), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """None: ValueError."""
        raise ValueError(
            "expert_choice is bidirectional: it has no state to decode from. Use it in an encoder."
        )


def chosen(probs_BTE, segments, factor):
    """True where expert e takes token t: one of its floor(factor n / E) best of the document."""
    batch, length, experts = probs_BTE.shape
    real_BT = routing.real(segments, probs_BTE)
    document_BT = jnp.zeros((batch, length), jnp.int32)
    if segments is not None:  # padding comes after all documents
        document_BT = jnp.where(real_BT, boundaries.ordinals(segments), length)
    time_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    like_BET = lambda a_BT: jnp.broadcast_to(a_BT[:, None], (batch, experts, length))
    score_BET = jax.lax.stop_gradient(probs_BTE).swapaxes(1, 2)
    keys = like_BET(document_BT), -score_BET, like_BET(time_BT)
    _, _, sorted_BET = jax.lax.sort(keys, dimension=2, num_keys=2)
    rank_BTE = jnp.argsort(sorted_BET, axis=2).swapaxes(1, 2)  # among all tokens of the row
    rows_B1 = jnp.arange(batch)[:, None]
    size_BN = jnp.zeros((batch, length + 1), jnp.int32).at[rows_B1, document_BT].add(1)
    before_BN = jnp.cumsum(size_BN, axis=1) - size_BN
    size_BT, before_BT = (jnp.take_along_axis(a, document_BT, 1) for a in (size_BN, before_BN))
    limit_BT = size_BT * factor.numerator // (factor.denominator * experts)
    return (rank_BTE - before_BT[..., None] < limit_BT[..., None]) & real_BT[..., None]
