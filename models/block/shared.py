"""One shared block, called again and again between blocks of their own weights.

Zamba (arXiv 2405.16712, section 2): a single attention-and-MLP block is called every few Mamba
layers, each time on the stream side by side with the embedding, and through an output map of that
call's own. Notable: global attention at the price of one layer's weights; every call keeps its own
state. Here the embedding is what entered this block, so give it all layers to have the paper's. The
released models add what the shared block returns to the input of the next Mamba layer alone; here
it stays in the stream.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import mixer, weights
from models.parts import sublayer
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """`shared` is the Config of a whole block of twice the width, before each of `blocks`."""

    shared: Any
    blocks: tuple[Any, ...]  # Configs of whole blocks

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module; ValueError without blocks."""
        return Block(self, width, rngs)


class Block(mixer.Block):
    """x <- block_i(x + shared([x, x_0]) W_i) for each i, x_0 what came in."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if not config.blocks:
            raise ValueError(
                "blocks is empty; the shared block needs at least one to stand before."
            )
        self.shared = config.shared.build(2 * width, rngs)
        self.blocks = nnx.List([block.build(width, rngs) for block in config.blocks])
        self.maps = nnx.List(
            [weights.outward(rngs, (2 * width,), width, ("value",)) for _ in config.blocks]
        )
        self.causal = all(part.causal for part in (self.shared, *self.blocks))

    def __call__(self, x, *, segments=None, state=None):
        first, new = x, []
        olds = sublayer.before(state, self.blocks)
        for block, back, old in zip(self.blocks, self.maps, olds, strict=True):
            called, own = (None, None) if old is None else old
            both = jnp.concatenate([x, first], axis=-1)
            both, called = self.shared(both, segments=segments, state=called)
            x = constrain(x + weights.project("btf,fd->btd", both, back), "batch", "time", "embed")
            x, own = block(x, segments=segments, state=own)
            new.append((called, own))
        return x, tuple(new)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """For each call the state of the shared block, and that of the block after it."""
        fresh = lambda block: block.init_state(batch, capacity, dtype)
        return tuple((fresh(self.shared), fresh(block)) for block in self.blocks)
