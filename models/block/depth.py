"""Mixture of depths: a router lets a share of the tokens through a block; the others pass by it.

Mixture-of-Depths (arXiv 2404.02258, section 3, eq. 1). Deviation, so that a token never depends on
later ones (the paper takes the best tokens of the whole sequence, and guesses when decoding): a
token passes if its router's product is above 0 and its document has let through less than
`capacity` of its tokens so far; a loss holds the mean sigmoid of the products near `capacity`.
Notable: what the block adds is weighed by the product itself, as in the paper, so that nothing
jumps where a token begins to pass. The chosen tokens are moved together before the block, which
then computes on `capacity` of the row; they are the only tokens that its mixers ever see.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from models import auxiliary, cache, mixer, weights

PARTS = 64  # the capacity is a multiple of 1 / PARTS: counts are compared in integers


@dataclasses.dataclass
class Config:
    """`block` is the Config of a whole block."""

    block: Any
    capacity: float = 0.5  # share of a document's tokens that pass; the paper's best is 1/8
    balance: float = 0.01  # weight of the loss that holds the mean sigmoid there

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module; ValueError for a capacity that lets nothing or everything through."""
        return Block(self, width, rngs)


class Block(mixer.Block):
    """y_t = x_t + r_t (block(x)_t - x_t) where token t passes, else x_t; r_t = w x_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        self.share = round(config.capacity * PARTS)
        if not 1 <= self.share < PARTS:
            near = min(max(self.share, 1), PARTS - 1) / PARTS
            raise ValueError(f"capacity={config.capacity} must be from 1/64 to 63/64. Use {near}.")
        self.block = config.block.build(width, rngs)
        self.causal = self.block.causal
        self.router = weights.inward(rngs, width, (), ())
        self.balance = config.balance

    def __call__(self, x, *, segments=None, state=None):
        batch, length, _ = x.shape
        # Between two chosen tokens a whole document may be passed by: numbers must not come back.
        given = jnp.ones((batch, length), jnp.int32) if segments is None else segments
        ids_BT = boundaries.numbered(given)
        real_BT = boundaries.is_real(ids_BT)
        none = jnp.zeros(batch, jnp.int32)
        old = state or {"block": None, "passed": none, "position": none}
        wide = mixer.wide(x.dtype)
        route_BT = jnp.einsum("btd,d->bt", x.astype(wide), self.router[...], precision="highest")
        passes_BT, counts = self._admit((route_BT > 0) & real_BT, old, segments)
        self._report(route_BT, passes_BT, real_BT)

        # Chosen tokens first, in order; without a state their number is bounded by the capacity.
        room = length if state is not None else max(1, length * self.share // PARTS)
        order_BC = jnp.argsort(~passes_BT, axis=1, stable=True)[:, :room]
        take = lambda a: jnp.take_along_axis(a, order_BC, axis=1)
        chosen_BC = jnp.where(take(passes_BT), take(ids_BT), 0)
        x_BCD = jnp.take_along_axis(x, order_BC[..., None], axis=1)
        within = None if state is None else _own(old["block"], ids_BT, chosen_BC, entering=True)
        y_BCD, after = self.block(x_BCD, segments=chosen_BC, state=within)
        change_BCD = jnp.where((chosen_BC != 0)[..., None], y_BCD - x_BCD, 0)
        change_BCD = change_BCD * take(route_BT)[..., None].astype(x.dtype)
        rows = jnp.arange(batch)[:, None]
        y = x.at[rows, order_BC].add(change_BCD, unique_indices=True)
        if state is not None:
            after = _own(after, ids_BT, chosen_BC, entering=False)
        return y, {"block": after, **counts}

    def _admit(self, wants_BT, old, segments):
        """Which tokens pass, and how many did in the document so far."""
        position_BT, position = cache.document_positions(
            old["position"], segments, wants_BT.shape[1]
        )
        limit_BT = (position_BT + 1) * self.share // PARTS
        wants_BT1 = wants_BT[..., None].astype(jnp.int32)
        passes_BT1, passed = cache.admit(wants_BT1, limit_BT, old["passed"][:, None], segments)
        return passes_BT1[..., 0], {"passed": passed[:, 0], "position": position}

    def _report(self, route_BT, passes_BT, real_BT):
        count = jnp.maximum(real_BT.sum(), 1)
        mean = jnp.sum(jnp.where(real_BT, jax.nn.sigmoid(route_BT), 0)) / count
        auxiliary.loss("depth", self.balance * jnp.square(mean - self.share / PARTS))
        auxiliary.metric("depth_passed", passes_BT.sum() / count)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The block's, and how many tokens of the document passed, of how many."""
        return {
            "block": self.block.init_state(batch, capacity, dtype),
            "passed": jnp.zeros(batch, jnp.int32),
            "position": jnp.zeros(batch, jnp.int32),
        }


def _own(state, ids_BT, chosen_BC, *, entering: bool):
    """`state`, fresh where it is of another document than the row's first (entering) or last.

    That happens where such a document has no chosen token, so that the block never saw it.
    """
    first, last = mixer.first_and_last(ids_BT)
    seen_first, seen_last = mixer.first_and_last(chosen_BC)
    if entering:
        keep_B = (seen_first == 0) | (seen_first == first)
    else:
        keep_B = (seen_last == last) | ((seen_last == 0) & (first == last))
    return mixer.keep_rows(keep_B, state)
